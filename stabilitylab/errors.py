"""Errors that a user can act on. Each is one line: what is wrong, what was expected, the nearest valid choice."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from typing import Final

_MOST_COMPARED: Final = 5_000
_LONGEST_COMPARED: Final = 300


class StabilityLabError(Exception):
    """Base of every error that stabilitylab raises on purpose."""


class SiteError(StabilityLabError):
    """A pattern or name does not lead to a layer or tensor of the model."""


class RunError(StabilityLabError):
    """A run folder or run file can't be made, read or trusted."""


class RecordError(StabilityLabError):
    """A file of edit records does not have the layout it should have."""


class EditError(StabilityLabError):
    """An editor can't carry out any of the edits that it was given."""


class UsageError(StabilityLabError):
    """An argument has a value that can't be used."""


def nearest(wrong: str, valid: Iterable[str], *, n: int = 3) -> list[str]:
    """The up to `n` valid names most like `wrong`, best first; empty when none is alike."""
    # What names are compared with may be anyone's: the time it takes grows with the product of their lengths.
    few = [name for name in itertools.islice(valid, _MOST_COMPARED) if len(name) <= _LONGEST_COMPARED]
    return difflib.get_close_matches(wrong[:_LONGEST_COMPARED], few, n=n, cutoff=0.4)


def did_you_mean(wrong: str, valid: Iterable[str], *, n: int = 3) -> str:
    """`"; did you mean 'a', 'b'?"` for the names nearest to `wrong`, or an empty string."""
    names = nearest(wrong, valid, n=n)
    return f"; did you mean {', '.join(repr(name) for name in names)}?" if names else ""
