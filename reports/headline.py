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
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE
from stabilitylab.record.run import Run
from stabilitylab.reports.events import begins
from stabilitylab.reports.text import clean, shorten
from stabilitylab.reports.verdicts import COLLAPSE, collapse, end

CONFIDENCE: Final[dict[Confidence, str]] = {
    "high": "high: the readings show the mechanism itself",
    "medium": "medium: the readings show what it leaves behind, which little else does",
    "low": "low: the readings agree with it, and with other explanations as well",
    "none": "none: no rule speaks",
}

_BAD: Final = frozenset({"drifting", "diverging", "collapsed", "non-finite"})
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


def sentence(diagnosis: Diagnosis) -> tuple[Part, ...]:
    """One sentence: since when, and when it ended."""
    if not _is_bad(diagnosis):
        return (Part(clean(diagnosis.says, 700)),)
    return (Part("The model "), *_course(diagnosis), Part("."))


def place(diagnosis: Diagnosis, places: Mapping[str, str]) -> tuple[Part, ...]:
    """A second one: where to look first, and the reading there. Empty for a sound run. places: sites' short names."""
    if not _is_bad(diagnosis):
        return ()
    first = diagnosis.findings[0]
    name, whole = places.get(first.site) or shorten(first.site, 60), clean(first.site, 300)
    kind = "" if first.site in {MODEL_SITE, EDITOR_SITE} else "layer "
    if first.site.startswith(f"{EDITOR_SITE}."):
        kind = "the editor's "
    return (Part(f"Look first at {kind}"), Part(name, first, whole), Part(f": {clean(reading(first), 120)}."))


def headline(diagnosis: Diagnosis, places: Mapping[str, str]) -> str:
    """Both sentences as text."""
    said = ["".join(part.words for part in parts) for parts in (sentence(diagnosis), place(diagnosis, places))]
    return " ".join(filter(None, said))


def _is_bad(diagnosis: Diagnosis) -> bool:
    return diagnosis.verdict in _BAD and bool(diagnosis.findings) and not diagnosis.nothing_lands


def _course(diagnosis: Diagnosis) -> Iterator[Part]:
    """What the model was, from when on. What comes at the onset itself is not said to follow it."""
    since = diagnosis.onset_edit if diagnosis.onset_edit is not None else diagnosis.first_bad_edit
    last, how = end(diagnosis)
    if last is None:
        doing = f"has been {diagnosis.verdict} since edit {since}" if since is not None else "was bad from the start"
        yield Part(doing, begins(diagnosis.findings, since))
        return
    if since is not None and since < last:
        yield Part(f"was diverging from edit {since}", begins(diagnosis.findings, since))
        yield Part(" and ")
    if how == COLLAPSE:
        yield Part(
            f"{'' if since is not None and since < last else 'was '}of no use from edit {last} on",
            begins(_of("collapsed", diagnosis), last),
        )
    else:
        yield Part(f"came to NaN or ∞ at edit {last}", begins(_of("non-finite", diagnosis), last))


def _of(verdict: str, diagnosis: Diagnosis) -> tuple[Finding, ...]:
    return tuple(finding for finding in diagnosis.findings if finding.verdict == verdict)


def lead(diagnosis: Diagnosis) -> str | None:
    """How long before the end the alarm was raised, where a run had an end."""
    last, name = diagnosis.first_nonfinite_edit, "first NaN or ∞"
    if last is None and diagnosis.verdict == "collapsed":
        last, name = collapse(diagnosis), COLLAPSE
    if last is None or diagnosis.alarm_edit is None:
        return None
    ahead = last - diagnosis.alarm_edit
    if ahead <= 0:
        return f"none: raised with the {name}"
    return f"{ahead} edit{'s' if ahead != 1 else ''} before the {name}"


def telling(run: Run, diagnosis: Diagnosis) -> tuple[str, str] | None:
    """(metric, site) of the reading that tells the run: the headline's if it moves, else the first known one that does.

    None where nothing moves.
    """
    findings = diagnosis.findings[:1]
    site = findings[0].site if findings else MODEL_SITE
    tries = [(metric, site) for finding in findings for metric in (*_sizes(finding.metric), finding.metric)]
    for metric in _TELLING:
        sites = run.sites_of(metric)
        tries += [(metric, site if site in sites else sites[0])] if sites else []
    return next((each for each in tries if _moves(run, *each)), None)


def _sizes(metric: str) -> tuple[str, ...]:
    """What led to a count of values that are not finite: how large the values were."""
    family, _, what = metric.partition(".")
    return tuple(f"{family}.{size}" for size in ("max_abs", "norm", "max")) if what == "nonfinite" else ()


def _moves(run: Run, metric: str, site: str) -> bool:
    if site not in run.sites_of(metric) or run.metric(metric).length > 1:
        return False
    values = run.series(metric, site)
    return bool(np.unique(values[np.isfinite(values)]).size > 2)
