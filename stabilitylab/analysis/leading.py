"""Finding 1: what the headline is about. Edit, place, metric and number of the headline are this finding's.

It is the finding about the cause's place, where the cause knows one. Else it is the first bad reading, unless that is
about the model as a whole: the canary shows that the model is bad, not which layer made it so. Then it is the first
finding about a layer (or the editor's part) that had left its usual range by that time.

Where the cause knows its place from a reading that no rule speaks of, the weight that is furthest from its original,
that reading becomes a finding: nothing is named that is not on the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stabilitylab.analysis.causes.evidence import Place
from stabilitylab.analysis.findings import Finding, severity
from stabilitylab.analysis.ledger import DRIFT_RULES, FURTHEST, STEPS
from stabilitylab.analysis.words import number, place_name
from stabilitylab.record.readings import MODEL_SITE


def leading(place: Place | None, first_bad: Finding | None, findings: Sequence[Finding]) -> Finding | None:
    """The finding that the headline is about; None for a run with nothing to say of.

    place: the cause's own. first_bad: the first that is ``diverging`` or worse. findings: in order of edit.
    """
    found = None if place is None else _at(place, findings)
    if found is not None:
        return found
    if first_bad is None:
        return max(findings, key=lambda finding: severity(finding.verdict), default=None)  # of equals the first
    if first_bad.site != MODEL_SITE:
        return first_bad
    known = [finding for finding in _flagged(findings) if finding.start <= first_bad.edit]
    return min(
        (each for each in known if each.site != MODEL_SITE), key=lambda finding: finding.start, default=first_bad
    )


def edit_of(finding: Finding) -> int:
    """The edit that a headline names: of a hard fact the first that it is about, of drift the one that showed it."""
    return finding.edit if finding.rule in DRIFT_RULES else finding.start


def reading(finding: Finding) -> str:
    """Its metric, number and edit: ``weight.nonfinite 300 at edit 26``; of a forecast: value → forecast / limit."""
    limit = f" / limit {number(finding.threshold)}" if finding.forecast is not None else ""
    edit = edit_of(finding)
    when = f" at edit {edit}" if edit == finding.edit else f", since edit {edit}"  # the number is a later one's
    return f"{value_words(finding)}{limit}{when}"


def value_words(finding: Finding) -> str:
    """Its metric and number, with what that is forecast to become."""
    if finding.rule in STEPS:
        return f"update {number(finding.value)} times the weight's original norm"
    ahead = f" → {number(finding.forecast)}" if finding.forecast is not None else ""
    return f"{finding.metric} {number(finding.value)}{ahead}"


def _at(place: Place, findings: Sequence[Finding]) -> Finding | None:
    """The finding about a reading: the one nearest in time; else about its site, once that had left its range."""
    same = [finding for finding in findings if (finding.site, finding.metric) == (place.site, place.metric)]
    if same:
        return min(same, key=lambda finding: (severity(finding.verdict) == 0, abs(edit_of(finding) - place.edit)))
    if place.value is not None:
        return _furthest(place, place.value)
    return next((finding for finding in _flagged(findings) if finding.site == place.site), None)


def _flagged(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if severity(finding.verdict) > 0]


def _furthest(place: Place, ratio: float) -> Finding:
    share = f"{number(ratio)} of" if ratio < 1 else f"{number(ratio)} times"
    return Finding(
        rule=FURTHEST,
        metric=place.metric,
        site=place.site,
        edit=place.edit,
        value=ratio,
        threshold=math.nan,
        says=f"Of the watched weights that of {place_name(place.site)} is furthest from its original at edit"
        f" {place.edit}: by {share} its norm.",
        verdict="drifting",
    )
