"""The first screen in plain words: since when, until when and where, for a newcomer, and the reading that tells it.

The facts are the diagnosis's own; only how they are put is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from stabilitylab.analysis.findings import Confidence, Diagnosis, Finding
from stabilitylab.analysis.leading import reading
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.record.run import Run
from stabilitylab.reports.events import begins
from stabilitylab.reports.text import clean, shorten
from stabilitylab.reports.verdicts import collapse

CONFIDENCE: Final[dict[Confidence, str]] = {
    "high": "high: the readings show the mechanism itself",
    "medium": "medium: the readings show what it leaves behind, which little else does",
    "low": "low: the readings agree with it, and with other explanations as well",
    "none": "none: no rule speaks",
}

_STATES: Final = {
    "drifting": "Drifting", "diverging": "Diverging", "collapsed": "Collapsed", "non-finite": "Diverging"
}  # fmt: skip
_TELLING: Final = (
    "canary.agreement", "canary.kl", "drift.ratio", "update.norm", "activation.max_abs", "gradient.norm"
)  # fmt: skip
"""Readings that tell how a run went, where none of them is the headline's."""


@dataclass(frozen=True)
class Part:
    """A piece of the sentence. finding: what it rests on. title: in full what the words say in short."""

    words: str
    finding: Finding | None = None
    title: str = ""


def sentence(diagnosis: Diagnosis, places: Mapping[str, str]) -> tuple[Part, ...]:
    """One sentence: since when, when it ended, and where first. places: the short name of each site."""
    if diagnosis.verdict not in _STATES or not diagnosis.findings or diagnosis.nothing_lands:
        return (Part(clean(diagnosis.says, 700)),)
    return tuple(_parts(diagnosis, places))


def headline(diagnosis: Diagnosis, places: Mapping[str, str]) -> str:
    """The sentence as text."""
    return "".join(part.words for part in sentence(diagnosis, places))


def _parts(diagnosis: Diagnosis, places: Mapping[str, str]) -> Iterator[Part]:
    findings, first = diagnosis.findings, diagnosis.findings[0]
    since = diagnosis.onset_edit if diagnosis.onset_edit is not None else diagnosis.first_bad_edit
    gone = collapse(diagnosis)
    state = _STATES[diagnosis.verdict]
    if diagnosis.verdict == "collapsed" and gone not in {None, since}:
        state = "Diverging"
    yield Part(f"{state} since edit {since}" if since is not None else "Bad from the start", begins(findings, since))
    if state == "Diverging" and diagnosis.verdict == "collapsed":
        yield Part(", ")
        yield Part(f"of no use from edit {gone} on", begins(_of("collapsed", diagnosis), gone))
    if diagnosis.first_nonfinite_edit is not None:
        yield Part(", ")
        end = diagnosis.first_nonfinite_edit
        yield Part(f"NaN or ∞ at edit {end}", begins(_of("non-finite", diagnosis), end))
    yield Part("; first in ")
    yield Part(places.get(first.site) or shorten(first.site, 60), first, clean(first.site, 300))
    yield Part(f" ({clean(reading(first), 120)}).")


def _of(verdict: str, diagnosis: Diagnosis) -> tuple[Finding, ...]:
    return tuple(finding for finding in diagnosis.findings if finding.verdict == verdict)


def lead(diagnosis: Diagnosis) -> str | None:
    """How long before the end the alarm was raised, where a run had an end."""
    end, name = diagnosis.first_nonfinite_edit, "first NaN or ∞"
    if end is None and diagnosis.verdict == "collapsed":
        end, name = collapse(diagnosis), "collapse"
    if end is None or diagnosis.alarm_edit is None:
        return None
    ahead = end - diagnosis.alarm_edit
    if ahead <= 0:
        return f"none: raised with the {name}"
    return f"{ahead} edit{'s' if ahead != 1 else ''} before the {name}"


def telling(run: Run, diagnosis: Diagnosis) -> tuple[str, str] | None:
    """(metric, site) of the reading that tells the run: the headline's if it moves, else the first known one that does.

    None where nothing moves.
    """
    findings = diagnosis.findings[:1]
    site = findings[0].site if findings else MODEL_SITE
    tries = [(finding.metric, finding.site) for finding in findings]
    for metric in _TELLING:
        sites = run.sites_of(metric)
        tries += [(metric, site if site in sites else sites[0])] if sites else []
    return next((each for each in tries if _moves(run, *each)), None)


def _moves(run: Run, metric: str, site: str) -> bool:
    if site not in run.sites_of(metric) or run.metric(metric).length > 1:
        return False
    values = run.series(metric, site)
    return bool(np.unique(values[np.isfinite(values)]).size > 2)
