"""What a notebook shows of a run, a diagnosis, a finding and a catalogue: HTML with no script and no sheet of its own.

Everything that comes from the run is text: cleaned, cut to a readable length, escaped by jinja2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, singledispatch
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import jinja2

from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Finding, Verdict
from stabilitylab.analysis.grouping import grouped
from stabilitylab.record.run import Run
from stabilitylab.reports import manifest, operations
from stabilitylab.reports.events import event_words, short_places, telling
from stabilitylab.reports.headline import CONFIDENCE, headline
from stabilitylab.reports.pacing import time_in_probes
from stabilitylab.reports.text import clean, limit, number, percent, sentence, shorten, with_short_names
from stabilitylab.reports.verdicts import LOOKS, causes, facts, why_apart

if TYPE_CHECKING:
    from stabilitylab.reports.pictures import Chart

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
    from stabilitylab.reports.pictures import telling_curve  # matplotlib, which nothing else here needs

    diagnosis, places = shown.diagnosis(), short_places(shown.sites)
    failed = sum(edit.status == "failed" for edit in shown.edits)
    rows = [
        *_facts(diagnosis, places, failed),
        (
            "watched",
            f"{len(shown.sites)} sites, {sum(bool(shown.sites_of(each.name)) for each in shown.metrics)} metrics",
        ),
        ("time in probes", time_in_probes(shown)),
        ("time in the canary", percent(shown.canary_time_share)),
        ("time in the tracer", percent(shown.trace_time_share)),
    ]
    goes_on = "" if shown.closed else " (not closed: it goes on, or it ended without a word)"
    title = manifest.title(shown.manifest, diagnosis.edits)
    curve = telling_curve(shown, dark=False)
    return _page(title, f"{shorten(str(shown.path), 300)}{goes_on}", diagnosis, places, rows, curve)


@html.register
def _(shown: Diagnosis) -> str:
    places = short_places(finding.site for finding in shown.findings)
    return _page("", "", shown, places, _facts(shown, places), None)


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


def _page(
    title: str,
    caption: str,
    diagnosis: Diagnosis,
    places: Mapping[str, str],
    rows: list[tuple[str, str]],
    curve: Chart | None,
) -> str:
    """As on the page: who and what, the sentence, why, what to do, the curve that tells it; then what it rests on."""
    events = telling(diagnosis, FINDINGS_SHOWN)
    why = with_short_names(clean(why_apart(diagnosis), 700), places)
    known = diagnosis.cause != UNKNOWN_CAUSE
    return str(
        _macros().diagnosis(
            title,
            caption,
            diagnosis.verdict,
            with_short_names(headline(diagnosis, places), places),
            f"Why: {clean(diagnosis.cause, 60)}" if known else "Why",
            f"{sentence(why)} Confidence {CONFIDENCE[diagnosis.confidence]}." if known and why else sentence(why),
            with_short_names(clean(diagnosis.advice, 900), places),
            curve,
            causes(diagnosis, places),
            [] if diagnosis.operation is None else operations.facts(diagnosis.operation, places),
            rows,
            [(event.edit, event.verdict, event_words(event, places)) for event in events],
            len(grouped(diagnosis.findings)) - len(events),
        )
    )


def _facts(diagnosis: Diagnosis, places: Mapping[str, str], failed: int = 0) -> list[tuple[str, str]]:
    return [
        *facts(diagnosis, failed, places),
        ("baseline", clean(diagnosis.baseline, 200)),
        ("limits", clean(diagnosis.thresholds, 300).removeprefix("limits ")),
    ]
