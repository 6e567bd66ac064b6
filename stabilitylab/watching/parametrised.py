"""A layer whose weight ``torch.nn.utils.parametrize`` computes with parameters of its own, as LoRA is also written; or
the hook of ``torch.nn.utils.weight_norm``, before each forward, from a norm and a direction.

What an edit moves there is the weight that comes out. Where nothing but the original parameter can move, that one is
watched instead (see `sites`): it is what an edit and an optimizer write to.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Final

import torch
from torch import Tensor, nn

_PARTS: Final = "parametrizations."
_PARTS_OF_NORM: Final = "weight_"

_OWN: Final = (dict, list, set)
"""What a module's attributes are kept in: what a transform writes to must be the copy's own."""


def _list_of(module: nn.Module) -> nn.Module | None:
    """What computes the weight, one transform after the other; None for a layer whose weight is its own."""
    if "parametrizations" not in module._modules:  # a ScriptModule's have no `get`
        return None
    lists = module._modules["parametrizations"]
    return lists._modules["weight"] if lists is not None and "weight" in lists._modules else None


def _norm_of(module: nn.Module) -> Any:
    """The hook that computes the weight, where that is how its norm is kept apart; else None. Known by its attributes:
    torch means to drop it.
    """
    if "weight_g" not in module._parameters:
        return None
    hooks = (hook for hook in module._forward_pre_hooks.values() if hasattr(hook, "compute_weight"))
    return next((hook for hook in hooks if getattr(hook, "name", None) == "weight"), None)


def place_of_parts(module: nn.Module) -> str:
    """What the names of such a layer's parts begin with, inside the layer."""
    return _PARTS if _norm_of(module) is None else _PARTS_OF_NORM


def _originals(held: nn.Module) -> list[Tensor]:
    """What the first transform is given."""
    return [tensor for tensor in held._parameters.values() if tensor is not None]


def original_of(module: nn.Module) -> Tensor | None:
    """The parameter that the weight of such a layer is computed from, with others: the largest of these; None for other
    layers.
    """
    if _norm_of(module) is not None:
        return module._parameters["weight_v"]
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
    norm = _norm_of(module)
    if norm is not None:
        weight: Tensor = norm.compute_weight(module)
        return weight.detach().clone()
    held = _list_of(module)
    assert held is not None
    made = [tensor.detach() for tensor in _originals(held)]
    with torch.random.fork_rng(devices=[made[0].device] if made[0].is_cuda else []):
        for step in held.children():
            made = [_twin(step).forward(*made)]
    return made[0].detach().clone()


def _twin(module: nn.Module) -> Any:
    """A module for evaluation with the same parameters, buffers of its own and no hooks. Not a deep copy: what a
    transform refers to, which may be the whole model, is not copied.
    """
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(held) for name, held in vars(module).items() if isinstance(held, _OWN)})
    twin._buffers = {name: None if held is None else held.clone() for name, held in module._buffers.items()}
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    twin.training = False
    return twin
