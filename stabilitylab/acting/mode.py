"""A dispatch mode that sees each operation after it ran and changes nothing: how it is entered, and how it is left.

Knows nothing of values: what is done with an operation is `after`'s business.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Final

import torch
from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitylab.watching.own_work import OwnMode

_WRONGLY_HANDED: Final = "Expected a value of type 'Tensor'"
"""What torch says of a number in place of a tensor. TorchScript's constants come as such to any dispatch mode."""


class Onlooker(TorchDispatchMode, OwnMode):  # type: ignore[no-untyped-call]
    """Looks at what runs in this thread, and in autograd's for it, while it is entered. A failure of ours ends the
    looking (`failure` says why), never the operation.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.failure = ""
        self.stopped = ""
        """Why it stepped aside for the rest of the edit."""
        self.seconds = 0.0
        """Spent in here."""
        self.is_over = False
        """Whether the edit is."""
        self._thread = -1

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """An operation has run. Here nothing is done with it."""

    # What torch itself does besides, to enter a mode, is to set flags by which the compiler tells that it is inside of
    # one, and to put them back when it is left: wrongly, where the user's modes were entered in between and stay.

    def __enter__(self) -> Onlooker:
        self._thread = threading.get_ident()
        if not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
            _be_known_to_higher_order_operators(type(self))
        _push_on_torch_dispatch_stack(self)
        return self

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Not entered meanwhile."""
        above = self._take_out()
        try:
            yield
        finally:
            self._put_in(above)

    def stop(self, why: str) -> None:
        """Look at nothing more in this edit."""
        self.stopped = self.stopped or why

    def leave(self, why: str) -> None:
        """No longer entered for the rest of the edit, from now on or as soon as that may be."""
        self.stop(why)
        self.sweep()

    def _take_out(self) -> list[Any] | None:
        """Out of the stack of modes, wherever in it; returns the modes that were entered since, which stay entered.
        None where it is not in this thread's, or an operation that it was asked for is still running.
        """
        if self._thread != threading.get_ident():
            return None
        height = torch._C._len_torch_dispatch_stack()
        place = next((at for at in range(height)[::-1] if torch._C._get_dispatch_stack_at(at) is self), None)
        if place is None:
            return None
        above = [_pop_torch_dispatch_stack(None) for _ in range(height - place - 1)][::-1]
        _pop_torch_dispatch_stack(None)
        for mode in above:
            _push_on_torch_dispatch_stack(mode)
        return above

    def _put_in(self, above: list[Any] | None) -> None:
        """Back, below the same modes."""
        if above is None:
            return
        for _ in above:
            _pop_torch_dispatch_stack(None)
        for mode in (self, *above):
            _push_on_torch_dispatch_stack(mode)

    def __exit__(self, *exception: Any) -> None:
        """Leave, wherever in the stack it is by now. Left from another thread, it can only fall silent, until that
        thread calls torch again.
        """
        self.is_over = True
        if self._thread != threading.get_ident():
            self.failure = self.failure or "the edit was left in another thread"
        self._take_out()

    def sweep(self) -> None:
        """Leave this thread's stack, if it should have been left before and could not."""
        if (self.is_over or self.stopped) and _may_leave():
            self._take_out()

    # torch.compile is as without us: what it makes runs as a few operations that are not looked into.

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """See `TorchDispatchMode`."""
        return True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """The same, for releases of torch that ask so."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func` itself, then a look at what it gave."""
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if _WRONGLY_HANDED not in str(error):
                raise
            result = func(*_handed_rightly(func, args), **(kwargs or {}))
        if self.failure or self.stopped:
            return result
        began = time.perf_counter()
        try:
            self.after(func, args, kwargs or {}, result)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
        self.seconds += time.perf_counter() - began
        return result


def _handed_rightly(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments of a call with a tensor wherever a number stands for one."""
    wants = [isinstance(argument.type, torch._C.TensorType) for argument in func._schema.arguments]
    return [
        torch.tensor(given) if tensor and isinstance(given, int | float | complex) else given
        for given, tensor in zip(args, wants, strict=False)
    ]


def _be_known_to_higher_order_operators(mode: type) -> None:
    """Older releases of torch run those under no mode that they don't know."""

    def pass_on(operator: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    known: Mapping[str, Any] = torch._ops._higher_order_ops
    for operator in known.values():
        if mode not in operator.python_key_mode_table:
            operator.py_impl(mode)(functools.partial(pass_on, operator))


def _may_leave() -> bool:
    """Whether nobody around keeps by heart that a mode is entered, to have it so again: the compiler does, and the
    transforms of torch.func.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("torch._dynamo"):
            return False
        frame = frame.f_back
    return True
