"""Where the tracer has to step aside, because torch rounds differently while any dispatch mode is entered.

Under a mode torch takes every tensor for one that might be a subclass. Singular values and eigenvalues alone are then
computed together with their vectors, and the backwards of a few functions take another way. Over all samples of torch's
own operator database no others differ (`tests/oracle/test_tracer_operators.py`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from stabilitylab.watching.own_work import leave_function_stack

_VALUES_ONLY: Final = frozenset(
    {
        torch.linalg.svdvals,
        torch.linalg.eigvalsh,
        torch.linalg.eigvals,
        torch.linalg.cond,
        torch.linalg.matrix_norm,
        torch.linalg.norm,
        torch.linalg.matrix_rank,
        torch.norm,
        Tensor.norm,
        torch.nuclear_norm,
    }
)
_ANOTHER_WAY_BACK: Final = frozenset(
    {torch.prod, Tensor.prod, torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_, torch.linalg.lstsq}
)


def compiler() -> Any:
    """What the compiler tells when it begins. Takes a second or two when it is called first in a process."""
    from torch._dynamo.callback import callback_handler

    return callback_handler


class Traced(Protocol):
    """A tracer, as far as it is told to step aside."""

    def aside(self) -> AbstractContextManager[Any]:
        """Not entered meanwhile."""

    stopped: str

    def stop(self, why: str) -> None:
        """Look at nothing more in this edit."""

    def leave(self, why: str) -> None:
        """No longer entered for the rest of the edit, from now on or as soon as that may be."""

    def sweep(self) -> None:
        """Leave this thread, if it should have been left before and could not."""


class StepAside(TorchFunctionMode):
    """Calls functions of torch as they are; those that would be rounded differently, without the tracer."""

    def __init__(self, tracer: Traced) -> None:
        super().__init__()
        self._tracer = tracer
        self._thread = -1
        self._compiler = compiler()

    def __enter__(self) -> StepAside:
        self._thread = threading.get_ident()
        torch._C._push_on_torch_function_stack(self)
        # What is compiled here would be compiled anew later, when this mode is no longer entered.
        self._compiler.register_start_callback(self._compiling)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave, wherever in the stack it is by now: a mode that the user entered meanwhile stays entered. Left from
        another thread, it only passes calls on.
        """
        with contextlib.suppress(ValueError):  # where the compiler was reset meanwhile
            self._compiler.remove_start_callback(self._compiling)
        self._take_out()

    def _take_out(self) -> None:
        if self._thread == threading.get_ident():
            leave_function_stack(self)

    def _compiling(self, *_: object) -> None:
        """The compiler begins. It looks at which modes are entered only after this."""
        # The tracer may not leave here: the compiler puts back what it found entered.
        if self._thread == threading.get_ident():
            self._tracer.stop("torch.compile is in use")
            self._take_out()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func` itself."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler traces this very line, so the graph stays the user's
            return func(*args, **kwargs)
        self._tracer.sweep()
        if func in _ANOTHER_WAY_BACK and torch.is_grad_enabled() and _is_differentiated(func, args, kwargs):
            self._tracer.leave(f"the backward of {func.__name__} is computed in another way under a tracer")
        if func in _VALUES_ONLY or self._tracer.stopped:
            with self._tracer.aside():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_differentiated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    if "masked_fill" in func.__name__:  # by a number it is the same
        given = given[2:]
    return any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(given))
