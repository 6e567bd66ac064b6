"""A layer whose weight ``torch.nn.utils.parametrize`` computes with parameters of its own, as LoRA is also written.

What an edit moves there is the weight that comes out. Where nothing but the original parameter can move, that one is
watched instead (see `sites`): it is what an edit and an optimizer write to.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Final

import torch
from torch import Tensor, nn

PLACE: Final = "parametrizations."
"""What the names of its parts begin with, inside the layer."""

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")


def _list_of(module: nn.Module) -> nn.Module | None:
    """What computes the weight, one transform after the other; None for a layer whose weight is its own."""
    if "parametrizations" not in module._modules:  # a ScriptModule's have no `get`
        return None
    lists = module._modules["parametrizations"]
    return lists._modules["weight"] if lists is not None and "weight" in lists._modules else None


def _originals(held: nn.Module) -> list[Tensor]:
    """What the first transform is given."""
    return [tensor for tensor in held._parameters.values() if tensor is not None]


def original_of(module: nn.Module) -> Tensor | None:
    """The parameter that the weight of such a layer is computed from, with others: the largest of these; None for other
    layers.
    """
    held = _list_of(module)
    originals = [] if held is None else _originals(held)
    if held is None or not originals:
        return None
    alone = len(originals) == 1 and not any(True for step in held.children() for _ in step.parameters())
    return None if alone else max(originals, key=Tensor.numel)


@torch.no_grad()
def computed_weight(module: nn.Module) -> Tensor:
    """The weight that such a layer computes with in evaluation, in memory of its own.

    By copies of the transforms that share their parameters, so that buffers, modes and hooks are left as they are.
    Raises what a transform raises.
    """
    held = _list_of(module)
    assert held is not None
    shared = {id(tensor): tensor for tensor in held.parameters()}
    made = [tensor.detach() for tensor in _originals(held)]
    devices = [made[0].device] if made[0].is_cuda else []
    with torch.random.fork_rng(devices=devices):
        for step in held.children():
            twin = copy.deepcopy(step, dict(shared)).eval()
            for part in twin.modules():
                vars(part).update({name: OrderedDict() for name in _HOOKS})
            made = [twin.forward(*made)]
    return made[0].detach().clone()
