"""What the rules of causes may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stabilitylab.analysis.findings import Finding, Verdict, severity


@dataclass(frozen=True)
class EditorInput:
    """The largest normalised input of one site at one edit, with the unit it was at and the std it was divided by."""

    edit: int
    site: str
    largest: float
    unit: int | None
    std: float | None


@dataclass(frozen=True)
class Growth:
    """How the editor's input and its update grew together over some edits. Factors are end over start."""

    first_edit: int
    last_edit: int
    input_factor: float
    update_factor: float

    @property
    def least(self) -> float:
        """The weaker of the two."""
        return min(self.input_factor, self.update_factor)


@dataclass(frozen=True)
class Step:
    """One applied edit: the largest update as a share of its weight, and the furthest weight from its original as a
    share of that one's norm.
    """

    edit: int
    update_ratio: float
    update_site: str
    drift_ratio: float
    drift_site: str


@dataclass(frozen=True)
class FatalRow:
    """The row with the first non-finite value.

    masked_rows: query rows without a real token. unmasked_before: whether none had any in the edits before.
    sound_gradients: whether the edit's first pass had gradients, all finite.
    """

    edit: int
    masked_rows: float
    unmasked_before: bool
    sound_gradients: bool


@dataclass(frozen=True)
class Evidence:
    """What is known of a run by now.

    crossed: the first editor input past a limit, None when none was. growth: of editor input and update together.
    largest_finite: what the live dtype at the site of the first bad reading can hold, where known. overflowed: whether
    a value there became infinite, not NaN, at the first bad edit. steps: the last edits up to the alarm or the first
    hard fact, whichever holds the first bad edit. fatal: the first non-finite row. headroom_before: bits that the
    weight at the first bad site had left when last read before that row. restored_until: the last edit of at least
    three that each began at the original weights, None when there were none or it went on so. moved: whether any
    watched weight ever moved. codebook: whether one holds keys. reported: whether the editor told of a denominator or
    a solve, or has a normaliser.
    """

    verdict: Verdict
    findings: Sequence[Finding]
    first_bad: Finding | None
    crossed: EditorInput | None
    growth: Growth | None
    largest_finite: float | None
    overflowed: bool
    steps: Sequence[Step]
    fatal: FatalRow | None
    headroom_before: float | None
    restored_until: int | None
    moved: bool
    codebook: bool
    reported: bool

    def of(self, *rules: str) -> Finding | None:
        """The first finding by any of these rules."""
        return next((finding for finding in self.findings if finding.rule in rules), None)

    def is_past(self, verdict: Verdict) -> bool:
        """Whether the run is worse than `verdict`."""
        return severity(self.verdict) > severity(verdict)

    @property
    def begins(self) -> int | None:
        """The edit of the first finding that is more than a note."""
        return min((finding.start for finding in self.findings if severity(finding.verdict) > 0), default=None)
