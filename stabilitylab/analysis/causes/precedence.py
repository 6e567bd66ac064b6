"""Why: rules over the evidence, in order of precedence. Each claims its cause only where the evidence shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, get_args

from stabilitylab.analysis.causes import algebra, dtypes, growth, inputs, lost, provenance, scaling
from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.rule import Cause, Rule
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Link, Role

RULES: Final[tuple[Rule, ...]] = (
    *provenance.RULES,
    *inputs.RULES,
    *algebra.RULES,
    *dtypes.BEFORE_GROWTH,
    *growth.FEEDBACK,
    *dtypes.AFTER_GROWTH,
    *growth.REPEATED,
    *scaling.RULES,
    *growth.ACCUMULATION,
    *growth.DEAD,
    *lost.RULES,
    *dtypes.LIMITS,
)
"""What was there before, what went in, how the update was made, what the dtype did to it, what fed back, and what is
left when nothing moves. An overflow comes after feedback: the dtype is where growth ends, not why it grew."""


ROLES: Final[tuple[Role, ...]] = get_args(Role)

UNKNOWN: Final = Cause(
    UNKNOWN_CAUSE,
    "no rule explains this from what was recorded.",
    "Begin at the first finding and its site; go back to the weights of before the onset edit.",
    "none",
)
NOTHING: Final = Cause(UNKNOWN_CAUSE, "", "", "none")
"""Of a run with nothing to explain."""


def claims(evidence: Evidence) -> dict[str, Cause]:
    """What each rule that speaks claims, by its name, in order of precedence.

    Where a rule doesn't say where its cause sits, and the first bad reading is the whole model's, the weight that was
    furthest from its original is named.
    """
    found = {}
    for rule in RULES:
        claim = rule.claim(evidence)
        if claim is not None:
            place = claim.place or evidence.furthest
            found[rule.name] = Cause(rule.name, claim.says, rule.fix, claim.confidence, place, claim.link or place)
    return found


def first_of(claimed: Mapping[str, Cause], evidence: Evidence) -> Cause:
    """The first claim with high or medium confidence; else the first with low; else ``unknown``."""
    leading = [claimed[rule.name] for rule in RULES if rule.leads and rule.name in claimed]
    sure = [cause for cause in leading if cause.confidence != "low"]
    if sure or leading:
        return (sure or leading)[0]
    return NOTHING if evidence.verdict == "stable" else replace(UNKNOWN, place=evidence.furthest)


def find_cause(evidence: Evidence) -> Cause:
    """What the evidence of this moment alone says, see `first_of`."""
    return first_of(claims(evidence), evidence)


def in_chain(links: Sequence[Link], more: Link) -> tuple[Link, ...]:
    """The chain with one link more, at the place of its role."""
    return tuple(sorted([*links, more], key=lambda link: ROLES.index(link.role)))


def chain(claimed: Mapping[str, Cause]) -> tuple[Link, ...]:
    """The claims with high or medium confidence as links: by role, and within one in order of precedence."""
    links = [
        Link(
            rule.role,
            rule.name,
            None if cause.link is None else cause.link.edit,
            None if cause.link is None else cause.link.site,
            None if cause.link is None else cause.link.metric,
            cause.says,
            cause.advice,
            cause.confidence,
        )
        for rule in RULES
        if (cause := claimed.get(rule.name)) is not None and cause.confidence != "low" and rule.unless not in claimed
    ]
    return tuple(sorted(links, key=lambda link: ROLES.index(link.role)))
