"""How a verdict looks and what it means in plain words; which findings come first; a run at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Finding, Verdict, severity
from stabilitylab.record.run import Run
from stabilitylab.reports.text import clean, number, shorten


@dataclass(frozen=True)
class Look:
    """sign: a shape, so that colour is never alone. style: the terminal's colour. css: the page's class."""

    word: str
    sign: str
    style: str
    css: str
    means: str


LOOKS: Final[dict[Verdict, Look]] = {
    "stable": Look(
        "Stable", "●", "green", "v-stable",
        "No reading is bad in itself, and none left the range that it began in.",
    ),
    "drifting": Look(
        "Drifting", "◐", "yellow", "v-drifting",
        "Values are leaving the range that they began in. The model still works; what comes next is worth watching.",
    ),
    "diverging": Look(
        "Diverging", "▲", "dark_orange3", "v-diverging",
        "Values grow (or shrink) from edit to edit and do not come back by themselves. Go back to before the onset.",
    ),
    "collapsed": Look(
        "Collapsed", "■", "magenta", "v-collapsed",
        "All numbers are finite, but the model no longer does what it did. A check for NaN alone would not see this.",
    ),
    "non-finite": Look(
        "Non-finite", "✖", "red", "v-nonfinite",
        "Some values are no longer numbers (NaN or infinite). Nothing computed from them can be trusted.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """Edits `first` to `last` (both included) of one kind, with their place on a strip that is 1,000 wide."""

    kind: str
    words: str
    first: int
    last: int
    left: float
    width: float


def strip(run: Run) -> list[Stretch]:
    """The run from its first to its last edit: quiet, then trouble from the onset, then bad from the first bad edit."""
    if not run.edits:
        return []
    diagnosis, start, end = run.diagnosis(), run.edits[0].edit, run.edits[-1].edit
    bad = diagnosis.first_bad_edit
    onset = diagnosis.onset_edit if diagnosis.onset_edit is not None else bad
    flagged = [finding.start for finding in diagnosis.findings if severity(finding.verdict) > 0]
    # Something odd long before, with nothing between, is no part of the onset; but it was flagged.
    quiet = "nothing flagged" if onset is None or min(flagged, default=onset) >= onset else "before the onset"
    cuts = [
        ("quiet", quiet, start),
        ("onset", "trouble building", onset),
        ("bad", "past the first bad value", bad),
    ]
    known = [(kind, words, max(at, start)) for kind, words, at in cuts if at is not None]
    stretches = []
    for place, (kind, words, first) in enumerate(known):
        last = known[place + 1][2] - 1 if place + 1 < len(known) else end
        if last >= first:
            scale = 1000.0 / (end - start + 1)
            stretches.append(Stretch(kind, words, first, last, (first - start) * scale, (last - first + 1) * scale))
    return stretches


def cause_words(diagnosis: Diagnosis) -> str:
    """The cause with the confidence in it; a dash for a run with nothing to explain."""
    if diagnosis.cause == UNKNOWN_CAUSE:
        return "–" if severity(diagnosis.verdict) == 0 else diagnosis.cause
    return f"{clean(diagnosis.cause, 80)} ({diagnosis.confidence} confidence)"


def landed_words(diagnosis: Diagnosis) -> str:
    """Whether edits took effect; a dash where that could not be seen."""
    if diagnosis.landed is None:
        return "–"
    lost = f", none of the last {number(diagnosis.lost_edits)}" if diagnosis.lost_edits else ""
    return diagnosis.landed + (lost if diagnosis.landed == "some" else "")


def edit_words(edit: int | None) -> str:
    """An edit by its number; a dash for none."""
    return "–" if edit is None else f"edit {edit}"


def facts(diagnosis: Diagnosis, failed: int, *, site_length: int) -> list[tuple[str, str]]:
    """What a diagnosis says in numbers, named, one per line. failed: how many edits did."""
    where = edit_words(diagnosis.first_bad_edit)
    if diagnosis.first_bad_site is not None:
        where += f", {shorten(diagnosis.first_bad_site, site_length)}, {clean(diagnosis.first_bad_metric, 80)}"
    return [
        ("edits", number(diagnosis.edits) + (f", {number(failed)} failed" if failed else "")),
        ("took effect", landed_words(diagnosis)),
        ("onset, in hindsight", edit_words(diagnosis.onset_edit)),
        ("alarm, as it ran", edit_words(diagnosis.alarm_edit)),
        ("first bad", where),
        ("first NaN or ∞", edit_words(diagnosis.first_nonfinite_edit)),
        ("cause", cause_words(diagnosis)),
        ("forecast", clean(diagnosis.forecast.says, 300) if diagnosis.forecast else "–"),
    ]


def first_of_each_kind(findings: Sequence[Finding]) -> list[Finding]:
    """What is seen at once: what a rule says of a metric for the first time, wherever that is. In their order."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        first.setdefault((finding.rule, finding.metric), finding)
    return list(first.values())


def telling(diagnosis: Diagnosis, most: int) -> list[Finding]:
    """The first finding of each kind, at most `most` of them, in order of edit.

    Of too many: that of the first bad reading, the alarm's, the first of each verdict, and then the earliest: once a
    run is past its end, everything is NaN, and says no more.
    """
    first, culprit = first_of_each_kind(diagnosis.findings), _culprit(diagnosis)
    known = [each for each in diagnosis.findings if each in first or each is culprit]
    firsts = {each.verdict: each for each in reversed(known)}

    def rank(finding: Finding) -> tuple[bool, bool, bool, bool]:
        alarm = finding.edit == diagnosis.alarm_edit and severity(finding.verdict) >= severity("diverging")
        others = finding is not firsts[finding.verdict], severity(finding.verdict) == 0
        return finding is not culprit, not alarm, *others

    kept = sorted(known, key=rank)[:most]
    return [each for each in known if each in kept]


def _culprit(diagnosis: Diagnosis) -> Finding | None:
    """The finding about the first bad reading; where none is about that edit, the first about its site and metric."""
    where = diagnosis.first_bad_site, diagnosis.first_bad_metric
    about = [each for each in diagnosis.findings if (each.site, each.metric) == where]
    return next((each for each in about if each.start == diagnosis.first_bad_edit), about[0] if about else None)
