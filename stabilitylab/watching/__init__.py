"""Watching: from a model in an edit loop to one row per edit. Measures; knows no formula and decides nothing."""

from __future__ import annotations

import torch

from stabilitylab.errors import UsageError

OLDEST_TORCH = (2, 4)
"""What setup.cfg asks for, and what the quick tests pass with: `make compat-lowest`."""


def expect_torch(version: str) -> None:
    """Raises UsageError for a torch that is too old: what follows would fail on some import of its inside."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UsageError(f"torch {version} is too old to be watched; expected {oldest} or newer")


expect_torch(torch.__version__)
