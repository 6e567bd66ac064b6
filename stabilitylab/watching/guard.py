"""What is ours must never stop the user's loop: it runs under a guard, which says what failed and goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stabilitylab.watching.one_hook import logger

T = TypeVar("T")

NoteTaker = Callable[[str, str], None]
"""(kind, what was not measured and why)."""


class Guard:
    """Runs what may fail. Each thing's failure is logged and noted once; it is tried again the next time."""

    def __init__(self, note: NoteTaker) -> None:
        self._note = note
        self._failed: set[str] = set()

    def __call__(self, what: str, action: Callable[[], T]) -> T | None:
        """`action()`; None when it raised an Exception, or would have ended the program."""
        try:
            return action()
        except (Exception, SystemExit) as error:
            if what not in self._failed:
                self._failed.add(what)
                says = f"{what} failed: {type(error).__name__}: {error}"
                logger.warning("stabilitylab: %s (the edit loop goes on)", says)
                self._note("probe-off", says)
            return None
