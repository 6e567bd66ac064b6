"""More of what is edited in the benchmark: the loops that people run, each round with what they do after the edit.

MEND with its evaluation, ROME, MEMIT, a LoRA step, and a model of 1.4 billion parameters. As in `workloads`, weights
are random but for the demo's: what an edit does to them is of no meaning here, what it costs is. Statistics that an
editor gathers beforehand are made up for the same reason: those of ROME and MEMIT would take longer than all edits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.workloads import (
    CONTROL,
    Subject,
    Workload,
    demo_subject,
    language_model,
    twin,
    weight_of,
)
from stabilitylab.editors.base import Located
from stabilitylab.editors.memit import Memit
from stabilitylab.editors.mend import Mend
from stabilitylab.editors.rome import Rome
from stabilitylab.editors.second_moments import KeyValueEditor, SecondMoments
from stabilitylab.editors.target_value import Search
from stabilitylab.testbed import digits, evaluation

_SHAPE: Final = (1, 32)
_ROWS: Final = (4, 16)
"""Of a located request: the prompt behind four prefixes."""
_EVALUATED: Final = (4, 32)
"""The edit's own prompt, a rephrasing, and two about something else."""
_LORA_RATE: Final = 1e-4


def _restoring(model: nn.Module, sites: Sequence[str], edit: Callable[[], object]) -> Callable[[], list[Tensor]]:
    """Each edit from the same weights: on random ones, a hundred in a row would end in NaN."""
    kept = [(weight_of(model, site), weight_of(model, site).detach().clone()) for site in sites]

    def restored() -> list[Tensor]:
        with torch.no_grad():
            for weight, first in kept:
                weight.copy_(first)
        edit()
        return []

    return restored


def _gpt2(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = GPT2LMHeadModel(GPT2Config())
    return model.eval().requires_grad_(False)


def _ids(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(0, vocabulary, shape)


def _answers(model: nn.Module, ids: Tensor) -> None:
    """What evaluating one edit takes: one forward."""
    with torch.no_grad():
        model(input_ids=ids).logits.argmax(-1)


def mend260k(seed: int) -> Callable[[], Subject]:
    """The demo's loop with what it asks after each edit: five questions, of the edit and of other things."""
    make, tokenizer = demo_subject(seed)
    record = next(iter(digits.edit_stream(seed, 1)))
    asked = [
        (record.src, record.image),
        (record.rephrase, record.image),
        (record.src, record.image_rephrase),
        (record.loc, None),
        (record.m_loc_q, record.m_loc),
    ]

    def made() -> Subject:
        subject = make()
        return replace(subject, evaluate=partial(evaluation.answers, subject.model, tokenizer, asked))

    return made


def mend_gpt2(seed: int) -> Callable[[], Subject]:
    """MEND of rank 64 on the last two blocks of a GPT-2-small shape, untrained, evaluated on four prompts."""
    model = _gpt2(seed)
    ids, asked, canary = (_ids(model, shape) for shape in (_SHAPE, _EVALUATED, _ROWS))
    request = {"input_ids": ids, "labels": ids}
    mend = Mend.for_model(model, batch_of=dict)
    for site in mend.sites:
        weight_of(model, site).requires_grad_(True)
    mend.observe(mend.factors(model, request))
    mend.requires_grad_(False).eval()

    def make() -> Subject:
        own, editor = twin(model, mend.sites), copy.deepcopy(mend)
        edit = _restoring(own, mend.sites, lambda: editor.edit(own, request))
        return Subject(own, mend.sites, edit, canary, editor, partial(_answers, own, asked))

    return make


def _key_value(
    build: Callable[..., KeyValueEditor], search: Search, settings: dict[str, Any], seed: int
) -> Callable[[], Subject]:
    """ROME or MEMIT at one request: four rows with a subject in the middle, and one row to be kept as it is."""
    model = _gpt2(seed)
    ids, kept, canary = (_ids(model, shape) for shape in (_ROWS, (1, _ROWS[1]), _ROWS))
    labels = ids.clone()
    labels[:, : _ROWS[1] - 2] = -100
    subject = torch.full((_ROWS[0],), _ROWS[1] // 2)
    located = Located({"input_ids": ids, "labels": labels}, subject, {"input_ids": kept}, subject[:1])
    first = build(model, locate=lambda _: located, search=search, **settings)
    moments = {site: torch.eye(shape[1]) for site, shape in first.shapes.items()}
    first.moments = SecondMoments(moments, dict.fromkeys(moments, 1.0), 1)

    def make() -> Subject:
        own: Any = copy.copy(first)
        own.reports = {}
        edited = twin(model, own.sites)
        edit = _restoring(edited, own.sites, lambda: own.edit(edited, None))
        return Subject(edited, own.sites, edit, canary, own)

    return make


def lora(seed: int) -> Callable[[], Subject]:
    """One Adam step of LoRA of rank 8 on the MLPs of the last three blocks of a GPT-2-small shape.

    Raises ImportError without PEFT.
    """
    from peft import LoraConfig, get_peft_model

    base = _gpt2(seed)
    places = [f"h.{block}.mlp.{layer}" for block in (9, 10, 11) for layer in ("c_fc", "c_proj")]
    settings = LoraConfig(r=8, target_modules=places, lora_dropout=0.0, fan_in_fan_out=True)
    model = get_peft_model(base, settings).eval()
    ids, canary = _ids(base, (4, 32)), _ids(base, _ROWS)
    sites = tuple(f"transformer.{place}" for place in places)

    def make() -> Subject:
        still = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        own = copy.deepcopy(model, still)
        trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
        adam = torch.optim.Adam(trained, lr=_LORA_RATE)

        def edit() -> list[Tensor]:
            adam.zero_grad()
            own(input_ids=ids, labels=ids).loss.backward()
            adam.step()
            return [parameter.grad for parameter in trained if parameter.grad is not None]

        return Subject(own, tuple(f"base_model.model.{site}" for site in sites), edit, canary)

    return make


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=26,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


_LLAMA_SITES: Final = tuple(
    f"model.layers.{block}.mlp.{layer}" for block in (21, 23) for layer in ("up_proj", "down_proj")
)

LOOPS: tuple[Workload, ...] = (
    Workload("mend260k", "the demo's 260k BLIP2-OPT with MEND, five questions after each edit", 30, mend260k, CONTROL),
    Workload(
        "mend_gpt2",
        "GPT-2-small shape, MEND at the MLPs of the last two blocks, 1x32 tokens; four prompts after each edit",
        100,
        mend_gpt2,
        CONTROL,
    ),
    Workload(
        "rome30",
        "GPT-2-small shape, ROME: 30 steps for the value, 4x16 tokens; one c_proj",
        150,
        partial(_key_value, Rome.for_model, Search(steps=30, enough=0.0), {}),
        CONTROL,
    ),
    Workload(
        "memit5",
        "GPT-2-small shape, MEMIT: 25 steps for the value, 4x16 tokens; one solve in each of five layers",
        240,
        partial(_key_value, Memit.for_model, Search(steps=25, enough=0.0), {"layers": (3, 4, 5, 6, 7)}),
        CONTROL,
    ),
    Workload("lora", "GPT-2-small shape, one Adam step of LoRA of rank 8, 4x32 tokens; six layers", 100, lora, CONTROL),
    Workload(
        "llama1b4",
        "Llama shape of 1.4 billion parameters in bfloat16, 1x8 tokens, one gradient step; up_proj and down_proj of two"
        " of 26 blocks",
        200,
        partial(language_model, _llama, _LLAMA_SITES, (1, 8), 1),
        CONTROL,
    ),
)
"""FT's 25 steps are ``gpt2_ft25``."""
