"""What the analysis says: findings with their evidence, and the diagnosis that they add up to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from reprlib import Repr
from typing import Any, Final, Literal

from stabilitylab.record.display import html
from stabilitylab.record.operations import Operation

Verdict = Literal["stable", "drifting", "diverging", "collapsed", "non-finite"]
VERDICTS: Final[tuple[Verdict, ...]] = ("stable", "drifting", "diverging", "collapsed", "non-finite")
"""From best to worst."""

UNKNOWN_CAUSE: Final = "unknown"

Confidence = Literal["high", "medium", "low", "none"]
"""In a cause. ``high``: the readings show the mechanism itself. ``medium``: they show what it leaves behind, which
little else does. ``low``: they agree with it, and with other explanations as well. ``none``: no rule speaks."""

Landed = Literal["all", "some", "none"]

LimitKind = Literal["weight-overflow", "activation-overflow", "norm-overflow", "canary-lost"]
Shape = Literal["exponential", "accelerating", "flattening"]
"""How a reading goes towards its limit: by the same factor each edit, by ever more, or by ever less."""

_SHORT: Final = Repr()
_SHORT.maxstring = 240


def severity(verdict: str) -> int:
    """0 for ``stable`` up to 4 for ``non-finite``."""
    return VERDICTS.index(verdict)


@dataclass(frozen=True)
class Finding:
    """One claim with its evidence.

    edit: when it was established. verdict: what it alone would make of the run (``stable``: worth knowing only).
    since: for a claim that needed several edits, the first of them; None when `edit` says it all. usual: the baseline
    that the value is compared with, if it is. forecast: what the value will be if it goes on so, where that is what is
    past the threshold. threshold: NaN for a claim that has none. more_sites: at how many others the same was found
    later, of which there are no findings.
    """

    rule: str
    metric: str
    site: str
    edit: int
    value: float
    threshold: float
    says: str
    verdict: Verdict
    since: int | None = None
    usual: float | None = None
    forecast: float | None = None
    more_sites: int = 0

    @property
    def start(self) -> int:
        """The first edit that the claim is about."""
        return self.edit if self.since is None else self.since

    def __str__(self) -> str:
        return self.says

    def __repr__(self) -> str:
        return f"<Finding at edit {self.edit}, {self.verdict}: {_SHORT.repr(self.says)}>"

    def _repr_html_(self) -> str:
        return html(self)


@dataclass(frozen=True)
class Forecast:
    """How many edits are left until the nearest limit, or why that can't be told.

    made_at: the edit after which it was made; edits_left (the median), low and high (the ends of a 90 % interval) count
    from there, and at least 1. limit, site, metric: what will be reached, and the reading that goes there. When there
    is no forecast, edits_left, low, high and shape are None and `why` is a sentence; limit, site and metric then name
    the reading that may be on its way, if there is one.
    """

    made_at: int
    says: str
    limit: LimitKind | None = None
    site: str | None = None
    metric: str | None = None
    edits_left: int | None = None
    low: int | None = None
    high: int | None = None
    shape: Shape | None = None
    why: str | None = None

    def __str__(self) -> str:
        return self.says


Role = Literal["trigger", "amplifier", "operation", "limit", "condition"]
"""What a cause does in the chain: it begins the trouble, makes it grow, is where that ends, or let it come about. The
operation is no cause of its own: it was traced, and shows in which line the others struck.
"""


@dataclass(frozen=True)
class Link:
    """One cause in the chain. edit, site, metric: where it is, as far as that is known. advice: what to do about it."""

    role: Role
    cause: str
    edit: int | None
    site: str | None
    metric: str | None
    says: str
    advice: str
    confidence: Confidence

    def __str__(self) -> str:
        return f"{self.role}: {self.says}"


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a run so far.

    verdict: the worst of the findings. It never gets better: it is about the run's history, not its last edit. edits:
    how many were tried, failed ones included. onset_edit: the edit at which values begin to drift or diverge, in
    hindsight. alarm_edit: the edit after which the verdict was first ``diverging`` or worse. first_bad_edit,
    first_bad_site, first_bad_metric: those of the first finding, where a run is ``diverging`` or worse, or a cause
    says where edits are lost, see `stabilitylab.analysis.leading`. first_nonfinite_edit: the first NaN or infinity;
    later than first_bad_edit when a limit was passed before.
    findings: first the one that the headline is about, then the others in order of edit and of dataflow.
    forecast: None once the run has collapsed or is non-finite.
    confidence: in the cause. baseline: what series are compared with. thresholds: where the limits of statistical
    claims come from. None: not the case.

    landed: whether edits took effect: all, some or none of them; None when that could not be seen. lost_edits: how many
    in a row did not, up to the last. nothing_lands: whether that is all of the last ten, or of a shorter run; it is no
    part of the verdict, which is about the model. unwatched: what was asked for and could not be watched, in words.
    causes: the chain of causes, in the order of the story: triggers, amplifiers, the traced operation, limits,
    conditions. `cause` is the one of them to act on first. Once a run diverges, what was claimed stays in it.
    operation: the traced operation that broke the model, or keeps edits from it; None where none was traced.
    """

    verdict: Verdict
    edits: int
    onset_edit: int | None
    alarm_edit: int | None
    first_bad_edit: int | None
    first_bad_site: str | None
    first_bad_metric: str | None
    cause: str
    cause_says: str
    advice: str
    findings: tuple[Finding, ...]
    says: str
    first_nonfinite_edit: int | None = None
    forecast: Forecast | None = None
    confidence: Confidence = "none"
    baseline: str = ""
    thresholds: str = ""
    landed: Landed | None = None
    lost_edits: int = 0
    nothing_lands: bool = False
    unwatched: tuple[str, ...] = ()
    causes: tuple[Link, ...] = ()
    operation: Operation | None = None

    def __str__(self) -> str:
        return self.says

    def __repr__(self) -> str:
        return (
            f"<Diagnosis after {self.edits} edits, {self.verdict}: {_SHORT.repr(self.says)}; cause {self.cause}, "
            f"{len(self.findings)} findings>"
        )

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities become the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
        plain: dict[str, Any] = json_safe(asdict(self))
        return plain


def json_safe(value: Any) -> Any:
    """`value` with every non-finite float spelled out as a string, since JSON has no token for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value
