"""Why: small ordered rules over the findings. Each claims its cause only where the evidence shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.facts_editor import TINY_STD
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Finding, Verdict, severity
from stabilitylab.analysis.words import number

FEEDBACK_FACTOR: Final = 10.0
FP16_MAX: Final = 65_504.0


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
class Evidence:
    """What the rules may look at.

    crossed: the first editor input past a limit, None when none was. growth: of editor input and update together.
    largest_finite: what the live dtype at the site of the first bad reading can hold, where known. overflowed: whether
    a value there became infinite, not NaN, at the first bad edit.
    """

    verdict: Verdict
    findings: Sequence[Finding]
    first_bad: Finding | None
    crossed: EditorInput | None
    growth: Growth | None
    largest_finite: float | None
    overflowed: bool


@dataclass(frozen=True)
class Cause:
    """A cause with a sentence that shows it, and what to do."""

    cause: str
    says: str
    advice: str


def _normaliser_zero_std(evidence: Evidence) -> Cause | None:
    worst = evidence.crossed
    if worst is None or worst.std is None or not worst.std <= TINY_STD:
        return None
    unit = "a unit" if worst.unit is None else f"unit {worst.unit}"
    return Cause(
        "normaliser-zero-std",
        f"{unit} of the editor's frozen normaliser at {worst.site} was divided by a std of {number(worst.std)}: its"
        f" normalised input reached {number(worst.largest)} at edit {worst.edit}.",
        "Floor the normaliser's std (for example at 1% of its median) or clamp the normalised inputs, and collect its"
        " statistics over more rows, so that no unit is constant in them. A NaN may still come later if edits are never"
        " rolled back: restore the weights between edits, or edit in batches (MALMEN).",
    )


def _feedback_growth(evidence: Evidence) -> Cause | None:
    growth = evidence.growth
    if growth is None or growth.least < FEEDBACK_FACTOR:
        return None
    return Cause(
        "feedback-growth",
        f"each edit fed the next: from edit {growth.first_edit} to {growth.last_edit} the editor's normalised input"
        f" grew {number(growth.input_factor)}-fold and the update it made {number(growth.update_factor)}-fold.",
        "The editor was trained on the unedited model and is applied to its own results. Restore the weights between"
        " edits, or batch the edits into one update (MALMEN), or keep them outside the weights (GRACE). A norm"
        " constraint on the update or clamped inputs delays the end but costs edit success.",
    )


def _dtype_overflow(evidence: Evidence) -> Cause | None:
    bad = evidence.first_bad
    if (
        bad is None
        or evidence.largest_finite is None
        or not math.isclose(evidence.largest_finite, FP16_MAX, rel_tol=1e-3)
    ):
        return None
    if bad.rule == "headroom":
        how = f"had {number(bad.value)} bits of headroom left at edit {bad.edit}"
    elif evidence.overflowed:
        how = f"became infinite at edit {bad.edit} while all that was read before it in that edit was finite"
    else:
        return None
    return Cause(
        "dtype-overflow",
        f"values at {bad.site} are kept in float16, which ends at 65,504, and {how}.",
        "Keep the edited layers in bfloat16 or float32. That removes the overflow, not the growth: look at what grew"
        " before it, and constrain the norm of the updates.",
    )


def _dead_logits(evidence: Evidence) -> Cause | None:
    dead = [finding for finding in evidence.findings if finding.rule == "dead"]
    if not dead or evidence.first_bad is None or evidence.first_bad.rule != "dead":
        return None
    return Cause(
        "dead-logits",
        f"all logits are equal since edit {dead[0].edit}, with every value finite: the model no longer depends on its"
        " input, and its gradients vanish.",
        "Go back to the weights of before that edit. Lower the edit's learning rate or constrain the norm of its"
        " update; a check for NaN alone will never see this failure.",
    )


def _weights_unchanged(evidence: Evidence) -> Cause | None:
    if severity(evidence.verdict) > severity("drifting"):
        return None
    for finding in evidence.findings:
        if finding.rule == "never-moved":
            return Cause(
                "weights-unchanged",
                f"edit {finding.edit} left every watched weight as it was.",
                "Check that the watched sites are the layers that the editor edits, and that the model it returns is"
                " handed over (edit.returns). Adapters such as GRACE or LoRA keep the weights as they are by design.",
            )
        if finding.rule == "stopped-moving":
            return Cause(
                "weights-unchanged",
                f"edits moved the watched weights until edit {finding.start - 1}, and none since.",
                "See whether the gradients are zero, or the update is smaller than the dtype can add (bfloat16 has 8"
                " bits: 1 + 0.003 is 1); keep the edited layers in float32.",
            )
    return None


RULES: Final[tuple[Callable[[Evidence], Cause | None], ...]] = (
    _normaliser_zero_std,
    _feedback_growth,
    _dtype_overflow,
    _dead_logits,
    _weights_unchanged,
)
"""In order of precedence: what went in, what fed back, what could not be held; the first that speaks wins."""


def find_cause(evidence: Evidence) -> Cause:
    """The cause that the evidence shows, or ``unknown``."""
    for rule in RULES:
        cause = rule(evidence)
        if cause is not None:
            return cause
    if evidence.verdict == "stable":
        return Cause(UNKNOWN_CAUSE, "", "")
    return Cause(
        UNKNOWN_CAUSE,
        "no rule explains this from what was recorded.",
        "Begin at the first finding and its site; go back to the weights of before the onset edit.",
    )
