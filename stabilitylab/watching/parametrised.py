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
    """What computes the weight, one transform after the other; None where it is no parametrization of one tensor."""
    if "parametrizations" not in module._modules:  # a ScriptModule's have no `get`
        return None
    lists = module._modules["parametrizations"]
    held = None if lists is None or "weight" not in lists._modules else lists._modules["weight"]
    return held if held is not None and isinstance(held._parameters.get("original"), Tensor) else None


def original_of(module: nn.Module) -> Tensor | None:
    """The parameter that the weight of such a layer is computed from, with others; None for other layers."""
    found = _list_of(module)
    if found is None or not any(True for step in found.children() for _ in step.parameters()):
        return None
    return found._parameters["original"]


@torch.no_grad()
def computed_weight(module: nn.Module) -> Tensor:
    """The weight that such a layer computes with in evaluation, in memory of its own.

    By copies of the transforms that share their parameters, so that buffers, modes and hooks are left as they are.
    Raises what a transform raises.
    """
    found, weight = _list_of(module), original_of(module)
    assert found is not None
    assert weight is not None
    shared = {id(tensor): tensor for tensor in found.parameters()}
    made: Tensor = weight.detach()
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        for step in found.children():
            twin = copy.deepcopy(step, dict(shared)).eval()
            for part in twin.modules():
                vars(part).update({name: OrderedDict() for name in _HOOKS})
            made = twin.forward(made)
    return made.detach().clone() if made.data_ptr() == weight.data_ptr() else made.detach()
