"""Charts of a run for a notebook, made with Altair: the same as `stabilitylab.reports.figures` draws with matplotlib.

On every chart: onset dashed, alarm dotted, first bad edit solid. A value that is NaN or infinite stands as a marker in
a lane of its own at the top edge, −∞ and zeros on a log axis at the bottom; a reading that was not taken is a gap. A
ring is a reading that a finding rests on. Lines and marks are to be seen on white and on near-black.

Data are packed: one record per line holds all of its values, and the browser unfolds it. So no chart comes near
Altair's limit of 5,000 rows, and none needs pandas. Text from the run is data in fields, cleaned and cut; it is in no
expression. No ``<`` is anywhere in a chart, since Altair writes charts into a notebook's page without escaping it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import altair as alt
import matplotlib as mpl
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from stabilitylab.record.readings import MODEL_SITE, Array
from stabilitylab.record.run import Run
from stabilitylab.reports import charting, drawing
from stabilitylab.reports.drawing import Line
from stabilitylab.reports.interactive import ALARM, BAD, LINES, ONSET
from stabilitylab.reports.payload import as_script
from stabilitylab.reports.text import clean, number, short_names, shorten

WIDTH: Final = 600
HEIGHT: Final = 240
"""Pixels, without axes and legends: a notebook's cell holds them."""
NAMED: Final = 8
"""Up to so many lines each have a colour and a name of their own; more run from dark to light with depth."""
NEAREST: Final = 4_000
"""Up to so many points the pointer finds the nearest; beyond, it has to touch one."""

_MARKS: Final[dict[str, tuple[str, list[float]]]] = {
    "onset": (ONSET, [5, 3]),
    "alarm": (ALARM, [1.5, 2.5]),
    "first bad": (BAD, [1, 0]),
}
_CROSS: Final = "M-0.6,-0.6L0.6,0.6M0.6,-0.6L-0.6,0.6"
_SHAPES: Final = {"NaN": _CROSS, "∞": "triangle-up", "−∞": "triangle-down", "0": "circle", "negative": "diamond"}
_ABOVE: Final = ("NaN", "∞")
_ZEROS: Final = frozenset({"0", "negative"})
_DEPTHS: Final = (1, 2, 4, 8, 16, 32)
_GAPS: Final[Any] = "break-paths-show-path-domains"
_FARTHEST: Final = 1e300
"""What lies beyond stands at the edge: an axis has to be able to take the difference of its ends."""
_LANE_STEP: Final = 9
_LEVELS: Final = 4
_TICK: Final = (
    "abs(datum.value) >= 1e5 || (datum.value != 0 && 1e-3 > abs(datum.value))"
    " ? format(datum.value, '.3~e') : format(datum.value, ',.6~g')"
)


@dataclass(frozen=True)
class _Curve:
    """A line with the name that its legend has, and the whole of it for the pointer."""

    name: str
    whole: str
    line: Line
    shade: str


def lines(run: Run, metric: str, sites: str | Sequence[str] | None = None) -> alt.LayerChart:
    """One metric over the edits, a line per site; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    about = run.metric(metric)
    chosen = drawing.choose(run, metric, sites)
    names = _names(chosen)
    shades = _shades(len(chosen))
    curves = [
        _Curve(names[line.site], shorten(line.site, 120), line, shade)
        for line, shade in zip(drawing.read(run, metric, chosen), shades, strict=True)
    ]
    limits = drawing.shared_limits(run, metric)
    unit = metric if about.unit in {"1", ""} else f"{metric} ({about.unit})"
    layers = _panel(run, curves, log=about.scale == "log", limits=limits, title=_outside(clean(unit, 60)))
    return _chart(run, layers, metric, about.meaning)


def spectra(run: Run, site: str, metric: str = "gradient.spectrum") -> alt.LayerChart:
    """The leading singular values at one site as a fan; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    about = run.metric(metric)
    values = run.series(metric, site).reshape(len(run.edits), -1)
    there = run.present(metric, site)
    depths = [depth for depth in _DEPTHS if depth <= values.shape[1] and np.isfinite(values[:, depth - 1]).any()]
    depths = depths or [1]
    shades = mpl.colormaps["viridis"](np.linspace(0.2, 0.8, len(depths)))
    curves = []
    for place, depth in enumerate(depths):
        # Only the first value tells "not taken" from NaN and 0: a matrix of low rank has fewer values.
        column = values[:, depth - 1]
        kept = there & ((column > 0) | (depth == 1))
        line = Line(metric, site, column, kept, place, len(depths), "")
        curves.append(_Curve(f"σ{depth}", f"σ{depth}", line, mpl.colors.to_hex(shades[place])))
    layers = _panel(run, curves, log=True, title="singular value")
    return _chart(run, layers, f"{metric} at {shorten(site, 60)}", about.meaning)


def logit_range(run: Run, family: str = "canary") -> alt.LayerChart:
    """Smallest to largest logit as a band; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    parts = {"max": LINES[0], "logsumexp": ONSET, "min": LINES[0]}
    for part in parts:
        run.metric(f"{family}.{part}")
    read = {
        part: drawing.read(run, f"{family}.{part}", [MODEL_SITE])[0]
        for part in parts
        if run.sites_of(f"{family}.{part}")
    }
    curves = [_Curve(part, part, line, parts[part]) for part, line in read.items()]
    layers = _panel(run, curves, log=False, title="logit", dashed=("logsumexp",))
    if {"max", "min"} <= set(read):
        low, high = read["min"].values, read["max"].values
        both = np.isfinite(low) & np.isfinite(high)
        band = {
            "edit": run.edit_numbers.astype(int).tolist(),
            "low": _plain(np.where(both, low, np.nan)),
            "high": _plain(np.where(both, high, np.nan)),
        }
        area = (
            alt.Chart(_data([band]))
            .transform_flatten(["edit", "low", "high"])
            .mark_area(color=LINES[0], opacity=0.18, invalid=_GAPS, clip=True)
            .encode(x=_x(run), y=alt.Y("low:Q", scale=layers.scale, axis=layers.axis), y2="high:Q")
        )
        layers = layers.behind(area)
    return _chart(run, layers, f"{family} logits", "From the smallest to the largest, with the log-sum-exp.")


def heatmap(run: Run, metric: str, sites: str | Sequence[str] | None = None) -> alt.LayerChart:
    """Layers by edits, coloured by value; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    about = run.metric(metric)
    log = about.scale == "log"
    chosen = drawing.choose(run, metric, sites)
    names, edits = _names(chosen), run.edit_numbers
    read = drawing.read(run, metric, chosen)
    low, high = _ends(charting.finite_of([line.drawn(log) for line in read]), log)
    rows = [
        {
            "site": names[line.site],
            "whole": shorten(line.site, 120),
            "edit": edits.astype(int).tolist(),
            "reading": _readings(line, log),
        }
        for line in read
    ]
    edges = np.concatenate([edits[:1] - 0.5, (edits[1:] + edits[:-1]) / 2, edits[-1:] + 0.5])
    about_edits = [
        {**told, "start": start, "end": end}
        for told, start, end in zip(_edits(run), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    found = alt.LookupData(_data(about_edits), key="edit", fields=["label", "status", "start", "end"])
    order = list(names.values())
    step = 18 if len(order) <= 20 else 12
    y = alt.Y(
        "site:N", scale=alt.Scale(domain=order, paddingInner=0, paddingOuter=0), title=None,
        axis=alt.Axis(labelLimit=200, labelOverlap="greedy", ticks=False, domain=False),
    )  # fmt: skip
    unit = metric if about.unit in {"1", ""} else f"{metric} ({about.unit})"
    kind: dict[str, Any] = {"type": "log"} if log else {"type": "linear", "zero": False}
    scale = alt.Scale(scheme="cividis", domain=[low, high], nice=False, clamp=True, **kind)
    bar = alt.Legend(
        title=_outside(clean(unit, 60)), orient="bottom", direction="horizontal", gradientLength=300, titleLimit=300,
        values=_ticks(low, high, log, 5), labelExpr=_TICK,
    )  # fmt: skip
    tip = [alt.Tooltip("whole:N", title="site"), *_edit_tips()]
    seen = {reading for row in rows for reading in row["reading"] if isinstance(reading, str)}
    keys = {"NaN, ±∞": charting.BAD_CELL} if seen - _ZEROS else {}
    keys |= {"≤ 0": charting.ZERO_CELL} if seen & _ZEROS else {}
    kinds = alt.Scale(domain=list(keys), range=list(keys.values()))
    cells = alt.Chart().mark_rect(clip=True)
    good = (
        cells.transform_filter("datum.kind == '' && isValid(datum.value)")
        .encode(
            x=_x(run, "start"), x2="end:Q", y=y, color=alt.Color("value:Q", scale=scale, legend=bar),
            tooltip=[*tip, alt.Tooltip("value:Q", format=".4~g")],
        )
    )  # fmt: skip
    other = (
        cells.transform_filter("datum.kind != ''")
        .transform_calculate(key="datum.kind == '0' || datum.kind == 'negative' ? '≤ 0' : 'NaN, ±∞'")
        .encode(
            x=_x(run, "start"), x2="end:Q", y=y, tooltip=[*tip, alt.Tooltip("kind:N", title="value")],
            color=alt.Color("key:N", scale=kinds, legend=alt.Legend(title=None, orient="bottom", symbolType="square")),
        )
    )  # fmt: skip
    shape = alt.Scale(domain=list(_SHAPES), range=list(_SHAPES.values()))
    signs = (
        alt.Chart()
        .transform_filter("datum.kind != ''")
        .mark_point(size=min(30.0, 4_000.0 / max(1, edits.size)), color="#ffffff", strokeWidth=0.9, clip=True)
        .encode(x=_x(run), y=y, shape=alt.Shape("kind:N", scale=shape, legend=None))
    )
    parts = [good, *([other, signs] if seen else [])]
    grid = _unfolded(alt.layer(*parts, data=_data(rows)), found).resolve_scale(color="independent", shape="independent")
    chart = alt.layer(grid, *_rules(run)).resolve_scale(color="independent", strokeDash="independent")
    return _finished(chart, metric, about.meaning, step * max(1, len(order)))


def _names(sites: Sequence[str]) -> dict[str, str]:
    """Short names, of which no two are alike."""
    seen: dict[str, int] = {}
    names = {}
    for site, full in short_names(sites, 30).items():
        short = _outside(full)
        seen[short] = seen.get(short, 0) + 1
        names[site] = short if seen[short] == 1 else f"{short} ({seen[short]})"
    return names


def _shades(count: int) -> list[str]:
    return list(LINES[:count]) if count <= NAMED else charting.colours(count)


def _data(rows: list[dict[str, Any]]) -> alt.InlineData:
    """Records as one JSON text: Altair copies and validates a chart many times, and each value of a list with it."""
    text = as_script(json.dumps(rows, allow_nan=False))
    return alt.InlineData(values=text, format=alt.JsonDataFormat(type="json"))


def _outside(text: str) -> str:
    """Text that stands outside of the data. Altair writes it into a page's script as it is: no ``<`` may be in it."""
    return text.replace("<", "‹")


def _plain(values: Array) -> list[float | None]:
    """To six digits; None for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _readings(line: Line, log: bool) -> list[float | str | None]:
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


def _unfolded(chart: Any, lookup: alt.LookupData) -> Any:
    """A record per reading, with what is told of its edit. value: a number or null; kind: a word, or empty."""
    return (
        chart.transform_flatten(["edit", "reading"])
        .transform_calculate(
            value="isNumber(datum.reading) ? datum.reading : null",
            kind="isString(datum.reading) ? datum.reading : ''",
        )
        .transform_lookup(lookup="edit", from_=lookup)
    )


def _edits(run: Run) -> list[dict[str, Any]]:
    """What the pointer shows of an edit: its label, and what became of it."""
    return [
        {"edit": edit.edit, "label": clean(edit.label, 120), "status": edit.outcome or edit.status}
        for edit in run.edits
    ]


def _edit_tips() -> list[alt.Tooltip]:
    return [alt.Tooltip("edit:Q"), alt.Tooltip("label:N"), alt.Tooltip("status:N")]


def _x(run: Run, field: str = "edit") -> alt.X:
    edits = run.edit_numbers
    first, last = (float(edits[0]), float(edits[-1])) if edits.size else (0.0, 0.0)
    return alt.X(
        f"{field}:Q", title="edit", scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False, zero=False),
        axis=alt.Axis(format="d", tickMinStep=1, tickCount=8, grid=False),
    )  # fmt: skip


def _rules(run: Run) -> list[alt.Chart]:
    """The flagged edits, told in a legend above the chart."""
    flagged = [(edit, name) for edit, name, *_ in charting.flagged(run.diagnosis())]
    if not flagged:
        return []
    shown = [f"{name}: edit {edit}" for edit, name in flagged]
    marks = [{"edit": edit, "mark": words} for (edit, _), words in zip(flagged, shown, strict=True)]
    looks = [_MARKS[name] for _, name in flagged]
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolSize=260, symbolStrokeWidth=2)
    return [
        alt.Chart(_data(marks))
        .mark_rule(strokeWidth=1.6, clip=True)
        .encode(
            x=_x(run),
            color=alt.Color(
                "mark:N", scale=alt.Scale(domain=shown, range=[shade for shade, _ in looks]), legend=legend
            ),
            strokeDash=alt.StrokeDash(
                "mark:N", scale=alt.Scale(domain=shown, range=[dash for _, dash in looks]), legend=legend
            ),
            tooltip=alt.Tooltip("mark:N", title="marked"),
        )
    ]


def _ends(finite: Array, log: bool) -> tuple[float, float]:
    values = finite[finite > 0] if log else finite
    if not values.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = np.clip([values.min(), values.max()], -_FARTHEST, _FARTHEST).tolist()
    if high > low:
        return low, high
    return (low, 10.0 * low) if log else (low, low + 1.0)


def _ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round values from `low` to `high`, both included where they are round."""
    if log and high / low >= 6.0:
        subs = (1.0, 3.0) if high / low < 300.0 else (1.0,)
        found = LogLocator(subs=subs, numticks=most).tick_values(low, high)
    else:
        found = MaxNLocator(most).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(f"{tick:.6g}") for tick in found if low - slack <= tick <= high + slack and (tick > 0 or not log)]


@dataclass(frozen=True)
class _Panel:
    """Layers that share a value axis, and those that lie over it with a height of their own."""

    scaled: tuple[alt.Chart | alt.LayerChart, ...]
    free: tuple[alt.Chart | alt.LayerChart, ...]
    scale: alt.Scale
    axis: alt.Axis

    def behind(self, layer: alt.Chart) -> _Panel:
        return _Panel((layer, *self.scaled), self.free, self.scale, self.axis)


def _value_axis(finite: Array, log: bool, room: tuple[int, int], title: str) -> tuple[alt.Scale, alt.Axis]:
    """room: pixels that lanes take at the top and at the bottom."""
    low, high = _ends(finite, log)
    span: Any = [HEIGHT - room[1], room[0]]
    kind: dict[str, Any] = {"type": "linear", "zero": False}
    if not log and charting.needs_symlog(finite):
        typical = float(np.median(np.abs(finite[finite != 0])))
        kind = {"type": "symlog", "constant": typical}
        ticks = charting.symlog_ticks(finite, typical)
        low, high = (low - 0.3 * abs(low), high + 0.3 * abs(high))
    elif log:
        pad = (high / low) ** 0.05
        kind = {"type": "log"}
        low, high = max(low / pad, 1e-307), min(high * pad, 10.0 * _FARTHEST)
        ticks = _ticks(low, high, log, 6)
    else:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        ticks = _ticks(low, high, log, 6)
    scale = alt.Scale(domain=[low, high], range=span, nice=False, clamp=True, **kind)
    axis = alt.Axis(
        title=title, values=ticks if finite.size else [], labelExpr=_TICK, domain=False, ticks=False, titleLimit=HEIGHT
    )
    return scale, axis


def _panel(
    run: Run,
    curves: Sequence[_Curve],
    *,
    log: bool,
    title: str,
    limits: Array | None = None,
    dashed: Sequence[str] = (),
) -> _Panel:
    """Lines with what the pointer shows, lanes, rings and limits."""
    bounds = np.zeros(0) if limits is None else limits
    drawn = [curve.line.drawn(log) for curve in curves]
    tops = _lanes(curves, [curve.line.above() for curve in curves])
    bottoms = _lanes(curves, [curve.line.below(log) for curve in curves])
    room = _room(tops), _room(bottoms)
    finite = charting.finite_of([*drawn, bounds])
    scale, axis = _value_axis(finite, log, room, title)
    y = alt.Y("value:Q", scale=scale, axis=axis)
    rows = [
        {
            "site": curve.name,
            "whole": curve.whole,
            "top": tops.get(curve.name, 0),
            "bottom": HEIGHT - bottoms.get(curve.name, 0),
            "edit": run.edit_numbers.astype(int).tolist(),
            "reading": _readings(curve.line, log),
        }
        for curve in curves
    ]
    names = [curve.name for curve in curves]
    shades = alt.Scale(domain=names, range=[curve.shade for curve in curves])
    colour = alt.Color("site:N", scale=shades, legend=_legend(names))
    plain = alt.Color("site:N", scale=shades, legend=None)
    lookup = alt.LookupData(_data(_edits(run)), key="edit", fields=["label", "status"])
    tip = [alt.Tooltip("whole:N", title="site"), *_edit_tips()]

    # Both selections belong to the points: Altair gives a layer's selections to each of its views that has one.
    of = _mark(str(run.path), title, *(f"{curve.line.metric} {curve.whole}" for curve in curves))
    chosen = alt.selection_point(name=f"chosen_{of}", fields=["site"], bind="legend")
    seen = alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15))
    line = (
        alt.Chart()
        .mark_line(strokeWidth=1.8, invalid=_GAPS, clip=True)
        .encode(x=_x(run), y=y, color=colour, opacity=seen)
    )
    if dashed:
        dashes = alt.Scale(domain=names, range=[[3, 3] if name in dashed else [1, 0] for name in names])
        line = line.encode(strokeDash=alt.StrokeDash("site:N", scale=dashes, legend=_legend(names)))
    lone = (
        alt.Chart(_data(_lone(run, curves, drawn)))
        .mark_circle(size=20, opacity=1, clip=True)
        .encode(x=_x(run), y=y, color=plain)
    )
    points = alt.Chart().transform_filter("isValid(datum.value)").mark_circle(size=45, clip=True).add_params(chosen)
    points = points.encode(x=_x(run), y=y, color=colour, tooltip=[*tip, alt.Tooltip("value:Q", format=".4~g")])
    if len(curves) * len(run.edits) <= NEAREST:
        near = alt.selection_point(
            name=f"near_{of}", on="pointerover", clear="pointerout", nearest=True, fields=["site", "edit"], empty=False
        )
        points = points.add_params(near).encode(opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0)))
    else:
        points = points.encode(opacity=alt.value(0))
    unfolded = _unfolded(alt.layer(line, points, data=_data(rows)), lookup)
    lanes = [
        mark
        for fields, height, at in (("top", room[0], "top"), ("bottom", room[1], "bottom"))
        if height
        for mark in _lane(run, rows, lookup, shades, tip, (fields, height, at), log)
    ]
    scaled = (*_limit_rules(bounds, y), unfolded, lone, *_rings(run, curves, log, y))
    return _Panel(scaled, tuple(lanes), scale, axis)


def _mark(*parts: str) -> str:
    """A few letters that tell charts apart: Altair takes selections of the same name, side by side, for one."""
    return hashlib.blake2s("\0".join(parts).encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()


def _legend(names: Sequence[str]) -> alt.Legend | None:
    """Below the chart. Of many lines the first, the middle and the last are named."""
    if len(names) < 2:
        return None
    shown = list(names) if len(names) <= NAMED else [names[0], names[len(names) // 2], names[-1]]
    return alt.Legend(
        title=None, orient="bottom", columns=6 if max(map(len, names)) < 14 else 3, values=shown, labelLimit=200,
        symbolType="stroke", symbolSize=200, symbolStrokeWidth=2.5,
    )  # fmt: skip


def _lone(run: Run, curves: Sequence[_Curve], drawn: Sequence[Array]) -> list[dict[str, Any]]:
    """Points between gaps, which no line shows."""
    return [
        {"site": curve.name, "edit": run.edits[place].edit, "value": float(values[place])}
        for curve, values in zip(curves, drawn, strict=True)
        for place in np.flatnonzero(drawing.lone_points(values)).tolist()
    ]


def _lanes(curves: Sequence[_Curve], masks: Sequence[Any]) -> dict[str, int]:
    """How far from the edge the markers of each curve that has some stand, in pixels."""
    marked = [curve.name for curve, mask in zip(curves, masks, strict=True) if mask.any()]
    return {name: 8 + _LANE_STEP * (place % _LEVELS) for place, name in enumerate(marked)}


def _room(lanes: dict[str, int]) -> int:
    return max(lanes.values()) + 10 if lanes else 0


def _lane(
    run: Run, rows: list[dict[str, Any]], lookup: alt.LookupData, shades: alt.Scale, tip: list[alt.Tooltip],
    lane: tuple[str, int, str], log: bool,
) -> list[alt.Chart]:  # fmt: skip
    """Ground, name and markers of what has no place on the axis."""
    field, height, _ = lane
    top = field == "top"
    edge, words = (0, "NaN, ∞") if top else (HEIGHT, "0" if log else "−∞")
    inner = height if top else HEIGHT - height
    ink = ALARM if words == "0" else BAD
    kinds = [kind for kind in _SHAPES if (kind in _ABOVE) == top]
    ground = alt.Chart(_data([{}])).mark_rect(color=ink, opacity=0.12).encode(y=alt.value(edge), y2=alt.value(inner))
    name = (
        alt.Chart(_data([{"words": words, "edit": run.edits[-1].edit + 0.5}]))
        .mark_text(align="left", baseline="middle", dx=6, fontSize=10, color=ink)
        .encode(x=_x(run), y=alt.value((edge + inner) / 2), text="words:N")
    )
    marks = (
        _unfolded(alt.Chart(_data(rows)), lookup)
        .transform_filter(alt.FieldOneOfPredicate(field="kind", oneOf=kinds))
        .mark_point(size=26, strokeWidth=1.5, clip=False)
        .encode(
            x=_x(run),
            y=alt.Y(f"{field}:Q", scale=alt.Scale(domain=[0, HEIGHT], range=[0, HEIGHT], nice=False), axis=None),
            color=alt.Color("site:N", scale=shades, legend=None),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=list(_SHAPES), range=list(_SHAPES.values())), legend=None),
            tooltip=[*tip, alt.Tooltip("kind:N", title="value")],
        )
    )
    return [ground, name, marks]


def _rings(run: Run, curves: Sequence[_Curve], log: bool, y: alt.Y) -> list[alt.Chart]:
    found = [
        {"edit": each.edit, "value": value, "says": clean(each.says, 200), "verdict": each.verdict}
        for curve in curves
        for each, value in drawing.flagged_readings(run, curve.line)
        if math.isfinite(value) and (value > 0 or not log)
    ]
    if not found:
        return []
    tip = [alt.Tooltip("verdict:N"), alt.Tooltip("says:N", title="finding")]
    return [
        alt.Chart(_data(found))
        .mark_point(size=110, color=ALARM, strokeWidth=1.4, clip=True)
        .encode(x=_x(run), y=y, tooltip=tip)
    ]


def _limit_rules(limits: Array, y: alt.Y) -> list[alt.Chart]:
    rows = [{"value": value, "words": f"limit {number(value)}"} for value in limits.tolist()]
    if not rows:
        return []
    rule = alt.Chart(_data(rows)).mark_rule(color=ALARM, strokeDash=[6, 4]).encode(y=y)
    words = alt.Chart(_data(rows)).mark_text(align="left", baseline="bottom", dx=4, dy=-2, fontSize=10, color=ALARM)
    return [rule, words.encode(x=alt.value(0), y=y, text="words:N")]


def _chart(run: Run, panel: _Panel, title: str, meaning: str) -> alt.LayerChart:
    scaled = alt.layer(*panel.scaled).resolve_scale(
        color="independent", strokeDash="independent", opacity="independent"
    )
    layers = [*_rules(run), scaled, *panel.free]
    chart = alt.layer(*layers).resolve_scale(
        y="independent", color="independent", strokeDash="independent", shape="independent"
    )
    return _finished(chart, title, meaning, HEIGHT)


def _finished(chart: alt.LayerChart, title: str, meaning: str, height: int) -> alt.LayerChart:
    words = alt.TitleParams(
        _outside(clean(title, 100)), subtitle=_outside(clean(meaning, 160)), anchor="start", frame="group",
        limit=WIDTH, fontSize=13, subtitleColor=ALARM, subtitleFontSize=11, offset=8,
    )  # fmt: skip
    finished: alt.LayerChart = chart.properties(title=words, width=WIDTH, height=height)
    return finished
