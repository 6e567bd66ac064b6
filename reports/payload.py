"""A run as plain JSON: what the page's charts draw, what is saved as ``report.json``, what a server may hand out.

`payload` makes it, `packed` is its short form for a page, and `unpacked` reads either. docs/report.md has the layout.

JSON has no NaN and no infinities. They are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, and a reading
that was not taken is null. Whole numbers below a million are exact; from 1,000 to 100,000 a value is its whole number,
and everything else has four digits, so that it reads the same as the run's own value where reports show three. Text is
cleaned and cut: see `stabilitylab.reports.text`.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count, islice
from typing import Any, Final

import numpy as np

from stabilitylab.analysis.findings import json_safe
from stabilitylab.analysis.ledger import DRIFT_RULES
from stabilitylab.record.homes import homeless
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE, Array, Metric
from stabilitylab.record.run import Run
from stabilitylab.reports import manifest, verdicts
from stabilitylab.reports.text import clean, short_names, shorten
from stabilitylab.reports.thinning import extreme_edits, flagged_edits, thinned

FORMAT: Final = 1
"""Of the layout; a reader should refuse a larger one."""
PACKED_BYTES: Final = 950_000
"""What the packed readings of a page may take."""
MOST_FINDINGS: Final = 500
MOST_EDITS: Final = 5_000
MAIN: Final = ("update.norm", "activation.max_abs", "gradient.norm", "drift.ratio", "weight.headroom_bits")
"""Metrics that, with the first bad one, keep more edits than others where not all fit."""
SPECTRA: Final = 40
"""Edits whose spectra are kept, beside the flagged ones."""

_TEXT: Final = 1_000
_NAME: Final = 160
_LABEL: Final = 300
_SAMPLE: Final = 48
"""Edits, at up to four sites, from which a metric's size is told."""
_STEPS: Final = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (2, 16), (4, 16), (4, 32), (8, 32), (16, 32))
"""Every how many-th edit main and other metrics keep, from the first that fits."""

Value = float | int | str | None


def shown(value: float) -> Value:
    """A reading as JSON holds it: see the module. ``number(shown(value))`` reads like ``number(value)``."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    size = abs(value)
    if size < 1e6 and value == int(value):
        return int(value)
    if 1e3 <= size < 1e5:
        return round(value)
    told = float(f"{value:.3e}")
    if f"{told:.2e}" != f"{value:.2e}":  # rounded twice, it would be rounded up from just below the middle
        told = float(f"{told - math.copysign(10.0 ** (math.floor(math.log10(size)) - 3), told - value):.3e}")
    return told


def all_shown(values: Array) -> list[Value]:
    """`shown` of every value of a flat array, and faster for a long one."""
    size = np.abs(values)
    with np.errstate(all="ignore"):
        exponent = np.floor(np.log10(size))
        digits = values * 10.0 ** (3.0 - exponent)
        whole = np.round(digits)
        rounded = whole / 10.0 ** (3.0 - exponent)
        # Left to `shown`: what is too close to the middle or to a power of ten, what ends in 5, and whole numbers.
        plain = (size >= 1e-9) & (size < 1e3) & (np.abs(digits) > 1000.1) & (np.abs(digits) < 9999.4)
        plain &= (np.abs(digits - np.floor(digits) - 0.5) > 1e-5) & (np.abs(whole) % 10 != 5)
        plain &= rounded != np.floor(rounded)
    told: list[Value] = rounded.tolist()
    for place in np.flatnonzero(~plain).tolist():
        told[place] = shown(float(values[place]))
    return told


def payload(run: Run, budget: int = PACKED_BYTES) -> dict[str, Any]:
    """Everything that is drawn. budget: bytes that the readings may take when packed; beyond it edits are thinned."""
    diagnosis = run.diagnosis()
    found = diagnosis.to_json()
    found["findings"] = found["findings"][:MOST_FINDINGS]
    names = distinct([shorten(site, _NAME) for site in run.sites])
    plain: dict[str, Any] = {
        "format": FORMAT,
        "run": {
            "name": run.path.name,
            "path": homeless(str(run.path)),
            "complete": run.complete,
            "edits": len(run),
            "rows": len(run.edits),
            "probe_time_share": run.probe_time_share,
            "canary_time_share": run.canary_time_share,
            "trace_time_share": run.trace_time_share,
        },
        "diagnosis": found,
        "findings_left_out": max(0, len(diagnosis.findings) - MOST_FINDINGS),
        "phases": [
            {"kind": part.kind, "says": part.words, "first": part.first, "last": part.last}
            for part in verdicts.strip(run)
        ],
        "alarms": [asdict(alarm) for alarm in run.alarms],
        "notes": [asdict(note) for note in run.notes],
        "environment": dict(manifest.environment(run.manifest)),
        "reproduce": manifest.reproduce(run.manifest),
    }
    plain = readable(json_safe(plain))
    short = short_names([name for name in names if name not in {MODEL_SITE, EDITOR_SITE}], 30)
    shorts = distinct([short.get(name, name) for name in names])
    plain["sites"] = [{"name": name, "short": told} for name, told in zip(names, shorts, strict=True)]
    known = dict(zip(run.sites, names, strict=True))
    for finding, true in zip(plain["diagnosis"]["findings"], diagnosis.findings, strict=False):
        finding["place"] = names.index(known[true.site]) if true.site in known else None
        finding["absolute"] = true.rule not in DRIFT_RULES
    bad = diagnosis.first_bad_site
    plain["diagnosis"]["first_bad_place"] = names.index(known[bad]) if bad is not None and bad in known else None
    plain["metrics"], plain["grids"], plain["data"] = _readings(run, _grids(run, budget))
    plain["flagged"] = sorted(flagged_edits(run))
    return plain


def distinct(names: Sequence[str]) -> list[str]:
    """Names that were cut to the same text, told apart by a number."""
    told: dict[str, None] = {}
    for name in names:
        tries = (name if again == 1 else f"{name} ({again})" for again in count(1))
        told[next(each for each in tries if each not in told)] = None
    return list(told)


def readable(value: Any) -> Any:
    """Every string, names of entries too, cleaned and cut."""
    if isinstance(value, str):
        return clean(value, _TEXT)
    if isinstance(value, dict):
        return {clean(key, _NAME): readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [readable(item) for item in value]
    return value


def _grid_of(run: Run, metric: Metric) -> str:
    if metric.length > 1:
        return "spectra"
    if len(run.sites_of(metric.name)) == 1:
        return "all"
    return "main" if metric.name in {*MAIN, run.diagnosis().first_bad_metric} else "other"


def _grids(run: Run, budget: int) -> dict[str, list[int]]:
    """Places in ``run.edits`` at which the readings of each grid are kept, so that they fit into `budget` bytes."""
    flagged, edits = flagged_edits(run), min(len(run.edits), MOST_EDITS)
    every = thinned(run, edits, flagged, () if len(run.edits) <= edits else extreme_edits(run))
    spectra = thinned(run, SPECTRA, flagged)
    known = [(metric, run.sites_of(metric.name)) for metric in run.metrics]
    sizes = [(_grid_of(run, metric), _bytes_per_row(run, metric, sites)) for metric, sites in known if sites]
    for main, other in _STEPS:
        counts = {"main": -(-edits // main), "other": -(-edits // other)}
        places = {"all": every, **{name: thinned(run, most, flagged) for name, most in counts.items()}}
        places["spectra"] = spectra
        if sum(size * len(places[grid]) for grid, size in sizes) <= budget:
            break
    return places


def _bytes_per_row(run: Run, metric: Metric, sites: Sequence[str]) -> float:
    """What one edit's readings of a metric at all of its sites take packed, told from some of them."""
    rows = [run.edits[place].row.readings for place in thinned(run, _SAMPLE, ())]
    some = sites[:4]
    told = [_series([row.get((metric.name, site)) for row in rows], metric.length) for site in some]
    return len(_pack(told)) * len(sites) / (len(some) * len(rows))


def _readings(
    run: Run, places: dict[str, list[int]]
) -> tuple[list[dict[str, Any]], dict[str, list[int]], dict[str, Any]]:
    """(metrics, grids, data): what was read, at which edits of the run, and the values."""
    described, series = [], {}
    for metric in run.metrics:
        sites = set(run.sites_of(metric.name))
        if not sites:
            continue
        grid = _grid_of(run, metric)
        about = {key: clean(value, _TEXT) if isinstance(value, str) else value for key, value in asdict(metric).items()}
        described.append({**about, "grid": grid})
        rows = [run.edits[place].row.readings for place in places[grid]]
        series[about["name"]] = {
            str(place): _series([row.get((metric.name, site)) for row in rows], metric.length)
            for place, site in enumerate(run.sites)
            if site in sites
        }
    listed = [run.edits[place] for place in places["all"]]
    data = {
        "edits": {
            "edit": [edit.edit for edit in listed],
            "label": [clean(edit.label, _LABEL) for edit in listed],
            "status": [edit.status for edit in listed],
            "outcome": [edit.outcome for edit in listed],
            "error": [None if edit.row.error is None else clean(edit.row.error, _LABEL) for edit in listed],
            "seconds": [shown(edit.row.seconds) for edit in listed],
        },
        "series": series,
    }
    grids = {name: [run.edits[place].edit for place in chosen] for name, chosen in places.items()}
    return described, grids, data


def _series(readings: Sequence[Array | None], length: int) -> list[Any]:
    """The readings of one site, one per row: a value each, or where they hold several a list each."""
    taken = [reading for reading in readings if reading is not None]
    told = iter(all_shown(np.concatenate(taken)) if taken else [])
    series: list[Any] = []
    for reading in readings:
        values = None if reading is None else list(islice(told, reading.size))
        series.append(values if values is None or length > 1 else values[0] if values else None)
    return series


def _pack(data: Any) -> str:
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def packed(plain: dict[str, Any]) -> str:
    """JSON text of a payload with its data deflated, fit for the inside of a ``<script>``: no ``<``, ``>`` or ``&``.

    Only ASCII is in it; ``data`` is the base64 of the zlib stream of its own JSON.
    """
    text = json.dumps({**plain, "data": _pack(plain["data"])}, allow_nan=False, separators=(",", ":"))
    return as_script(text)


def as_script(text: str) -> str:
    """JSON text for the inside of a ``<script>``: the same value, without what could end the element."""
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def unpacked(text: str) -> dict[str, Any]:
    """The payload back from `packed`'s text, or from that of a saved ``report.json``."""
    plain: dict[str, Any] = json.loads(text)
    if isinstance(plain["data"], str):
        plain["data"] = json.loads(zlib.decompress(base64.b64decode(plain["data"])))
    return plain
