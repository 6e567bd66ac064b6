"""Text without the folders that people live in: they tell who made a run, and are of no use to anyone else."""

from __future__ import annotations

import re
from typing import Final

_HOMES: Final = re.compile(
    r"(?<![\w./\\~])(?:(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s'\"]+|/root)(?=[/\\'\",;:)\s]|$)"
)


def homeless(text: str) -> str:
    """`text` with ``~`` for somebody's home, wherever a path begins in it."""
    return _HOMES.sub("~", text)
