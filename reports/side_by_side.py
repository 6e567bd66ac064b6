"""Several runs in one table for a terminal: what became of each, and what it had become by its last edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stabilitylab.analysis.findings import Diagnosis, json_safe
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.record.run import Run
from stabilitylab.reports.console import verdict_text
from stabilitylab.reports.events import short_places
from stabilitylab.reports.text import clean, number, shorten
from stabilitylab.reports.verdicts import cause_words, landed_words

NAMES: Final = 16
"""Columns that the names of the rows take."""
NARROWEST: Final = 18
"""Columns that a run takes at least; of more runs than fit, the rest stand in a table below."""
EDITS_NAMED: Final = 6
DRIFT: Final = "drift.ratio"
_SELDOM: Final = frozenset({"with it", "not watched"})
"""Lines that are left out where no run has any."""


@dataclass(frozen=True)
class Reading:
    """A value with the edit and the site at which it was read."""

    edit: int
    site: str
    value: float


def last_reading(run: Run, metric: str, site: str = MODEL_SITE) -> Reading | None:
    """The last that was taken, whatever its value."""
    found = ((edit.edit, edit.row.scalar(metric, site)) for edit in reversed(run.edits))
    return next((Reading(edit, site, value) for edit, value in found if value is not None), None)


def largest_reading(run: Run, metric: str) -> Reading | None:
    """The largest over all sites and edits: one that is no finite number, the first such, before any that is."""
    largest: Reading | None = None
    for site in run.sites_of(metric):
        for edit in run.edits:
            value = edit.row.scalar(metric, site)
            if value is not None and (largest is None or _rank(value, edit.edit) > _rank(largest.value, largest.edit)):
                largest = Reading(edit.edit, site, value)
    return largest


def _rank(value: float, edit: int) -> tuple[bool, float]:
    return (False, value) if math.isfinite(value) else (True, -edit)


def facts(run: Run) -> dict[str, Any]:
    """What is compared, as plain JSON values."""
    diagnosis = run.diagnosis()
    readings = {
        "last_canary_agreement": last_reading(run, "canary.agreement"),
        "last_canary_kl": last_reading(run, "canary.kl"),
        "largest_drift": largest_reading(run, DRIFT),
    }
    known: dict[str, Any] = json_safe(
        {
            "run": str(run.path),
            "complete": run.complete,
            "edits": diagnosis.edits,
            "failed_edits": [edit.edit for edit in run.edits if edit.status == "failed"],
            "verdict": diagnosis.verdict,
            "says": diagnosis.says,
            "onset_edit": diagnosis.onset_edit,
            "alarm_edit": diagnosis.alarm_edit,
            "first_bad_edit": diagnosis.first_bad_edit,
            "first_bad_site": diagnosis.first_bad_site,
            "first_bad_metric": diagnosis.first_bad_metric,
            "first_nonfinite_edit": diagnosis.first_nonfinite_edit,
            "cause": diagnosis.cause,
            "confidence": diagnosis.confidence,
            "causes": [asdict(link) for link in diagnosis.causes],
            "landed": diagnosis.landed,
            "nothing_lands": diagnosis.nothing_lands,
            "unwatched": list(diagnosis.unwatched),
            **{name: None if reading is None else asdict(reading) for name, reading in readings.items()},
        }
    )
    return known


def side_by_side(runs: Sequence[Run], width: int = 80) -> RenderableType:
    """A column per run. width: of the terminal; runs that do not fit beside each other stand in tables below."""
    beside = max(1, (width - NAMES - 2) // (NARROWEST + 2))
    names = _titles(runs)
    parts: list[RenderableType] = []
    for first in range(0, len(runs), beside):
        parts += [Text()] if first else []
        parts.append(_table(runs[first : first + beside], names[first : first + beside]))
    return Group(*parts)


def _titles(runs: Sequence[Run]) -> list[str]:
    """The last part of each run's path, or the whole path where that does not tell them apart."""
    last = [clean(run.path.name or run.path, 60) for run in runs]
    return last if len(set(last)) == len(last) else [shorten(str(run.path), 120) for run in runs]


def _table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", style="dim", no_wrap=True, width=NAMES)
    for name in names:
        table.add_column(Text(name, style="bold"), overflow="fold", min_width=NARROWEST)
    columns = [_column(run) for run in runs]
    for label in columns[0] if columns else ():
        words = [column[label] for column in columns]
        if label not in _SELDOM or any(str(word) != "–" for word in words):
            table.add_row(Text(label), *words)
    return table


def _others(diagnosis: Diagnosis) -> list[str]:
    """The chain of causes, but for the one that is named first."""
    return [f"{link.role}: {clean(link.cause, 60)}" for link in diagnosis.causes if link.cause != diagnosis.cause]


def _column(run: Run) -> dict[str, Text]:
    diagnosis = run.diagnosis()
    failed = [edit.edit for edit in run.edits if edit.status == "failed"]
    site = diagnosis.first_bad_site
    places = short_places(run.sites)
    bad = "–" if site is None else f"{_place(site, places)}, {clean(diagnosis.first_bad_metric, 40)}"
    drift = largest_reading(run, DRIFT)
    words = {
        "cause": cause_words(diagnosis),
        "with it": "; ".join(_others(diagnosis)) or "–",
        "took effect": landed_words(diagnosis),
        "not watched": clean("; ".join(diagnosis.unwatched), 160) or "–",
        "edits": number(diagnosis.edits) + ("" if run.closed else ", goes on"),
        "failed edits": _listed(failed),
        "onset": _edit(diagnosis.onset_edit),
        "alarm": _edit(diagnosis.alarm_edit),
        "first bad": _edit(diagnosis.first_bad_edit),
        "first bad site": bad,
        "first NaN or ∞": _edit(diagnosis.first_nonfinite_edit),
        "last agreement": _reading(last_reading(run, "canary.agreement")),
        "last KL (nats)": _reading(last_reading(run, "canary.kl")),
        "largest drift": "–" if drift is None else f"{_reading(drift)}, {_place(drift.site, places)}",
    }
    return {"verdict": verdict_text(diagnosis.verdict), **{name: Text(word) for name, word in words.items()}}


def _place(site: str, places: Mapping[str, str]) -> str:
    return places.get(site) or shorten(site, 60)


def _edit(edit: int | None) -> str:
    return "–" if edit is None else f"edit {edit}"


def _listed(edits: Sequence[int]) -> str:
    if not edits:
        return "none"
    named = ", ".join(map(str, edits[:EDITS_NAMED]))
    return f"{len(edits)}: {named}" + (", …" if len(edits) > EDITS_NAMED else "")


def _reading(reading: Reading | None) -> str:
    return "–" if reading is None else f"{number(reading.value)} (edit {reading.edit})"
