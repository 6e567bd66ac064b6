"""What the findings add up to, in numbers and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stabilitylab.analysis.causes import Cause
from stabilitylab.analysis.drift import BASELINE
from stabilitylab.analysis.facts import place_name
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Finding, Verdict, severity

CHAIN: Final = 10
"""Findings at most this many edits apart are taken to belong to one development."""


def onset(findings: Sequence[Finding], alarm: int | None) -> int | None:
    """The edit at which values began to drift or diverge, in hindsight.

    Walks back from the alarm through the findings, each to the edit at which its series left the baseline, as long as
    they follow one another within ``CHAIN`` edits; something odd long before, with nothing in between, is not the onset.
    """
    marked = [finding for finding in findings if severity(finding.verdict) > 0]
    if not marked:
        return None
    if alarm is None:
        return min(finding.start for finding in marked)
    known = [finding for finding in marked if finding.edit <= alarm]
    begin = min(finding.start for finding in known if severity(finding.verdict) >= severity("diverging"))
    for finding in sorted(known, key=lambda finding: finding.edit, reverse=True):
        if finding.edit >= begin - CHAIN:
            begin = min(begin, finding.start)
    return begin


def diagnose(
    verdict: Verdict,
    *,
    rows: int,
    edits: int,
    baseline: bool,
    alarm: int | None,
    first_bad: Finding | None,
    findings: tuple[Finding, ...],
    cause: Cause,
) -> Diagnosis:
    """Put it together. baseline: whether any series has one. first_bad: the finding that is named as such."""
    began = onset(findings, alarm)
    nonfinite = [finding.edit for finding in findings if finding.verdict == "non-finite"]
    first_nonfinite = min(nonfinite) if nonfinite else None
    return Diagnosis(
        verdict=verdict,
        edits=edits,
        onset_edit=began,
        alarm_edit=alarm,
        first_bad_edit=first_bad.start if first_bad else None,
        first_bad_site=first_bad.site if first_bad else None,
        first_bad_metric=first_bad.metric if first_bad else None,
        cause=cause.cause,
        cause_says=cause.says,
        advice=cause.advice,
        findings=findings,
        says=_sentence(verdict, rows, edits, baseline, began, first_nonfinite, first_bad, findings, cause),
        first_nonfinite_edit=first_nonfinite,
    )


def _count(edits: int) -> str:
    return f"{edits} edit{'s' if edits != 1 else ''}"


def _sentence(
    verdict: Verdict,
    rows: int,
    edits: int,
    baseline: bool,
    began: int | None,
    first_nonfinite: int | None,
    first_bad: Finding | None,
    findings: Sequence[Finding],
    cause: Cause,
) -> str:
    if verdict == "stable":
        return _stable(rows, edits, baseline, findings)
    if verdict == "drifting":
        first = next(finding for finding in findings if finding.verdict == "drifting")
        return f"Drifting since edit {began}: {_clause(cause, first)}"
    assert first_bad is not None  # a verdict this bad comes from a finding that is
    words = {"non-finite": "Non-finite", "collapsed": "Collapsed", "diverging": "Diverging"}
    since = first_nonfinite
    if since is None:
        worst = [finding.start for finding in findings if finding.verdict == verdict]
        since = began if verdict == "diverging" else min(worst)
    lead = ""
    if began is not None and since is not None and began < since:
        lead = f", {'diverging' if verdict == 'non-finite' else 'drifting'} since edit {began}"
    return (
        f"{words[verdict]} since edit {since}{lead}: first in {place_name(first_bad.site)} ({first_bad.metric}) —"
        f" {_clause(cause, first_bad)}"
    )


def _clause(cause: Cause, finding: Finding) -> str:
    return finding.says if cause.cause == UNKNOWN_CAUSE else cause.says


def _stable(rows: int, edits: int, baseline: bool, findings: Sequence[Finding]) -> str:
    if not rows:
        return "Nothing recorded yet."
    if not edits:
        says = "No edit yet: nothing out of the ordinary before the first one."
    elif not baseline:
        says = (
            f"Stable over {_count(edits)} by the absolute limits; a baseline to compare with exists after"
            f" {BASELINE} applied edits."
        )
    elif not findings:
        return f"Stable over {_count(edits)}: nothing out of the ordinary."
    else:
        says = f"Stable over {_count(edits)}."
    return f"{says} Worth knowing: {findings[0].says}" if findings else says
