"""Weights that are spread over processes: a DTensor's own part, over whom it is spread, and FSDP's states.

Told by what a tensor has, without an import of ``torch.distributed``. Measures nothing, and talks to no other process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.watching.walking import modules_of, named_modules_of


@dataclass(frozen=True, eq=False)
class Spread:
    """Over whom a tensor is spread. mesh: a DeviceMesh. dims: those of its dimensions along which processes hold
    different parts; along the others they hold the same.
    """

    mesh: Any
    dims: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """The same for tensors whose figures can be combined together."""
        return (self.mesh, self.dims)

    @property
    def device(self) -> torch.device:
        """Where its processes talk to each other."""
        return torch.device(self.mesh.device_type)

    @property
    def timeout(self) -> timedelta:
        """How long its processes wait for each other in a collective, as far as that can be read."""
        backend = self.mesh.get_group(0)._get_backend(self.device)
        known = getattr(getattr(backend, "options", None), "_timeout", None)
        return known if isinstance(known, timedelta) else timedelta(minutes=10)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of all processes that hold any of it, in order."""
        return tuple(sorted(self.mesh.mesh.flatten().tolist()))


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def spread_of(tensor: Tensor) -> Spread | None:
    """Over whom a DTensor is spread; None for any other tensor."""
    if not is_spread(tensor):
        return None
    placements: tuple[Any, ...] = tensor.placements  # type: ignore[attr-defined]
    parted = tuple(dim for dim, each in enumerate(placements) if not each.is_replicate())
    return Spread(tensor.device_mesh, parted)  # type: ignore[attr-defined]


def why_not_parts(tensor: Tensor) -> str | None:
    """Why the parts of a DTensor don't make up its values; None where they do."""
    if any(each.is_partial() for each in tensor.placements):  # type: ignore[attr-defined]
        return "it is a DTensor whose processes hold terms of a sum"
    return None


def part_of(tensor: Tensor) -> Tensor:
    """This process's own part of a DTensor, which may be empty; any other tensor itself. Shares the memory."""
    part: Tensor = tensor._local_tensor.detach() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return part


@torch.no_grad()
def whole_of(tensor: Tensor, part: Tensor | None = None) -> Tensor:
    """All of a DTensor, made of `part` in place of its own if given. Each of its processes must call it."""
    if part is not None:
        make: Any = type(tensor).from_local  # type: ignore[attr-defined]
        tensor = make(
            part,
            tensor.device_mesh,  # type: ignore[attr-defined]
            tensor.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


# -- FSDP1 (`FullyShardedDataParallel`) ---------------------------------------------------------------------------

FLATTENED: Final = (
    "FullyShardedDataParallel (FSDP1) keeps it as pieces of one flat vector, of which no process has the whole; "
    "expected fully_shard (FSDP2) in its place"
)


def flattened(model: nn.Module) -> str | None:
    """The name of a parameter of which FSDP1 has left no process the whole; None where there is none.

    It marks each parameter that it takes. Where nothing is sharded, as in one process, layers have theirs as ever.
    """
    named = named_modules_of(model)
    handles = [handle for _, module in named if (handle := getattr(module, "_handle", None)) is not None]
    whole = {
        id(module)
        for handle in handles
        if not getattr(handle, "uses_sharded_strategy", True)
        for module in handle.flat_param._modules
    }
    for owner, module in named:
        if id(module) not in whole:
            for leaf, parameter in module._parameters.items():
                if hasattr(parameter, "_fsdp_flattened"):
                    return f"{owner}.{leaf}" if owner else leaf
    return None


# -- FSDP2 (`fully_shard`) ----------------------------------------------------------------------------------------


def is_managed(module: nn.Module) -> bool:
    """Whether the module's parameters are FSDP's to gather and to let go of."""
    return "_is_fsdp_managed_module" in vars(module)


def _groups(module: nn.Module) -> list[Any]:
    """The groups of parameters that `fully_shard` lets this module manage; none for any other module."""
    state_of = getattr(module, "_get_fsdp_state", None)
    if state_of is None:
        return []
    state = state_of()
    several = getattr(state, "_fsdp_param_groups", None)
    return [group for group in several or [getattr(state, "_fsdp_param_group", None)] if group is not None]


def parameters_at_rest(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    """The DTensor of each parameter that FSDP manages, by (id of its module, name there).

    While FSDP has gathered a parameter, as after a forward without a backward, the module holds a copy in its place.
    """
    return {
        (id(parameter._module_info.module), parameter._module_info.param_name): parameter.sharded_param
        for module in modules_of(model)
        for group in _groups(module)
        for parameter in group.fsdp_params
    }


@contextlib.contextmanager
def left_as_gathered(model: nn.Module) -> Iterator[None]:
    """What FSDP gathers inside is let go of at the end: the next optimizer's step would not reach it."""
    apart = [module for module in modules_of(model) if (groups := _groups(module)) and all(map(_is_sharded, groups))]
    try:
        yield
    finally:
        for module in apart:
            if not all(map(_is_sharded, _groups(module))):
                module.reshard()  # type: ignore[operator]


def _is_sharded(group: Any) -> bool:
    return bool(group.is_sharded)
