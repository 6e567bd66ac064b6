"""Tiny random decoders, and requests located in them by hand, for ROME, MEMIT and AlphaEdit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from stabilitylab.editors.base import Batch, Located

WORDS, LAYERS = 60, 4


def llama() -> nn.Module:
    torch.manual_seed(5)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, initializer_range=0.3, **shape))
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # or no hidden state could make it sure of a word
    return model


def gpt2() -> nn.Module:
    """With dropout, in training mode: an edit must not draw from the user's generator."""
    torch.manual_seed(5)
    shape = {"n_embd": 16, "n_inner": 24, "n_layer": LAYERS, "n_head": 2}
    config = GPT2Config(vocab_size=WORDS, n_positions=32, initializer_range=0.3, **shape)
    return GPT2LMHeadModel(config).train()


def opt() -> nn.Module:
    """Its MLPs see all tokens of all rows as one list."""
    torch.manual_seed(5)
    shape = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=WORDS, word_embed_proj_dim=16, max_position_embeddings=32, init_std=0.3, **shape)
    return OPTForCausalLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}


def locate(request: dict[str, Any]) -> Located:
    """`prompt`, whose last word is the subject's, and the word `target`: bare and behind two prefixes, right-padded."""
    prefixes: list[list[int]] = [[], [7, 8], [9]]
    rows = [[*prefix, *request["prompt"], request["target"]] for prefix in prefixes]
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    subject = torch.tensor([len(row) - 2 for row in rows])
    labels = torch.full_like(ids, -100)
    labels[torch.arange(3), subject + 1] = request["target"]
    kept = {"input_ids": torch.tensor([[*request["prompt"], 2, 3]])}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Located(batch, subject, kept, torch.tensor([len(request["prompt"]) - 1]))


def requests(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(4, WORDS, (n, 6), generator=generator).tolist()
    return [{"prompt": words[:5], "target": words[5]} for words in drawn]


class Texts:
    """Ordinary text, if random: `rows` per batch, the second half of them shorter, on either side."""

    def __init__(self, batches: int = 30, rows: int = 4, width: int = 12) -> None:
        self.batches, self.rows, self.width = batches, rows, width

    def texts(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(2)
        for number in range(self.batches):
            ids = torch.randint(4, WORDS, (self.rows, self.width), generator=generator)
            mask = torch.ones_like(ids)
            gap = slice(0, 5) if number % 2 else slice(self.width - 5, self.width)
            mask[self.rows // 2 :, gap] = 0
            yield {"input_ids": ids, "attention_mask": mask}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the tensors that are no longer what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def loss(model: nn.Module, located: Located) -> float:
    with torch.no_grad():
        return float(model.eval()(**located.batch).loss)


def answered(model: nn.Module, located: Located) -> bool:
    """Whether the wanted word has the highest logit in the row without a prefix."""
    with torch.no_grad():
        said = model.eval()(**located.batch).logits[0, located.subject[0]].argmax()
    return bool(said == located.batch["labels"][0, located.subject[0] + 1])


def matrix(model: nn.Module, site: str) -> Tensor:
    """A copy of a layer's weight as [outputs, inputs], float64."""
    module: Any = model.get_submodule(site)
    weight = module.weight.detach().double()
    return (weight.T if type(module).__name__ == "Conv1D" else weight).clone()


def caught(model: nn.Module, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """(input, output) of a module in a whole forward, [rows, tokens, units], float64; a second way to see them."""
    found: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        found.extend([args[0], output[0] if isinstance(output, tuple) else output])

    handle = model.get_submodule(name).register_forward_hook(catch)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    rows = batch["input_ids"].shape[0]
    entered, left = (each.reshape(rows, -1, each.shape[-1]).double() for each in found)
    return entered, left


def average(rows: Tensor) -> Tensor:
    """Of three rows, the first of which counts twice."""
    assert len(rows) == 3
    return 0.5 * rows[0] + 0.25 * rows[1] + 0.25 * rows[2]
