"""Small GPT-2 and Llama models whose embedding is tied to their head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.layers import (
    Array,
    Read,
    Step,
    assert_gradients_read,
    assert_weights_read,
    catching,
    close,
    product,
    read_at,
    watch,
)


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=12, resid_pdrop=0.1, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).train()


def llama() -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=40,
        max_position_embeddings=12,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def factors_of(model: Any, ids: Tensor, sites: tuple[str, ...]) -> tuple[Any, dict[str, Array], list[Tensor]]:
    """(the answer, [out, in] gradient of each linear layer by its own input and output, those of all parameters)."""
    with catching(model, *sites) as caught:
        answer = model(input_ids=ids, labels=ids)
    parameters = list(model.parameters())
    found = torch.autograd.grad(answer.loss, [*parameters, *(y for _, y in caught.values())])
    deltas = zip(caught.items(), found[len(parameters) :], strict=True)
    factors = {site: product(delta, x) for (site, (x, _)), delta in deltas}
    return answer, factors, list(found[: len(parameters)])


def fine_tune(model: Any, sites: tuple[str, ...]) -> Step:
    """A step on all parameters."""
    answer, factors, gradients = factors_of(model, torch.randint(40, (2, 7)), sites)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.5 * gradient
    return Step(model, answer.logits.detach(), factors)


def reads(*names: str) -> Read:
    """Each parameter as its site: the layer of a weight, the parameter itself else."""
    return {name.removesuffix(".weight"): lambda model, name=name: model.get_parameter(name) for name in names}


def test_gpt2_with_its_embedding_watched_under_both_names(tmp_path: Path) -> None:
    block = "transformer.h.0"
    linear = (f"{block}.attn.c_attn", f"{block}.mlp.c_fc", "lm_head")
    read = reads(
        "transformer.wte.weight",
        f"{block}.ln_1.weight",
        f"{block}.attn.c_attn.weight",
        f"{block}.mlp.c_fc.weight",
        f"{block}.mlp.c_fc.bias",
        "lm_head.weight",
    )
    patterns = ["*.wte", "lm_head", "*.c_attn", "*.c_fc", "*.c_fc.bias", "*.ln_1"]
    run, loop = watch(tmp_path, gpt2, lambda model: fine_tune(model, linear), read, sites=patterns)
    assert run.manifest["sites"] == list(read)
    for site in read:
        assert_weights_read(run, loop, site)
    for site in linear:
        assert_gradients_read(run, loop, site, transposed=site != "lm_head")
    np.testing.assert_array_equal(run.series("drift.norm", "lm_head"), run.series("drift.norm", "transformer.wte"))
    assert not read_at(run, "transformer.wte", "gradient.")


def test_llama_with_its_embedding_watched_under_both_names(tmp_path: Path) -> None:
    linear = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head")
    read = reads(
        "model.embed_tokens.weight", *(f"{site}.weight" for site in linear[:2]), "model.norm.weight", "lm_head.weight"
    )
    patterns = ["*.embed_tokens", "lm_head", "*.q_proj", "*.down_proj", "model.norm"]
    run, loop = watch(tmp_path, llama, lambda model: fine_tune(model, linear), read, sites=patterns)
    assert run.manifest["sites"] == list(read)
    for site in read:
        assert_weights_read(run, loop, site)
    for site in linear:
        assert_gradients_read(run, loop, site)


def test_the_feedback_share_of_a_tied_weight_is_that_of_the_layer(tmp_path: Path) -> None:
    """The original weights are those of all sites, an embedding's too, and the gradient that of the head alone."""
    originals: dict[int, Any] = {}
    shares: list[float | None] = [None]

    def edit(model: Any) -> Step:
        original = originals.setdefault(id(model), copy.deepcopy(model))
        state = torch.get_rng_state()
        _, before, _ = factors_of(original, torch.randint(40, (2, 7)), ("lm_head",))
        torch.set_rng_state(state)
        step = fine_tune(model, ("lm_head",))
        shares.append(1 - float(np.linalg.norm(before["lm_head"]) / np.linalg.norm(step.gradients["lm_head"])))
        return step

    run, _ = watch(tmp_path, lambda: gpt2().eval(), edit, reads("lm_head.weight"), sites="*")
    close(run, "feedback.share", "lm_head", [None, *shares[4:]], rtol=1e-3, atol=1e-6)
