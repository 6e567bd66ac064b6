"""What every chart is put together from: data as one text, axes, what the pointer shows, the flagged edits, words.

Data are packed: one record per line holds all of its values, and the browser unfolds it. So no chart comes near
Altair's limit of 5,000 rows, and none needs pandas. Text from the run is data in fields, cleaned and cut; it is in no
expression. No ``<`` is anywhere in a chart, since Altair writes charts into a notebook's page without escaping it.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import altair as alt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from stabilitylab.record.readings import Array
from stabilitylab.record.run import Run
from stabilitylab.reports import charting
from stabilitylab.reports.drawing import Line
from stabilitylab.reports.payload import as_script
from stabilitylab.reports.spec_parts import ALARM, BAD, ONSET
from stabilitylab.reports.text import clean, number

WIDTH: Final = 600
HEIGHT: Final = 240
"""Pixels, without axes and legends: a notebook's cell holds them."""
NAMED: Final = 8
"""Up to so many lines each have a colour and a name of their own; more run from dark to light with depth."""
_MARKS: Final[dict[str, tuple[str, list[float]]]] = {
    "onset": (ONSET, [5, 3]),
    "alarm": (ALARM, [1.5, 2.5]),
    "first bad": (BAD, [1, 0]),
}
_CROSS: Final = "M-0.6,-0.6L0.6,0.6M0.6,-0.6L-0.6,0.6"
SHAPES: Final = {"NaN": _CROSS, "∞": "triangle-up", "−∞": "triangle-down", "0": "circle", "negative": "diamond"}
ABOVE: Final = ("NaN", "∞")
ZEROS: Final = frozenset({"0", "negative"})
GAPS: Final[Any] = "break-paths-show-path-domains"
FARTHEST: Final = 1e300
"""What lies beyond stands at the edge: an axis has to be able to take the difference of its ends."""


def inline(rows: list[dict[str, Any]]) -> alt.InlineData:
    """Records as one JSON text: Altair copies and validates a chart many times, and each value of a list with it."""
    text = as_script(json.dumps(rows, allow_nan=False))
    return alt.InlineData(values=text, format=alt.JsonDataFormat(type="json"))


def unbracketed(text: str) -> str:
    """Text that stands outside of the data. Altair writes it into a page's script as it is: no ``<`` may be in it."""
    return text.replace("<", "‹")


def six_digits(values: Array) -> list[float | None]:
    """To six digits; None for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def told_readings(line: Line, log: bool) -> list[float | str | None]:
    """A number for what has a place on the axis, a word for what has none, None for what was not taken."""

    def told(value: float, there: bool) -> float | str | None:
        if not there:
            return None
        if not math.isfinite(value):
            return number(value)
        if log and value <= 0:
            return "0" if value == 0 else "negative"
        return float(f"{value:.6g}")

    return [told(value, there) for value, there in zip(line.values.tolist(), line.there.tolist(), strict=True)]


def unfold(chart: Any, lookup: alt.LookupData) -> Any:
    """A record per reading, with what is told of its edit. value: a number or null; kind: a word, or empty."""
    return (
        chart.transform_flatten(["edit", "reading"])
        .transform_calculate(
            value="isNumber(datum.reading) ? datum.reading : null",
            kind="isString(datum.reading) ? datum.reading : ''",
        )
        .transform_lookup(lookup="edit", from_=lookup)
    )


def about_edits(run: Run) -> list[dict[str, Any]]:
    """What the pointer shows of an edit: its label, and what became of it."""
    return [
        {"edit": edit.edit, "label": clean(edit.label, 120), "status": edit.outcome or edit.status}
        for edit in run.edits
    ]


def edit_tips() -> list[alt.Tooltip]:
    """What the pointer shows of each edit, see `about_edits`."""
    return [alt.Tooltip("edit:Q"), alt.Tooltip("label:N"), alt.Tooltip("status:N")]


def edit_axis(run: Run, field: str = "edit") -> alt.X:
    """The axis of edits, the same on every layer."""
    edits = run.edit_numbers
    first, last = (float(edits[0]), float(edits[-1])) if edits.size else (0.0, 0.0)
    return alt.X(
        f"{field}:Q", title="edit", scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False, zero=False),
        axis=alt.Axis(format="d", tickMinStep=1, tickCount=8, grid=False),
    )  # fmt: skip


def flag_rules(run: Run) -> list[alt.Chart]:
    """The flagged edits, told in a legend above the chart."""
    flagged = [(edit, name) for edit, name, *_ in charting.flagged(run.diagnosis())]
    if not flagged:
        return []
    shown = [f"{name}: edit {edit}" for edit, name in flagged]
    marks = [{"edit": edit, "mark": words} for (edit, _), words in zip(flagged, shown, strict=True)]
    looks = [_MARKS[name] for _, name in flagged]
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolSize=260, symbolStrokeWidth=2)
    return [
        alt.Chart(inline(marks))
        .mark_rule(strokeWidth=1.6, clip=True)
        .encode(
            x=edit_axis(run),
            color=alt.Color(
                "mark:N", scale=alt.Scale(domain=shown, range=[shade for shade, _ in looks]), legend=legend
            ),
            strokeDash=alt.StrokeDash(
                "mark:N", scale=alt.Scale(domain=shown, range=[dash for _, dash in looks]), legend=legend
            ),
            tooltip=alt.Tooltip("mark:N", title="marked"),
        )
    ]


def ends_of(finite: Array, log: bool) -> tuple[float, float]:
    """Where a value axis begins and ends."""
    values = finite[finite > 0] if log else finite
    if not values.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = np.clip([values.min(), values.max()], -FARTHEST, FARTHEST).tolist()
    if high > low:
        return low, high
    return (low, 10.0 * low) if log else (low, low + 1.0)


def ticks_of(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round values from `low` to `high`, both included where they are round."""
    if log and high / low >= 6.0:
        subs = (1.0, 3.0) if high / low < 300.0 else (1.0,)
        found = LogLocator(subs=subs, numticks=most).tick_values(low, high)
    else:
        found = MaxNLocator(most).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(f"{tick:.6g}") for tick in found if low - slack <= tick <= high + slack and (tick > 0 or not log)]


def titled(chart: alt.LayerChart, title: str, meaning: str, height: int) -> alt.LayerChart:
    """The chart in its size, with its title and what it means."""
    words = alt.TitleParams(
        unbracketed(clean(title, 100)), subtitle=unbracketed(clean(meaning, 160)), anchor="start", frame="group",
        limit=WIDTH, fontSize=13, subtitleColor=ALARM, subtitleFontSize=11, offset=8,
    )  # fmt: skip
    finished: alt.LayerChart = chart.properties(title=words, width=WIDTH, height=height)
    return finished
