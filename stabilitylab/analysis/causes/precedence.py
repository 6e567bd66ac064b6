"""Why: rules over the evidence, in order of precedence. Each claims its cause only where the evidence shows it."""

from __future__ import annotations

from typing import Final

from stabilitylab.analysis.causes import algebra, dtypes, growth, inputs, provenance
from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.rule import Cause, Rule
from stabilitylab.analysis.findings import UNKNOWN_CAUSE

RULES: Final[tuple[Rule, ...]] = (
    *provenance.RULES,
    *inputs.RULES,
    *algebra.RULES,
    *dtypes.BEFORE_GROWTH,
    *growth.FEEDBACK,
    *dtypes.AFTER_GROWTH,
    *growth.ACCUMULATION,
    *growth.NOTHING_MOVES,
)
"""What was there before, what went in, how the update was made, what the dtype did to it, what fed back, and what is
left when nothing moves. An overflow comes after feedback: the dtype is where growth ends, not why it grew."""


def find_cause(evidence: Evidence) -> Cause:
    """The first rule that claims with high or medium confidence; else the first with low; else ``unknown``.

    Where a rule doesn't say where its cause sits, and the first bad reading is the whole model's, the weight that was
    furthest from its original is named.
    """
    unsure: Cause | None = None
    for rule in RULES:
        claim = rule.claim(evidence)
        if claim is None:
            continue
        cause = Cause(rule.name, claim.says, rule.fix, claim.confidence, claim.place or evidence.furthest)
        if claim.confidence != "low":
            return cause
        unsure = unsure or cause
    if unsure is not None:
        return unsure
    if evidence.verdict == "stable":
        return Cause(UNKNOWN_CAUSE, "", "", "none")
    return Cause(
        UNKNOWN_CAUSE,
        "no rule explains this from what was recorded.",
        "Begin at the first finding and its site; go back to the weights of before the onset edit.",
        "none",
        evidence.furthest,
    )
