"""How a verdict looks and what it means in plain words; what a diagnosis says in numbers; a run at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.causes.lost import EDITS_FAILING
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Verdict, severity
from stabilitylab.analysis.leading import edit_of
from stabilitylab.analysis.ledger import DRIFT_RULES
from stabilitylab.analysis.operation import OPERATION
from stabilitylab.analysis.operation import where as operation_where
from stabilitylab.record.run import Run
from stabilitylab.reports.text import clean, number, sentence, shorten, with_short_names


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
        "As far as it was watched, the model does what it did, and nothing grows towards a limit.",
    ),
    "drifting": Look(
        "Drifting", "◐", "yellow", "v-drifting",
        "Something grows or shrinks, or a size is out of line. What the model does is still what it was.",
    ),
    "diverging": Look(
        "Diverging", "▲", "dark_orange3", "v-diverging",
        "The model is leaving what it did, or a trend will reach a hard limit. Go back to before the onset.",
    ),
    "collapsed": Look(
        "Collapsed", "■", "magenta", "v-collapsed",
        "All numbers are finite, and what the model did is gone. A check for NaN alone would not see this.",
    ),
    "non-finite": Look(
        "Non-finite", "✖", "red", "v-nonfinite",
        "A state that stays, or an output that was sound before any edit, is NaN or infinite. Nothing computed from it"
        " can be trusted.",
    ),
}  # fmt: skip


COLLAPSE: Final = "collapse"
"""The end of a run whose numbers stay finite."""


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
    """The run from its first to its last edit: quiet, trouble from the onset, past a limit, then what it ended in."""
    if not run.edits:
        return []
    diagnosis, start, stop = run.diagnosis(), run.edits[0].edit, run.edits[-1].edit
    ended, how = end(diagnosis)
    bad = _bad_from(diagnosis)
    onset = diagnosis.onset_edit if diagnosis.onset_edit is not None else bad
    flagged = [finding.start for finding in diagnosis.findings if severity(finding.verdict) > 0]
    # Something odd long before, with nothing between, is no part of the onset; but it was flagged.
    quiet = "nothing flagged" if onset is None or min(flagged, default=onset) >= onset else "before the onset"
    cuts = [
        ("quiet", quiet, start),
        ("onset", "trouble building", onset),
        ("bad", "past a limit", bad),
        ("ended", "collapsed" if how == COLLAPSE else how, ended),
    ]
    known = [(kind, words, max(at, start)) for kind, words, at in cuts if at is not None]
    stretches = []
    for place, (kind, words, first) in enumerate(known):
        last = min((at for _, _, at in known[place + 1 :]), default=stop + 1) - 1
        if last >= first:
            scale = 1000.0 / (stop - start + 1)
            stretches.append(Stretch(kind, words, first, last, (first - start) * scale, (last - first + 1) * scale))
    return stretches


def _bad_from(diagnosis: Diagnosis) -> int | None:
    """The first edit that a bad finding is about, of hard facts if there are any: finding 1 may only lead there."""
    bad = [each for each in diagnosis.findings if severity(each.verdict) >= severity("diverging")]
    hard = [each for each in bad if each.rule not in DRIFT_RULES]
    return min((edit_of(each) for each in hard or bad), default=diagnosis.first_bad_edit)


def collapse(diagnosis: Diagnosis) -> int | None:
    """The first edit that a finding calls collapsed."""
    return min((each.start for each in diagnosis.findings if each.verdict == "collapsed"), default=None)


def end(diagnosis: Diagnosis) -> tuple[int | None, str]:
    """The edit at which the run came to its end, and what that is: the first NaN or infinity, or the collapse."""
    if diagnosis.first_nonfinite_edit is not None:
        return diagnosis.first_nonfinite_edit, "NaN or ∞"
    return collapse(diagnosis), COLLAPSE


def why(diagnosis: Diagnosis) -> str:
    """What the cause says; empty where the verdict's sentence has said it, or what the traced operation did."""
    if told_first(diagnosis) == OPERATION or _raised(diagnosis):
        return ""
    says = diagnosis.cause_says
    return "" if says.rstrip(".").lower() in diagnosis.says.lower() else says


def why_apart(diagnosis: Diagnosis) -> str:
    """What the cause says, or without one what the traced operation did: where the headline does not say why."""
    if _raised(diagnosis):
        return ""
    first = told_first(diagnosis)
    return next((link.says for link in diagnosis.causes if link.cause == first), diagnosis.cause_says)


def told_first(diagnosis: Diagnosis) -> str:
    """The name of the link that is told before the chain: the cause, or without one the traced operation."""
    return OPERATION if diagnosis.cause == UNKNOWN_CAUSE and diagnosis.operation is not None else diagnosis.cause


def _raised(diagnosis: Diagnosis) -> bool:
    """Whether no edit lands because each raises: the verdict's sentence says so, with the exception."""
    return diagnosis.nothing_lands and diagnosis.cause == EDITS_FAILING


def chain(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """(role, what it says) of each cause but the one that is told first."""
    return [(link.role, link.says) for link in diagnosis.causes if link.cause != told_first(diagnosis)]


def causes(diagnosis: Diagnosis, places: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The chain of causes: (role and edit, its name, what it says). places: the short name of each site.

    Of the one that is told first, what it says stands above already; where it is the only one, there is no chain.
    """
    if [link.cause for link in diagnosis.causes] == [told_first(diagnosis)]:
        return []
    return [
        (
            clean(link.role, 20) + ("" if link.edit is None else f", edit {link.edit}"),
            clean(link.cause, 60),
            "Told above; what to act on first."
            if link.cause == told_first(diagnosis)
            else sentence(with_short_names(clean(link.says, 500), places)),
        )
        for link in diagnosis.causes
    ]


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


def facts(diagnosis: Diagnosis, failed: int, places: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a diagnosis says in numbers, named, one per line. failed: how many edits did. places: sites' short names."""
    where, site = edit_words(diagnosis.first_bad_edit), diagnosis.first_bad_site
    full = "" if site is None else shorten(site, 160)
    short = full if site is None else places.get(site, full)
    if site is not None:
        where += f", {short}, {clean(diagnosis.first_bad_metric, 80)}"
    return [
        ("edits", number(diagnosis.edits) + (f", {number(failed)} failed" if failed else "")),
        ("took effect", landed_words(diagnosis)),
        *[("not watched", clean("; ".join(diagnosis.unwatched), 300))][: len(diagnosis.unwatched)],
        ("onset, in hindsight", edit_words(diagnosis.onset_edit)),
        ("alarm, as it ran", edit_words(diagnosis.alarm_edit)),
        ("first bad", where),
        *([(f"{short} is", full)] if full.endswith(f".{short}") else []),
        ("first NaN or ∞", edit_words(diagnosis.first_nonfinite_edit)),
        *([] if diagnosis.operation is None else [("operation", clean(operation_where(diagnosis.operation), 160))]),
        ("cause", cause_words(diagnosis)),
        ("forecast", clean(diagnosis.forecast.says, 300) if diagnosis.forecast else "–"),
    ]
