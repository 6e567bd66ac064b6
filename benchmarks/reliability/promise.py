"""What a promise's tests are given and what they give back. Knows no promise."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

SHOWN: Final = 5
"""Breaks that a result names; it counts all."""


@dataclass(frozen=True)
class Effort:
    """How much is tried. long: the whole, else a sample of it. tell: is told what goes on and the share of it done."""

    long: bool
    seed: int
    scratch: Path
    tell: Callable[[str, float], None]

    def pick(self, short: int, long: int) -> int:
        """A number of trials."""
        return long if self.long else short

    def chance(self, what: str) -> random.Random:
        """A generator of its own for each use, so that one test's draws do not depend on another's."""
        return random.Random(f"{self.seed} {what}")

    def folder(self, name: str) -> Path:
        """A new folder for one test."""
        made = self.scratch / name
        made.mkdir(parents=True)
        return made


@dataclass(frozen=True)
class Result:
    """One test of a promise. tried: how often. measured: the figure beside the goal. met: None: not judged.

    breaks: what went against the promise, the first of them. clock: whether the goal is a time. What else runs on a
    machine makes a time longer, and nothing that is counted more.
    """

    test: str
    goal: str
    measured: str
    met: bool | None
    tried: int
    breaks: tuple[str, ...] = ()
    clock: bool = False

    def unjudged(self) -> Result:
        """The same, said to be no judgement."""
        return replace(self, measured=f"{self.measured}; not judged here", met=None)


Promise = Callable[[Effort], Iterator[Result]]


def counted(test: str, what: str, tried: int, breaks: Sequence[str], note: str = "") -> Result:
    """A test whose goal is that nothing breaks. what: of which there are to be 0. note: what else is worth a word."""
    said = f"{len(breaks)} of {tried:,}{f'; {note}' if note else ''}"
    return Result(test, f"0 {what}", said, not breaks and tried > 0, tried, tuple(breaks[:SHOWN]))


def digest(data: bytes) -> str:
    """Short, and another for other bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
