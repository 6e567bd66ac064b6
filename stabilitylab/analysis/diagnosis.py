"""What the findings add up to, in numbers and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from stabilitylab.analysis.causes.precedence import in_chain
from stabilitylab.analysis.causes.rule import Cause
from stabilitylab.analysis.drift_series import BASELINE
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Finding, Forecast, Link, Verdict, severity
from stabilitylab.analysis.landing import Landing
from stabilitylab.analysis.leading import edit_of, leading, reading
from stabilitylab.analysis.operation import advice, blamed, its_finding, link, says, where
from stabilitylab.analysis.words import place_name
from stabilitylab.record.operations import Operation

CHAIN: Final = 10
"""Findings at most this many edits apart are taken to belong to one development."""


def onset(findings: Sequence[Finding], alarm: int | None) -> int | None:
    """The edit at which values began to drift or diverge, in hindsight.

    Walks back from the alarm through the findings, each to the edit at which its series left the baseline, as long as
    they follow one another within ``CHAIN`` edits; something odd long before, with nothing between, is not the onset.
    What comes after the alarm does not change it.
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


@dataclass(frozen=True)
class Judgement:
    """What there is to say, before it is said. found: the findings in order. findings: the same, with the one in front
    that the headline is about, `first`. first_bad: the one that is named as such. operation: that is to blame.
    """

    verdict: Verdict
    first_bad: Finding | None
    found: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    first: Finding | None
    cause: Cause
    causes: tuple[Link, ...]
    landing: Landing
    operation: Operation | None
    nonfinite: int | None
    """The first edit of which a finding says that something was not finite."""


def judge(
    verdict: Verdict,
    *,
    edits: int,
    first_bad: Finding | None,
    findings: tuple[Finding, ...],
    cause: Cause,
    causes: tuple[Link, ...],
    landing: Landing,
    operations: Sequence[Operation] = (),
) -> Judgement:
    """Find what the headline is about. first_bad: the finding that is named as such. operations: that were traced."""
    nonfinite = min((finding.edit for finding in findings if finding.verdict == "non-finite"), default=None)
    operation = blamed(operations, nonfinite, lost=landing.lost if landing.nothing_lands else 0, edits=edits)
    traced = None if operation is None or first_bad is None else its_finding(operation, findings)
    first = traced or leading(cause.place, first_bad, findings)
    ordered = findings
    if first is not None:
        ordered = (first, *(finding for finding in findings if _claim(finding) != _claim(first)))
    return Judgement(verdict, first_bad, findings, ordered, first, cause, causes, landing, operation, nonfinite)


def diagnose(
    judged: Judgement,
    *,
    rows: int,
    edits: int,
    baseline: bool,
    alarm: int | None,
    forecast: Forecast | None,
    unwatched: tuple[str, ...],
) -> Diagnosis:
    """Put it together. baseline: whether any series has one."""
    first, first_bad, cause, landing = judged.first, judged.first_bad, judged.cause, judged.landing
    operation, findings, began = judged.operation, judged.findings, onset(judged.found, alarm)
    # Without a bad reading edits may be lost, or a fault have been there before the first: the cause says where.
    bad = first if first_bad is not None or cause.place is not None else None
    diagnosis = Diagnosis(
        verdict=judged.verdict,
        edits=edits,
        onset_edit=began,
        alarm_edit=alarm,
        first_bad_edit=None if bad is None else edit_of(bad),
        first_bad_site=None if bad is None else bad.site,
        first_bad_metric=None if bad is None else bad.metric,
        cause=cause.cause,
        cause_says=cause.says,
        advice=cause.advice if operation is None or cause.cause != UNKNOWN_CAUSE else advice(operation),
        findings=findings,
        says="",
        first_nonfinite_edit=judged.nonfinite,
        forecast=forecast,
        confidence=cause.confidence,
        landed=landing.kind,
        lost_edits=landing.lost,
        nothing_lands=landing.nothing_lands,
        unwatched=unwatched,
        causes=judged.causes if operation is None else in_chain(judged.causes, link(operation)),
        operation=operation,
    )
    if first is not None and first_bad is not None:
        says = f"{_since(diagnosis)}: {_first(diagnosis, first, first_bad)}"
    elif first is not None and judged.verdict == "drifting":
        says = f"Drifting since edit {began}: {_first(diagnosis, first, first)}"
    else:
        says = _stable(rows, edits, baseline, findings)
    return replace(diagnosis, says=_in_front(landing, judged.verdict, says) + _blind(unwatched))


def _claim(finding: Finding) -> tuple[str, str, str, int]:
    """What tells one finding from another, however it is worded."""
    return finding.rule, finding.metric, finding.site, finding.edit


def _in_front(landing: Landing, verdict: Verdict, says: str) -> str:
    """Edits that are lost come first where the model is sound: "stable" is no news then."""
    if not landing.mostly_lost:
        return f"{says} {landing.says_failed}" if landing.failed else says
    if severity(verdict) or not landing.nothing_lands:
        return f"{landing.says}. {says}"
    if landing.others_moved:
        return f"{landing.says}. {says}"
    state = "weights were moved by then, and stayed so" if landing.left else "the model is as it was"
    return f"{landing.says}; {state}."


def _blind(unwatched: Sequence[str]) -> str:
    """What the verdict can't speak of."""
    return f" That is as far as it was watched: {'; '.join(unwatched)}." if unwatched else ""


def _count(edits: int) -> str:
    return f"{edits} edit{'s' if edits != 1 else ''}"


def _since(diagnosis: Diagnosis) -> str:
    """For ``diverging`` and worse: since when, and growing since when."""
    began, verdict = diagnosis.onset_edit, diagnosis.verdict
    since = diagnosis.first_nonfinite_edit
    if since is None:
        since = min(finding.start for finding in diagnosis.findings if finding.verdict == verdict)
        since = max(since, began or since)  # what a later finding says of earlier edits does not begin before the onset
    lead = ""
    if began is not None and began < since:
        lead = f", {'diverging' if verdict == 'non-finite' else 'drifting'} since edit {began}"
    by = "" if diagnosis.operation is None else f", by {where(diagnosis.operation)}"
    return f"{verdict.capitalize()} since edit {since}{by}{lead}"


def _first(diagnosis: Diagnosis, first: Finding, bad: Finding) -> str:
    """Where first, with the reading that shows it, and why; without a known cause, what is bad."""
    if diagnosis.cause == UNKNOWN_CAUSE and diagnosis.operation is not None:
        why = says(diagnosis.operation)
    elif diagnosis.cause == UNKNOWN_CAUSE:
        why = bad.says[:1].lower() + bad.says[1:]
    else:
        why = diagnosis.cause_says
    return f"first in {place_name(first.site)} ({reading(first)}) — {why}"


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
