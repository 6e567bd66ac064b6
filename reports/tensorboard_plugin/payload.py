"""A run as it is sent to the page: what there is as plain JSON values, readings as packed float64.

JSON has no NaN, and an absent reading is not a NaN: readings are sent as raw numbers with a byte each that says whether
the reading was taken. Nothing is thinned. Text is made harmless here (`stabilitylab.reports.text.clean`) and is shown
as text there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.findings import Diagnosis, json_safe
from stabilitylab.analysis.grouping import grouped
from stabilitylab.record.readings import Metric
from stabilitylab.record.run import Run
from stabilitylab.reports import events, headline, manifest, verdicts
from stabilitylab.reports.noted import missing
from stabilitylab.reports.operations import facts as operation_facts
from stabilitylab.reports.pacing import time_in_probes
from stabilitylab.reports.text import clean, sentence, short_names, shorten, with_short_names

LABEL: Final = 300
SITE: Final = 200
SHORT: Final = 32
SAYS: Final = 2_000
NOTES: Final = 200

_ALIGNMENT: Final = 8
_MARKS: Final = (("onset_edit", "onset"), ("alarm_edit", "alarm"), ("first_bad_edit", "first bad"))


def measured(run: Run) -> tuple[Metric, ...]:
    """The metrics that were read at least once; a metric's place here is its number on the page."""
    return tuple(metric for metric in run.metrics if run.sites_of(metric.name))


def summary(run: Run, diagnosis: Diagnosis) -> dict[str, Any]:
    """One line of the list of runs."""
    look = verdicts.LOOKS[diagnosis.verdict]
    where = diagnosis.first_bad_site
    return {
        "edits": len(run),
        "last_edit": run.edits[-1].edit if run.edits else None,
        "complete": run.closed,
        "verdict": diagnosis.verdict,
        "word": look.word,
        "sign": look.sign,
        "onset_edit": diagnosis.onset_edit,
        "first_bad_edit": diagnosis.first_bad_edit,
        "first_bad_site": None if where is None else events.short_places(run.sites).get(where) or shorten(where, 60),
        "cause": clean(diagnosis.cause, 80),
        "landed": verdicts.landed_words(diagnosis),
        "nothing_lands": diagnosis.nothing_lands,
        "forecast": _forecast(diagnosis),
    }


def distinct(names: Sequence[str]) -> list[str]:
    """`names`, those that cutting and cleaning made alike told apart: the page knows metrics and sites by name."""
    found: dict[str, None] = {}
    for name in names:
        number, told = 2, name
        while told in found:
            told, number = f"{name} #{number}", number + 1
        found[told] = None
    return list(found)


def _forecast(diagnosis: Diagnosis) -> str | None:
    return None if diagnosis.forecast is None else sentence(clean(diagnosis.forecast.says, SAYS))


def about(run: Run, diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything of a run but its readings: diagnosis, edits, metrics, sites. Plain JSON values."""
    sites, metrics = run.sites, measured(run)
    short, notes = events.short_places(sites), missing(run.notes)
    places = {site: place for place, site in enumerate(sites)}
    numbers = {metric.name: place for place, metric in enumerate(metrics)}
    return {
        **summary(run, diagnosis),
        "sites": distinct([shorten(site, SITE) for site in sites]),
        "metrics": [
            {"name": name, **_metric(metric, run.sites_of(metric.name), places)}
            for name, metric in zip(distinct([clean(metric.name, 80) for metric in metrics]), metrics, strict=True)
        ],
        "number": [edit.edit for edit in run.edits],
        "label": [clean(edit.label, LABEL) for edit in run.edits],
        "status": [clean(edit.status, 20) for edit in run.edits],
        "outcome": [None if edit.outcome is None else clean(edit.outcome, 20) for edit in run.edits],
        "error": [None if edit.row.error is None else clean(edit.row.error, SAYS) for edit in run.edits],
        "seconds": json_safe([edit.row.seconds for edit in run.edits]),
        "title": manifest.title(run.manifest, diagnosis.edits),
        "diagnosis": _diagnosis(diagnosis, short),
        "curve": _curve(run, diagnosis, numbers, places),
        "marks": [
            {"edit": getattr(diagnosis, field), "name": name}
            for field, name in _MARKS
            if getattr(diagnosis, field) is not None
        ],
        "findings": json_safe(
            [
                {
                    "metric": numbers.get(finding.metric),
                    "site": places.get(finding.site),
                    "edit": finding.edit,
                    "start": finding.start,
                    "value": finding.value,
                    "threshold": finding.threshold,
                    "says": clean(finding.says, SAYS),
                    "verdict": finding.verdict,
                    "sign": verdicts.LOOKS[finding.verdict].sign,
                }
                for finding in diagnosis.findings
            ]
        ),
        "events": [
            {
                "edit": event.edit,
                "verdict": event.verdict,
                "sign": verdicts.LOOKS[event.verdict].sign,
                "says": events.event_words(event, short),
                "members": len(event.members),
            }
            for event in grouped(diagnosis.findings)
        ],
        "notes": [{"edit": note.edit, "says": clean(note.says, SAYS)} for note in notes[:NOTES]],
        "notes_left_out": max(0, len(notes) - NOTES),
        "environment": manifest.environment(run.manifest),
        "time_in_probes": time_in_probes(run),
        "canary_time_share": json_safe(run.canary_time_share),
        "trace_time_share": json_safe(run.trace_time_share),
    }


def _metric(metric: Metric, sites: Sequence[str], places: Mapping[str, int]) -> dict[str, Any]:
    short = short_names(sites, SHORT)
    return {
        "family": clean(metric.family, 40),
        "unit": clean(metric.unit, 40),
        "scale": metric.scale,
        "phase": metric.phase,
        "meaning": clean(metric.meaning, SAYS),
        "formula": clean(metric.formula, 400),
        "length": metric.length,
        "sites": [places[site] for site in sites],
        "short": [short[site] for site in sites],
    }


def _curve(
    run: Run, diagnosis: Diagnosis, metrics: Mapping[str, int], sites: Mapping[str, int]
) -> dict[str, Any] | None:
    """The reading that tells the run, by the numbers of its metric and site, and the edits to mark on it."""
    told = headline.telling(run, diagnosis)
    if told is None:
        return None
    story = [(diagnosis.onset_edit, "onset"), (diagnosis.alarm_edit, "alarm"), verdicts.end(diagnosis)]
    marks = [{"edit": edit, "name": name} for edit, name in story if edit is not None]
    return {"metric": metrics[told[0]], "site": sites[told[1]], "marks": marks}


def _diagnosis(diagnosis: Diagnosis, places: Mapping[str, str]) -> dict[str, Any]:
    """places: the short name of each site."""
    look = verdicts.LOOKS[diagnosis.verdict]

    def told(words: str) -> str:
        return sentence(with_short_names(clean(words, SAYS), places))

    return {
        "says": with_short_names(clean(headline.headline(diagnosis, places), SAYS), places),
        "means": look.means,
        "cause": clean(diagnosis.cause, 80),
        "cause_says": told(verdicts.why_apart(diagnosis)),
        "confidence": headline.CONFIDENCE[diagnosis.confidence],
        "advice": told(diagnosis.advice),
        "operation": [] if diagnosis.operation is None else operation_facts(diagnosis.operation, places),
        "causes": [list(link) for link in verdicts.causes(diagnosis, places)],
        "landed": verdicts.landed_words(diagnosis),
        "unwatched": clean("; ".join(diagnosis.unwatched), SAYS),
        "onset_edit": diagnosis.onset_edit,
        "alarm_edit": diagnosis.alarm_edit,
        "first_bad_edit": diagnosis.first_bad_edit,
        "first_nonfinite_edit": diagnosis.first_nonfinite_edit,
        "first_bad_metric": None if diagnosis.first_bad_metric is None else clean(diagnosis.first_bad_metric, 80),
        "first_bad_site": None if diagnosis.first_bad_site is None else shorten(diagnosis.first_bad_site, SITE),
        "baseline": clean(diagnosis.baseline, SAYS),
        "thresholds": clean(diagnosis.thresholds, SAYS),
    }


def metric_block(run: Run, metric: Metric) -> bytes:
    """One metric at all of its sites, packed: [sites, edits]; of a metric that holds several values, the first."""
    sites = run.sites_of(metric.name)
    values = np.full((len(sites), len(run.edits)), np.nan)
    there = np.zeros(values.shape, dtype=np.bool_)
    for place, site in enumerate(sites):
        series = run.series(metric.name, site)
        values[place] = series[:, 0] if series.ndim == 2 else series
        there[place] = run.present(metric.name, site)
    return packed([("values", values, there)])


def site_block(run: Run, site: str) -> bytes:
    """All readings at one site, packed: per metric, under its number in `measured`, [edits, length]."""
    parts = []
    for number, metric in enumerate(measured(run)):
        if site in run.sites_of(metric.name):
            series = run.series(metric.name, site)
            series = series if series.ndim == 2 else series[:, None]
            sizes = np.array([edit.row.readings.get((metric.name, site), _NOTHING).size for edit in run.edits])
            parts.append((str(number), series, np.arange(series.shape[1]) < sizes[:, None]))
    return packed(parts)


_NOTHING: Final = np.zeros(0)


def packed(parts: Iterable[tuple[str, NDArray[np.float64], NDArray[np.bool_]]]) -> bytes:
    """Named arrays as bytes: the length of a JSON header as uint32, the header, then per part its values and its mask.

    Little-endian. The header, padded with blanks, is a list of ``[name, rows, columns]``; each part is rows × columns
    float64 followed by as many bytes, 1 where the value was taken, padded to a multiple of 8.
    """
    header, body = [], []
    for name, values, there in parts:
        header.append([name, *values.shape])
        mask = there.astype(np.uint8).tobytes()
        body += [values.astype("<f8").tobytes(), mask, bytes(-len(mask) % _ALIGNMENT)]
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    head += b" " * (-(4 + len(head)) % _ALIGNMENT)
    return b"".join([len(head).to_bytes(4, "little"), head, *body])
