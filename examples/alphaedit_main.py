"""A script of the shape that MEMIT and AlphaEdit have: ``apply_<method>_to_model``, and state in the variables of main.

    python examples/alphaedit_main.py runs/alphaedit
    stabilitylab check runs/alphaedit

The three lines that watch it are marked. The method is AlphaEdit's closed form (Fang et al., arXiv 2410.02355, section
3) on one layer of a small GPT-2 with random weights; keys and values are random too, so that nothing has to be fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import stabilitylab as sl

LAYER = "transformer.h.1.mlp.c_proj"
WIDTH, HIDDEN, WORDS = 24, 96, 50


def projection(keys: Tensor, share: float) -> Tensor:
    """Onto the directions that `keys`, [tokens, inputs], use least: [inputs, inputs]."""
    vectors = torch.linalg.eigh(keys.T @ keys / keys.shape[0]).eigenvectors
    free = vectors[:, : int(share * vectors.shape[1])]
    return free @ free.T


def apply_AlphaEdit_to_model(
    model: nn.Module, tok: object, requests: list[dict[str, Tensor]], cache_c: Tensor, P: Tensor
) -> tuple[nn.Module, Tensor]:
    """Write the requests' values at their keys, within the null space. cache_c: grows in place, [inputs, inputs]."""
    weight = model.get_parameter(f"{LAYER}.weight")  # GPT-2's Conv1D: [inputs, outputs]
    keys = torch.stack([request["key"] for request in requests], dim=1)
    residual = torch.stack([request["value"] for request in requests], dim=1) - weight.T @ keys
    system = P @ (keys @ keys.T + cache_c) + torch.eye(HIDDEN)
    update = torch.linalg.solve(system, P @ keys @ residual.T)
    with torch.no_grad():
        weight += update
    cache_c += keys @ keys.T
    return model, cache_c


def main(run: Path) -> None:
    """Make all edits under a monitor that writes the run `run`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.requires_grad_(False)
    P = projection(torch.randn(2_000, HIDDEN), share=0.6)
    cache_c = torch.zeros(HIDDEN, HIDDEN)
    canary = {"input_ids": torch.randint(WORDS, (4, 12))}

    monitor = sl.attach(model, sites=LAYER, run=run, editor={"P": P, "cache_c": cache_c}, canary=canary)  # 1
    apply = monitor.wrap(apply_AlphaEdit_to_model)  # 2
    for _ in range(12):
        requests = [{"key": torch.randn(HIDDEN), "value": 0.1 * torch.randn(WIDTH)} for _ in range(2)]
        model, cache_c = apply(model, None, requests, cache_c=cache_c, P=P)
    monitor.close()  # 3
    print(monitor.diagnosis())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/alphaedit"))
