"""Several runs on one page: how long each kept its verdict, what it cost in drift, and the main metrics side by side.

The page's data (also saved beside it as JSON) is one object: ``runs``, a list of what each diagnosis says with its
``stretches`` (verdict, first, last: the edits over which it held) and ``series``; values are written as in
`stabilitylab.reports.payload`. ``series`` holds, by metric, ``edit`` and ``value``: of several layers the one that is
furthest along, see ``furthest``. ``survival`` holds a curve each of the runs that are ``not diverging`` and of those
that are ``of use``, as `stabilitylab.analysis.survival` has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from stabilitylab.analysis.findings import VERDICTS, Verdict, json_safe, severity
from stabilitylab.analysis.grouping import Group
from stabilitylab.analysis.ledger import FURTHEST
from stabilitylab.analysis.survival import Survival, survival
from stabilitylab.record.homes import homeless
from stabilitylab.record.readings import Array
from stabilitylab.record.run import Run
from stabilitylab.reports import events, headline, verdicts
from stabilitylab.reports.comparison_charts import RUNS, comparison_charts
from stabilitylab.reports.html import data_script, fill, write_pages
from stabilitylab.reports.payload import as_script, distinct, readable, shown
from stabilitylab.reports.text import clean
from stabilitylab.reports.thinning import flagged_edits, thinned

FORMAT: Final = 1
EVENTS: Final = 4
"""What was found that is told of each run."""
LASTING: Final[Mapping[str, Verdict]] = {"not diverging": "diverging", "of use": "collapsed"}
"""What a run may keep, and the first verdict that says that it has lost it."""
COLUMNS: Final = 6
"""Steps of edits for which the numbers of a survival curve are told."""
MOST_POINTS: Final = 400
"""Edits per run and metric; flagged ones are there in any case."""
METRICS: Final = (
    "canary.agreement", "canary.kl", "canary.perplexity", "update.norm", "drift.ratio", "weight.headroom_bits",
    "activation.max_abs", "gradient.norm", "editor.input_max",
)  # fmt: skip


def write_comparison(runs: Sequence[Run], out: str | Path) -> Path:
    """Write the page that compares `runs` to `out`, and its data beside it as JSON. Returns `out`.

    Raises RunError when it can't be written there.
    """
    plain = compared(runs)
    return write_pages(out, lambda: (_page(runs, plain), plain))


def stretches(run: Run) -> list[dict[str, Any]]:
    """The edits over which each verdict held, as the findings established them: verdict, first, last."""
    if not run.edits:
        return []
    start, end = run.edits[0].edit, run.edits[-1].edit
    worst = 0
    parts: list[dict[str, Any]] = [{"verdict": VERDICTS[0], "first": start, "last": end}]
    claims = [finding for finding in run.diagnosis().findings if finding.rule != FURTHEST]  # which only says where
    for finding in sorted(claims, key=lambda finding: finding.edit):
        if severity(finding.verdict) > worst:
            worst = severity(finding.verdict)
            parts[-1]["last"] = finding.edit - 1
            parts.append({"verdict": finding.verdict, "first": finding.edit, "last": end})
    return [part for part in parts if part["last"] >= part["first"]]


def furthest(run: Run, metric: str) -> Array | None:
    """Of all layers, the reading that is furthest along: the smallest of room left, else the largest. [edits].

    NaN where one of them is, and where none was taken. None for a metric that was never read.
    """
    sites = run.sites_of(metric)
    if not sites or run.metric(metric).length > 1:
        return None
    values = np.array([run.series(metric, site) for site in sites])
    there = np.array([run.present(metric, site) for site in sites])
    room = metric.endswith("headroom_bits")
    edge = np.inf if room else -np.inf
    filled = np.where(there, values, edge)
    along: Array = filled.min(axis=0) if room else filled.max(axis=0)
    return np.where(there.any(axis=0), along, np.nan)


def compared(runs: Sequence[Run]) -> dict[str, Any]:
    """The page's data."""
    names = distinct([clean(run.path.name or run.path, 60) for run in runs])
    known = {metric.name: metric for run in reversed(runs) for metric in run.metrics}
    return {
        "format": FORMAT,
        "metrics": [
            {"name": name, "scale": known[name].scale, "meaning": clean(known[name].meaning, 400)}
            for name in METRICS
            if name in known
        ],
        "survival": {name: _plain(curve) for name, curve in survivals(runs).items()},
        "runs": [_one(run, name) for run, name in zip(runs, names, strict=True)],
    }


def _plain(curve: Survival) -> dict[str, list[float]]:
    return {name: list(values) for name, values in asdict(curve).items()}


def survivals(runs: Sequence[Run]) -> dict[str, Survival]:
    """How long runs keep what each of `LASTING` names; a run that ended before it lost it is censored."""
    cut = [parts for run in runs if (parts := stretches(run))]
    curves = {}
    for name, lost in LASTING.items():
        first = [_first(parts, severity(lost)) for parts in cut]
        last = [parts[-1]["last"] if at is None else at for at, parts in zip(first, cut, strict=True)]
        curves[name] = survival(last, [at is not None for at in first])
    return curves


def _first(parts: Sequence[Mapping[str, Any]], level: int) -> int | None:
    """The edit at which a verdict of this severity began."""
    return next((part["first"] for part in parts if severity(part["verdict"]) >= level), None)


def _counted(plain: Mapping[str, Any]) -> tuple[list[int], list[tuple[str, list[tuple[int, float]]]]]:
    """Round edits, and by curve how many runs were at risk at each and the share that held: the numbers below it."""
    curves = {name: Survival(**curve) for name, curve in plain["survival"].items()}
    end = max((curve.edits[-1] for curve in curves.values() if curve.edits), default=0)
    step = next(whole for size in range(12) for unit in (1, 2, 5) if (whole := unit * 10**size) * COLUMNS >= end)
    edits = list(range(0, end + 1, step))
    return edits, [(name, [curve.at(edit) for edit in edits]) for name, curve in curves.items() if curve.edits]


def _one(run: Run, name: str) -> dict[str, Any]:
    diagnosis = run.diagnosis()
    places = thinned(run, MOST_POINTS, flagged_edits(run))
    series = {}
    for metric in METRICS:
        along = furthest(run, metric) if metric in {each.name for each in run.metrics} else None
        if along is None:
            continue
        there = np.any([run.present(metric, site) for site in run.sites_of(metric)], axis=0)
        series[metric] = {
            "edit": [run.edits[place].edit for place in places],
            "value": [shown(float(along[place])) if there[place] else None for place in places],
        }
    found = {key: value for key, value in diagnosis.to_json().items() if key != "findings"}
    about: dict[str, Any] = readable(json_safe({"path": homeless(str(run.path)), "complete": run.complete, **found}))
    return {"name": name, **about, "edits_kept": len(places), "stretches": stretches(run), "series": series}


def _events(run: Run, places: Mapping[str, str]) -> list[tuple[Group, str]]:
    return [(event, events.event_words(event, places)) for event in events.telling(run.diagnosis(), EVENTS)]


def _row(run: Run, told: dict[str, Any]) -> dict[str, Any]:
    diagnosis, places = run.diagnosis(), events.short_places(run.sites)
    return {
        "told": told,
        "diagnosis": diagnosis,
        "places": places,
        "says": headline.headline(diagnosis, places),
        "why": verdicts.why_apart(diagnosis),
        "lead": headline.lead(diagnosis),
        "chain": verdicts.chain(diagnosis),
        "landed": verdicts.landed_words(diagnosis),
        "events": _events(run, places),
    }


def _page(runs: Sequence[Run], plain: dict[str, Any]) -> str:
    last = max((part["last"] for run in plain["runs"] for part in run["stretches"]), default=0)
    return fill(
        "compare.html.j2",
        "compare.js",
        data=Markup(as_script(json.dumps(plain, allow_nan=False))),
        charts=data_script(json.dumps(comparison_charts())),
        rows=[_row(run, told) for run, told in zip(runs, plain["runs"], strict=True)],
        looks=verdicts.LOOKS,
        severities={verdict: severity(verdict) for verdict in VERDICTS},
        span=last + 1,
        counted=_counted(plain),
        looks_of_runs=RUNS,
        thinned=any(told["edits_kept"] < len(run.edits) for told, run in zip(plain["runs"], runs, strict=True)),
    )
