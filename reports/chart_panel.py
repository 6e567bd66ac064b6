"""A panel of lines over the edits: with lanes for what has no place on the axis, rings at findings, and limits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import altair as alt
import numpy as np

from stabilitylab.record.readings import Array
from stabilitylab.record.run import Run
from stabilitylab.reports import charting, drawing
from stabilitylab.reports.chart_parts import (
    ABOVE,
    FARTHEST,
    GAPS,
    HEIGHT,
    NAMED,
    SHAPES,
    about_edits,
    edit_axis,
    edit_tips,
    ends_of,
    flag_rules,
    inline,
    ticks_of,
    titled,
    told_readings,
    unfold,
)
from stabilitylab.reports.drawing import Line
from stabilitylab.reports.spec_parts import ALARM, BAD, TICK
from stabilitylab.reports.text import clean, number

NEAREST: Final = 4_000
"""Up to so many points the pointer finds the nearest; beyond, it has to touch one."""
_LANE_STEP: Final = 9
_LEVELS: Final = 4


@dataclass(frozen=True)
class Curve:
    """A line with the name that its legend has, and the whole of it for the pointer."""

    name: str
    whole: str
    line: Line
    shade: str


@dataclass(frozen=True)
class Panel:
    """Layers that share a value axis, and those that lie over it with a height of their own."""

    scaled: tuple[alt.Chart | alt.LayerChart, ...]
    free: tuple[alt.Chart | alt.LayerChart, ...]
    scale: alt.Scale
    axis: alt.Axis

    def behind(self, layer: alt.Chart) -> Panel:
        """With a layer that all others lie over."""
        return Panel((layer, *self.scaled), self.free, self.scale, self.axis)


def _value_axis(finite: Array, log: bool, room: tuple[int, int], title: str) -> tuple[alt.Scale, alt.Axis]:
    """room: pixels that lanes take at the top and at the bottom."""
    low, high = ends_of(finite, log)
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
        low, high = max(low / pad, 1e-307), min(high * pad, 10.0 * FARTHEST)
        ticks = ticks_of(low, high, log, 6)
    else:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        ticks = ticks_of(low, high, log, 6)
    scale = alt.Scale(domain=[low, high], range=span, nice=False, clamp=True, **kind)
    axis = alt.Axis(
        title=title, values=ticks if finite.size else [], labelExpr=TICK, domain=False, ticks=False, titleLimit=HEIGHT
    )
    return scale, axis


def panel_of(
    run: Run,
    curves: Sequence[Curve],
    *,
    log: bool,
    title: str,
    limits: Array | None = None,
    dashed: Sequence[str] = (),
) -> Panel:
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
            "reading": told_readings(curve.line, log),
        }
        for curve in curves
    ]
    names = [curve.name for curve in curves]
    shades = alt.Scale(domain=names, range=[curve.shade for curve in curves])
    colour = alt.Color("site:N", scale=shades, legend=_legend(names))
    plain = alt.Color("site:N", scale=shades, legend=None)
    lookup = alt.LookupData(inline(about_edits(run)), key="edit", fields=["label", "status"])
    tip = [alt.Tooltip("whole:N", title="site"), *edit_tips()]

    # Both selections belong to the points: Altair gives a layer's selections to each of its views that has one.
    of = _mark(str(run.path), title, *(f"{curve.line.metric} {curve.whole}" for curve in curves))
    chosen = alt.selection_point(name=f"chosen_{of}", fields=["site"], bind="legend")
    seen = alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15))
    line = (
        alt.Chart()
        .mark_line(strokeWidth=1.8, invalid=GAPS, clip=True)
        .encode(x=edit_axis(run), y=y, color=colour, opacity=seen)
    )
    if dashed:
        dashes = alt.Scale(domain=names, range=[[3, 3] if name in dashed else [1, 0] for name in names])
        line = line.encode(strokeDash=alt.StrokeDash("site:N", scale=dashes, legend=_legend(names)))
    lone = (
        alt.Chart(inline(_lone(run, curves, drawn)))
        .mark_circle(size=20, opacity=1, clip=True)
        .encode(x=edit_axis(run), y=y, color=plain)
    )
    points = alt.Chart().transform_filter("isValid(datum.value)").mark_circle(size=45, clip=True).add_params(chosen)
    points = points.encode(x=edit_axis(run), y=y, color=colour, tooltip=[*tip, alt.Tooltip("value:Q", format=".4~g")])
    if len(curves) * len(run.edits) <= NEAREST:
        near = alt.selection_point(
            name=f"near_{of}", on="pointerover", clear="pointerout", nearest=True, fields=["site", "edit"], empty=False
        )
        points = points.add_params(near).encode(opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0)))
    else:
        points = points.encode(opacity=alt.value(0))
    unfolded = unfold(alt.layer(line, points, data=inline(rows)), lookup)
    lanes = [
        mark
        for fields, height, at in (("top", room[0], "top"), ("bottom", room[1], "bottom"))
        if height
        for mark in _lane(run, rows, lookup, shades, tip, (fields, height, at), log)
    ]
    scaled = (*_limit_rules(bounds, y), unfolded, lone, *_rings(run, curves, log, y))
    return Panel(scaled, tuple(lanes), scale, axis)


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


def _lone(run: Run, curves: Sequence[Curve], drawn: Sequence[Array]) -> list[dict[str, Any]]:
    """Points between gaps, which no line shows."""
    return [
        {"site": curve.name, "edit": run.edits[place].edit, "value": float(values[place])}
        for curve, values in zip(curves, drawn, strict=True)
        for place in np.flatnonzero(drawing.lone_points(values)).tolist()
    ]


def _lanes(curves: Sequence[Curve], masks: Sequence[Any]) -> dict[str, int]:
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
    kinds = [kind for kind in SHAPES if (kind in ABOVE) == top]
    ground = alt.Chart(inline([{}])).mark_rect(color=ink, opacity=0.12).encode(y=alt.value(edge), y2=alt.value(inner))
    name = (
        alt.Chart(inline([{"words": words, "edit": run.edits[-1].edit + 0.5}]))
        .mark_text(align="left", baseline="middle", dx=6, fontSize=10, color=ink)
        .encode(x=edit_axis(run), y=alt.value((edge + inner) / 2), text="words:N")
    )
    marks = (
        unfold(alt.Chart(inline(rows)), lookup)
        .transform_filter(alt.FieldOneOfPredicate(field="kind", oneOf=kinds))
        .mark_point(size=26, strokeWidth=1.5, clip=False)
        .encode(
            x=edit_axis(run),
            y=alt.Y(f"{field}:Q", scale=alt.Scale(domain=[0, HEIGHT], range=[0, HEIGHT], nice=False), axis=None),
            color=alt.Color("site:N", scale=shades, legend=None),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())), legend=None),
            tooltip=[*tip, alt.Tooltip("kind:N", title="value")],
        )
    )
    return [ground, name, marks]


def _rings(run: Run, curves: Sequence[Curve], log: bool, y: alt.Y) -> list[alt.Chart]:
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
        alt.Chart(inline(found))
        .mark_point(size=110, color=ALARM, strokeWidth=1.4, clip=True)
        .encode(x=edit_axis(run), y=y, tooltip=tip)
    ]


def _limit_rules(limits: Array, y: alt.Y) -> list[alt.Chart]:
    rows = [{"value": value, "words": f"limit {number(value)}"} for value in limits.tolist()]
    if not rows:
        return []
    rule = alt.Chart(inline(rows)).mark_rule(color=ALARM, strokeDash=[6, 4]).encode(y=y)
    words = alt.Chart(inline(rows)).mark_text(align="left", baseline="bottom", dx=4, dy=-2, fontSize=10, color=ALARM)
    return [rule, words.encode(x=alt.value(0), y=y, text="words:N")]


def chart_of(run: Run, panel: Panel, title: str, meaning: str) -> alt.LayerChart:
    """The panel with the flagged edits and its title."""
    scaled = alt.layer(*panel.scaled).resolve_scale(
        color="independent", strokeDash="independent", opacity="independent"
    )
    layers = [*flag_rules(run), scaled, *panel.free]
    chart = alt.layer(*layers).resolve_scale(
        y="independent", color="independent", strokeDash="independent", shape="independent"
    )
    return titled(chart, title, meaning, HEIGHT)
