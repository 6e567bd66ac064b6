"""What a notebook shows of a run, a diagnosis, a finding and a catalogue: HTML with no script and no sheet of its own.

Everything that comes from the run is text: cleaned, cut to a readable length, escaped by jinja2.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, singledispatch
from importlib.resources import files
from typing import Any, Final

import jinja2

from stabilitylab.analysis.findings import Diagnosis, Finding, Verdict
from stabilitylab.analysis.grouping import grouped
from stabilitylab.record.run import Run
from stabilitylab.reports.events import event_words, short_places, telling
from stabilitylab.reports.pacing import time_in_probes
from stabilitylab.reports.text import clean, limit, number, percent, shorten
from stabilitylab.reports.verdicts import LOOKS, chain, facts, why

FINDINGS_SHOWN: Final = 12

_GROUNDS: Final[dict[Verdict, str]] = {
    "stable": "#1b6e42",
    "drifting": "#7d5a00",
    "diverging": "#a5480a",
    "collapsed": "#7f3a92",
    "non-finite": "#b3123f",
}
"""Behind white words: at least 5 to 1, whatever is around the badge."""


@cache
def _macros() -> Any:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(looks=LOOKS, grounds=_GROUNDS)
    environment.filters.update(clean=clean, shorten=shorten)
    source = files("stabilitylab.reports").joinpath("templates").joinpath("notebook.html.j2").read_text("utf-8")
    return environment.from_string(source).module


@singledispatch
def html(shown: Any) -> str:
    """HTML for a Run, a Diagnosis, a Finding or a tuple of metrics. Raises TypeError for anything else."""
    raise TypeError(f"no display of a {type(shown).__name__}; expected a Run, Diagnosis, Finding or tuple of metrics")


@html.register
def _(shown: Run) -> str:
    diagnosis = shown.diagnosis()
    failed = sum(edit.status == "failed" for edit in shown.edits)
    rows = [
        *_facts(diagnosis, failed),
        (
            "watched",
            f"{len(shown.sites)} sites, {sum(bool(shown.sites_of(each.name)) for each in shown.metrics)} metrics",
        ),
        ("time in probes", time_in_probes(shown)),
        ("time in the canary", percent(shown.canary_time_share)),
        ("time in the tracer", percent(shown.trace_time_share)),
    ]
    goes_on = "" if shown.closed else " (not closed: it goes on, or it ended without a word)"
    return _page(f"{shorten(str(shown.path), 300)}{goes_on}", diagnosis, rows, shown.sites)


@html.register
def _(shown: Diagnosis) -> str:
    return _page("", shown, _facts(shown), [finding.site for finding in shown.findings])


@html.register
def _(shown: Finding) -> str:
    when = f"{shown.edit}" if shown.since in {None, shown.edit} else f"{shown.edit}, about edits since {shown.since}"
    rows = [
        ("edit", when),
        ("site", shorten(shown.site, 160)),
        ("metric", clean(shown.metric, 80)),
        ("value", number(shown.value) + (f" → {number(shown.forecast)}" if shown.forecast is not None else "")),
        ("threshold", limit(shown.threshold)),
        ("rule", clean(shown.rule, 80)),
    ]
    return str(_macros().finding(shown.verdict, clean(shown.says, 700), rows))


@html.register
def _(shown: tuple) -> str:  # type: ignore[type-arg]
    return str(_macros().catalogue(shown))


def _page(caption: str, diagnosis: Diagnosis, rows: list[tuple[str, str]], sites: Iterable[str]) -> str:
    events, places = telling(diagnosis, FINDINGS_SHOWN), short_places(sites)
    found = [(event.edit, event.verdict, event_words(event, places)) for event in events]
    left = len(grouped(diagnosis.findings)) - len(events)
    advice = clean(diagnosis.advice, 900)
    links = [(role, clean(says, 500)) for role, says in chain(diagnosis)]
    says = clean(diagnosis.says, 700)
    return str(
        _macros().diagnosis(
            caption, diagnosis.verdict, says, clean(why(diagnosis), 700), links, advice, rows, found, left
        )
    )


def _facts(diagnosis: Diagnosis, failed: int = 0) -> list[tuple[str, str]]:
    return [
        *facts(diagnosis, failed, {}),
        ("baseline", clean(diagnosis.baseline, 200)),
        ("limits", clean(diagnosis.thresholds, 300).removeprefix("limits ")),
    ]
