"""How far a run has come, beside its file: a log that was cut or damaged since is then known to be. No torch.

SQLite reads a log as far as it is whole, and says nothing of what came after. So the number of the last edit that was
committed is kept in a file of its own, written after each commit and gone when the run is closed: where it says more
than the run holds, edits that were acknowledged are missing. It is never in front of the run: whoever reads it before
the run finds all of these edits there.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

ENDING: Final = "-rows"
_DIGITS: Final = 20
_MOST: Final = 1 << 53


def acknowledge(file: Path, edit: int) -> None:
    """Edit number `edit` is in the run `file`. Where that can't be written, less is known later, and that is all."""
    with contextlib.suppress(OSError):
        handle = os.open(f"{file}{ENDING}", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(handle, f"{edit:0{_DIGITS}d}\n".encode("ascii"))
        finally:
            os.close(handle)


def acknowledged(file: Path) -> int:
    """The last edit that was acknowledged of the run `file`, −1 where nothing says it. Ask before the run is read."""
    beside = _beside(file)
    try:
        if not stat.S_ISREG(beside.lstat().st_mode):  # a pipe would be waited for
            return -1
        with beside.open("rb") as held:
            words = held.read(_DIGITS + 1)
    except OSError:
        return -1
    digits = words.removesuffix(b"\n")
    return int(digits) if len(digits) == _DIGITS and digits.isdigit() and int(digits) <= _MOST else -1


def forget(file: Path) -> None:
    """The run is whole in its one file."""
    with contextlib.suppress(OSError):
        _beside(file).unlink()


def missing_says(last: int, known: int) -> str:
    """In words: the run ends at edit `last`, and `known` was acknowledged."""
    first = last + 1
    which = f"edit {known}" if first == known else f"edits {first} to {known}"
    return f"{which} had been recorded and can't be read any more: the run's log was cut, damaged or removed"


def _beside(file: Path) -> Path:
    return file.with_name(file.name + ENDING)
