"""Weights that are elsewhere while their layer rests: accelerate's offload to the host or the disk, known by its hook.

The layer then holds a placeholder on the meta device, and whatever is written to that is lost.
"""

from __future__ import annotations

from torch import Tensor, nn


def values_of(module: nn.Module, leaf: str) -> Tensor | None:
    """The values of a parameter whose placeholder is on the meta device; None where nothing tells where they are.

    On the host it is the tensor that the next forward takes; from a disk it is read anew at each call.
    """
    hook = getattr(module, "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):  # one hook, or several in a row
        held = getattr(each, "weights_map", None)
        try:
            found = None if held is None else held[leaf]
        except (KeyError, OSError):
            continue
        if isinstance(found, Tensor) and not found.is_meta:
            return found
    return None


def written_in_vain(module: nn.Module, leaf: str, before: tuple[int, int] | None) -> bool:
    """Whether the placeholder of a parameter was written to. before: what `mark_of` said when the edit began."""
    now = mark_of(module, leaf)
    if now is None:
        return False
    return now[1] > (before[1] if before is not None and before[0] == now[0] else 0)


def mark_of(module: nn.Module, leaf: str) -> tuple[int, int] | None:
    """Which placeholder a parameter has, and how often that was written to; None where it has none."""
    parameter = module._parameters.get(leaf)
    return None if parameter is None or not parameter.is_meta else (id(parameter), parameter._version)
