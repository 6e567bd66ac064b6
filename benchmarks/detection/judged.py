"""A run of the zoo as it is scored: what was true of it, and what was said of it. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from stabilitylab.analysis.findings import UNKNOWN_CAUSE, severity


@dataclass(frozen=True)
class Asked:
    """One moment at which a forecast was asked for.

    middle, low, high: edits left as forecast; None when it was silent. true: edits left; None: it never came. after:
    edits that the run went on for.
    """

    edit: int
    after: int
    true: int | None
    middle: int | None = None
    low: int | None = None
    high: int | None = None

    @property
    def error(self) -> float | None:
        """|median − true| / true; None when one of them is not there."""
        return None if self.middle is None or self.true is None else abs(self.middle - self.true) / self.true

    @property
    def covered(self) -> bool | None:
        """Whether the truth is within the interval; None when nothing was said or nothing is known."""
        if self.low is None or self.high is None:
            return None
        if self.true is None:
            return False if self.high <= self.after else None
        return self.low <= self.true <= self.high


@dataclass(frozen=True)
class Judged:
    """A run: the truth, see `benchmarks.zoo.Truth`, and what was said.

    known: whether the mechanism is one that a rule is to know. sites: the true one first, then its other names; empty
    for a fault that is at no site. said_sites: the first bad site (None where none is named), then further ones.
    """

    scenario: str
    seed: int
    course: str
    known: bool
    cause: str | None
    onset: int | None
    lost: int | None
    nonfinite: int | None
    sites: tuple[str, ...]
    edits: int
    alarm: int | None
    verdict: str
    said_cause: str
    confidence: str
    said_sites: tuple[str | None, ...]
    asked: tuple[Asked, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong with the loop."""
        return self.cause is None

    @property
    def early(self) -> bool:
        """Whether the alarm came before anything was wrong."""
        return self.alarm is not None and self.onset is not None and self.onset > 1 and self.alarm < self.onset

    @property
    def in_time(self) -> bool:
        """Whether the alarm came by the edit at which the model was lost, and not early."""
        return self.alarm is not None and self.lost is not None and self.alarm <= self.lost and not self.early

    @property
    def trouble(self) -> bool:
        """Whether the last diagnosis names any."""
        return severity(self.verdict) >= severity("drifting") or self.said_cause != UNKNOWN_CAUSE

    @property
    def detected(self) -> bool:
        """In time, or, of a run that is never lost, with trouble named."""
        return self.in_time if self.lost is not None else self.trouble and not self.early

    def lead(self, end: int | None) -> float | None:
        """The share of the edits from the onset to `end` that was still ahead; None when there are none."""
        if end is None or self.onset is None or end <= self.onset:
            return None
        if self.alarm is None or self.early or self.alarm > end:
            return 0.0
        return min((end - self.alarm) / (end - self.onset), 1.0)

    def names_site(self, first: int) -> bool:
        """Whether one of the first so many sites that were named is the true one."""
        named = [site for site in self.said_sites[:first] if site is not None]
        return any(site == true or site.startswith(f"{true}.") for site in named for true in self.sites)
