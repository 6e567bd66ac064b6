"""Ctrl-C waits while an edit is measured and recorded: it would leave half a measurement, and no row of the edit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


@dataclass
class _Held:
    """handler: the user's. signalled: what it will be called with. raised: whether an interrupt was caught."""

    handler: _Handler | None
    signalled: tuple[int, FrameType | None] | None = None
    raised: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first waits; who asks a second time means it."""
        if self.signalled is None:
            self.signalled = (number, frame)
        elif self.handler is not None:
            self.handler(number, frame)


class _Threads(threading.local):
    held: _Held | None = None


_threads = _Threads()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A Ctrl-C inside takes effect at the end."""
    if _threads.held is not None:
        yield
        return
    held = _threads.held = _Held(_handler())
    if held.handler is not None:
        signal.signal(signal.SIGINT, held.on_signal)
    try:
        yield
    finally:
        _threads.held = None
        if held.handler is not None:
            signal.signal(signal.SIGINT, held.handler)
    if held.signalled is not None and held.handler is not None:
        held.handler(*held.signalled)
    if held.raised:
        raise KeyboardInterrupt


def _handler() -> _Handler | None:
    """What Ctrl-C does now; None where that can't be changed from here, or nothing of Python's is called."""
    if threading.current_thread() is not threading.main_thread():
        return None
    found = signal.getsignal(signal.SIGINT)
    return found if callable(found) else None


def is_asked_for() -> bool:
    """Whether a Ctrl-C is waiting."""
    held = _threads.held
    return held is not None and (held.raised or held.signalled is not None)


def later() -> None:
    """A KeyboardInterrupt was caught: raise it when `held_back` is left; at once where nothing is held back."""
    if _threads.held is None:
        raise KeyboardInterrupt
    _threads.held.raised = True


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """What takes long: a Ctrl-C ends it at once, and takes effect for the user's loop when `held_back` is left."""
    held = _threads.held
    by_signal = held is not None and held.handler is not None
    if held is not None and by_signal:
        signal.signal(signal.SIGINT, held.handler)
    try:
        yield
    except KeyboardInterrupt:
        later()
    finally:
        if held is not None and by_signal:
            signal.signal(signal.SIGINT, held.on_signal)
