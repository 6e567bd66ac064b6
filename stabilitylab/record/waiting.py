"""What is to be written and can't be yet (a full disk, a reader that holds the file): kept in order, and tried again.

So that an edit is never held up, and its row is lost only where memory would be. What is lost is said.
"""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from stabilitylab.record.packed import as_packed
from stabilitylab.record.readings import EditRow

MOST_BYTES: Final = 64 << 20
"""Of what waits."""
AT_ONCE: Final = 200
"""Things that have waited and are written in one transaction, in milliseconds."""
REST_SECONDS: Final = 0.3
"""For which nothing is tried after a reader has held a write up, so that the many writes of an edit wait as one."""
_LEAST_BYTES: Final = 1_000
"""That a thing counts for, whatever it is."""
_PAUSE: Final = 0.02
"""Seconds between two tries at the end."""


@dataclass(frozen=True)
class _Write:
    do: Callable[[], object]
    edits: tuple[int, ...]
    size: int


class Waiting:
    """A queue of writes. lost: the edits whose rows are not in the run and never will be, each with the reason."""

    def __init__(self, together: Callable[[], AbstractContextManager[None]]) -> None:
        """together: what is written inside of it is written all or not at all."""
        self.lost: dict[int, str] = {}
        self._together = together
        self._writes: deque[_Write] = deque()
        self._bytes = 0
        self._rests_until = 0.0
        self._why = ""

    def __len__(self) -> int:
        return len(self._writes)

    def put(self, do: Callable[[], object], rows: Sequence[EditRow] = ()) -> bool:
        """Write, after all that waits. rows: of edits, that are in it. Returns whether nothing waits any more.

        Raises what makes it impossible, once all that can be kept is kept; a reader that holds the file is no error.
        """
        size = _LEAST_BYTES + sum(as_packed(row.readings).flat.nbytes for row in rows)
        self._writes.append(_Write(do, tuple(row.edit for row in rows), size))
        self._bytes += size
        try:
            if time.monotonic() >= self._rests_until:
                self._write_some()
        except Exception as error:
            if not _will_pass(error):
                raise
        finally:
            if self._writes and self._bytes > MOST_BYTES:
                self._lose(self._writes.pop(), self._why)
        return not self._writes

    def _write_some(self) -> None:
        """Write the first of what waits: at once, where it is more than one; where that fails, the first alone. Raises
        what stops it.
        """
        some = [*itertools.islice(self._writes, AT_ONCE)]
        try:
            if len(some) > 1:
                try:
                    with self._together():
                        for each in some:
                            each.do()
                except Exception as error:
                    if _will_pass(error):
                        raise
                    some = some[:1]
            if len(some) == 1:
                some[0].do()
        except Exception as error:
            self._why = str(error)
            if _will_pass(error):
                self._rests_until = time.monotonic() + REST_SECONDS
            elif not isinstance(error, OSError | sqlite3.OperationalError):  # that one can never be written
                self._lose(self._writes.popleft(), self._why)
            raise
        for each in some:
            self._writes.popleft()
            self._bytes -= each.size

    def finish(self, patience: float) -> None:
        """Write all that waits, or give it up: what only has to be waited for after so many seconds."""
        until = time.monotonic() + patience
        while self._writes:
            try:
                self._write_some()
            except Exception as error:
                if _will_pass(error):
                    if time.monotonic() < until:
                        time.sleep(_PAUSE)
                        continue
                    while self._writes:  # each would be waited for in vain
                        self._lose(self._writes.popleft(), str(error))
                elif self._writes and isinstance(error, OSError | sqlite3.OperationalError):
                    self._lose(self._writes.popleft(), str(error))  # what comes after it may still be written

    def _lose(self, write: _Write, why: str) -> None:
        self._bytes -= write.size
        self.lost.update(dict.fromkeys(write.edits, why))


def _will_pass(error: Exception) -> bool:
    """Whether it is only that someone reads the file at this moment."""
    return isinstance(error, sqlite3.OperationalError) and ("locked" in str(error) or "busy" in str(error))


def lost_says(lost: dict[int, str]) -> list[str]:
    """A sentence for each stretch of edits that were lost for one reason."""
    stretches: list[tuple[int, int, str]] = []
    for edit, why in sorted(lost.items()):
        if stretches and stretches[-1][1:] == (edit - 1, why):
            stretches[-1] = (stretches[-1][0], edit, why)
        else:
            stretches.append((edit, edit, why))
    return [
        f"edit {first} was not recorded: {why}"
        if first == last
        else f"edits {first} to {last} were not recorded: {why}"
        for first, last, why in stretches
    ]
