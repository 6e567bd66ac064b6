"""A script as the MEMIT and ROME repositories have it: ``apply_memit_to_model``, evaluated, and the weights put back.

    python examples/memit_script.py runs/memit
    stabilitylab check runs/memit

The two lines that watch it are marked. The method is MEMIT's closed form (Meng et al., arXiv 2210.07229, section 4.3)
on two layers of a small GPT-2 with random weights; its targets are random too, so that nothing has to be fetched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import stabilitylab as sl

LAYERS = ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
WIDTH, WORDS, WEIGHT = 24, 50, 20.0
Request = dict[str, Any]


@contextmanager
def inputs_of(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What enters `layer` in each forward: [batch, positions, inputs]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def keys_at(model: nn.Module, layer: str, ids: Tensor) -> Tensor:
    """The layer's inputs at each row's last token: [inputs, rows]."""
    with inputs_of(model, layer) as seen:
        model(input_ids=ids)
    return seen[0][:, -1].T


@torch.no_grad()
def second_moment(model: nn.Module, layer: str) -> Tensor:
    """The mean of k kᵀ over random text: [inputs, inputs]."""
    with inputs_of(model, layer) as seen:
        model(input_ids=torch.randint(WORDS, (32, 16)))
    keys = seen[0].flatten(end_dim=-2)
    return keys.T @ keys / len(keys)


def apply_memit_to_model(
    model: nn.Module, tok: object, requests: list[Request], hparams: dict[str, Tensor], copy: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Spread the residuals over the layers; returns the old weights too. hparams: the second moment of each layer."""
    ids = torch.stack([request["prompt"] for request in requests])
    residual = torch.stack([request["residual"] for request in requests], dim=1)
    old = {}
    for left, layer in zip(range(len(LAYERS), 0, -1), LAYERS, strict=True):
        weight, keys = model.get_parameter(f"{layer}.weight"), keys_at(model, layer, ids)
        system = WEIGHT * hparams[layer] + keys @ keys.T
        old[f"{layer}.weight"] = weight.detach().clone()
        with torch.no_grad():
            weight += torch.linalg.solve(system, keys @ (residual / left).T)  # GPT-2's Conv1D: [inputs, outputs]
    return model, old


def main(run: Path) -> None:
    """Make each edit from the original weights, under a monitor that writes the run `run`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.requires_grad_(False)
    hparams = {layer: second_moment(model, layer) for layer in LAYERS}
    canary = {"input_ids": torch.randint(WORDS, (4, 12))}

    with sl.attach(model, sites=LAYERS, run=run, canary=canary) as monitor:  # 1
        apply = monitor.wrap(apply_memit_to_model, label=lambda model, tok, requests, hparams: requests[0]["name"])  # 2
        for case in range(10):
            prompt = torch.randint(WORDS, (8,))
            requests = [{"name": f"case {case}", "prompt": prompt, "residual": 5e-4 * torch.randn(WIDTH)}]
            edited, weights_copy = apply(model, None, requests, hparams)
            edited(input_ids=prompt[None])  # where the script evaluates the edit
            with torch.no_grad():
                for name, old in weights_copy.items():
                    model.get_parameter(name)[...] = old
    print(monitor.diagnosis())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/memit"))
