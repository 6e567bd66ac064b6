"""A cause as a rule: what it claims of the evidence, and what a reader should know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from stabilitylab.analysis.causes.evidence import Evidence, Place
from stabilitylab.analysis.findings import Confidence, Role

Group = Literal["provenance", "input", "update algebra", "dtype", "growth", "dead", "lost edits"]


@dataclass(frozen=True)
class Claim:
    """What a rule says of one run: a sentence with its numbers, how sure it is, and where the cause sits, if that is
    known and is not the first bad reading's own place. link: where it stands in the chain of causes, if that is another
    moment or place: where growth led to, where it ended.
    """

    says: str
    confidence: Confidence
    place: Place | None = None
    link: Place | None = None


@dataclass(frozen=True)
class Rule:
    """One known cause.

    role: in the chain of causes. claim: the claim that the evidence bears, or None. fix: what to do, for the diagnosis
    and for the documentation. mechanism, seen, example: for the documentation: how it comes about, what shows, a case.
    """

    name: str
    group: Group
    role: Role
    claim: Callable[[Evidence], Claim | None]
    fix: str
    mechanism: str
    seen: str
    example: str
    leads: bool = True
    """Whether it may be the cause that is named first; else it only completes the chain."""
    unless: str | None = None
    """Another rule that says the same of an earlier moment: where that speaks, this one is no link of its own."""


@dataclass(frozen=True)
class Cause:
    """A cause with a sentence that shows it, what to do, and how sure that is. place, link: see `Claim`."""

    cause: str
    says: str
    advice: str
    confidence: Confidence
    place: Place | None = None
    link: Place | None = None
