"""Work of ours that runs inside a user's edit: modes of ours neither see it nor change how torch carries it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack


class OwnMode:
    """What a dispatch mode of ours is, besides being one."""


def own_work() -> contextlib.AbstractContextManager[None]:
    """Modes of ours are not entered inside. While a compiler traces our hooks nothing happens: it would break off."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() == 0:
        return contextlib.nullcontext()
    return _without_own_modes()


@contextlib.contextmanager
def _without_own_modes() -> Iterator[None]:
    # By the stack of this thread alone: autograd runs hooks in others, with the modes of the one that called it.
    modes = [_pop_torch_dispatch_stack(None) for _ in range(_len_torch_dispatch_stack())][::-1]
    _push([mode for mode in modes if not isinstance(mode, OwnMode)])
    try:
        yield
    finally:
        for _ in range(_len_torch_dispatch_stack()):
            _pop_torch_dispatch_stack(None)
        _push(modes)


def leave_function_stack(mode: Any) -> None:
    """Take a function mode out of this thread's stack, wherever in it: those that were entered since stay entered."""
    height = torch._C._len_torch_function_stack()
    place = next((at for at in range(height)[::-1] if torch._C._get_function_stack_at(at) is mode), None)
    if place is not None:
        above = [torch._C._pop_torch_function_stack() for _ in range(height - place)][::-1]
        for entered in above[1:]:
            torch._C._push_on_torch_function_stack(entered)


def _push(modes: list[Any]) -> None:
    for mode in modes:
        _push_on_torch_dispatch_stack(mode)


def is_under_a_mode_of_the_users() -> bool:
    """Whether a dispatch mode that is none of ours would see what is computed here."""
    modes = range(_len_torch_dispatch_stack())
    return any(not isinstance(torch._C._get_dispatch_stack_at(place), OwnMode) for place in modes)
