"""The door for files that others wrote and that hold text: JSON and the like, read whole or refused. No torch.

What is raised here is OSError, or ValueError with the reason: whoever reads says what the file was to be.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

MOST_BYTES: Final = 16 << 20
"""Of a file of settings; who reads data says how much."""
MOST_PARTS: Final = 10_000_000
"""Values that JSON may hold: each takes many times the room that it has in the file."""


def begins_otherwise(path: Path, begin: bytes, *, or_empty: bool) -> bool:
    """Whether there is something at `path` that is no file that begins so, in whatever case (nor, `or_empty`, an empty
    one): what is written there would replace what somebody else made, such as a run. Raises OSError.
    """
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        return True
    with path.open("rb") as held:
        found = held.read(len(begin))
    return found.lower() != begin.lower() and not (or_empty and not found)


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """A regular file's text. Raises OSError; ValueError for a pipe, what is too large, and what is no UTF-8."""
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a folder the system says what it is
        raise ValueError("it is no file")
    with path.open("rb") as held:
        found = held.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds; NaN and infinities as Python reads them. Raises OSError and ValueError."""
    text = read_text(path, most_bytes)
    expect_few_parts(text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def expect_few_parts(text: str) -> None:
    """Raises ValueError where JSON text may hold more than `MOST_PARTS` values."""
    if sum(map(text.count, ",[{")) > MOST_PARTS:
        raise ValueError(f"it holds more than {MOST_PARTS:,} values")
