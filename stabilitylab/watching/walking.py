"""All modules and tensors of a model, in torch's own order, in a tenth of the time that its nested generators take.

An edit asks several times what the model is made of: it may have been wrapped, or have got adapters, in between.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

NamedModules = list[tuple[str, nn.Module]]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What ``model.modules()`` yields."""
    return [module for _, module in named_modules_of(model)]


def named_modules_of(model: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None) -> NamedModules:
    """What ``model.named_modules(seen, prefix)`` yields."""
    seen = set() if seen is None else seen
    found: NamedModules = []
    if model not in seen:
        _walk(prefix, model, seen, found)
    return found


def _walk(name: str, module: nn.Module, seen: set[nn.Module], found: NamedModules) -> None:
    seen.add(module)
    found.append((name, module))
    if not module._modules:
        return
    start = f"{name}." if name else ""
    for key, child in module._modules.items():
        if child is not None and child not in seen:
            if child._modules:
                _walk(start + key, child, seen, found)
            else:  # most of them, without a call
                seen.add(child)
                found.append((start + key, child))


def holding(named: Iterable[tuple[str, nn.Module]], attribute: str) -> NamedModules:
    """Those modules that have a tensor, or something else of their own, under this name."""
    return [
        each
        for each in named
        if attribute in each[1].__dict__ or attribute in each[1]._buffers or attribute in each[1]._parameters
    ]


def tensors_of(named: NamedModules) -> tuple[list[str | None], list[Tensor | None]]:
    """(all that a name of one is made of: nothing, its module's, its own; the tensors): the parameters of these modules
    and then their buffers, as often as they are held. Whoever looks again sees by it that all is as it was.
    """
    names: list[str | None] = []
    tensors: list[Tensor | None] = []
    for owner, module in named:
        held = module._parameters
        if held:
            names += (None, owner, *held.keys())
            tensors += held.values()
    for owner, module in named:
        kept = module._buffers
        if kept:
            names += (None, owner, *kept.keys())
            tensors += kept.values()
    return names, tensors


def named_tensors_of(named: NamedModules) -> list[tuple[str, Tensor]]:
    """What ``model.named_parameters()`` yields, and then what ``model.named_buffers()`` does, of `named_modules_of`."""
    parameters: list[tuple[str, Tensor]] = []
    buffers: list[tuple[str, Tensor]] = []
    # Each has its own record of what was met, as torch has: a tensor that is both is named twice.
    met_parameters: set[int] = set()
    met_buffers: set[int] = set()
    for owner, module in named:
        for held, met, found in (
            (module._parameters, met_parameters, parameters),
            (module._buffers, met_buffers, buffers),
        ):
            if held:
                start = f"{owner}." if owner else ""
                for leaf, tensor in held.items():
                    if tensor is not None and id(tensor) not in met:
                        met.add(id(tensor))
                        found.append((start + leaf, tensor))
    return parameters + buffers
