"""The page's charts as Vega-Lite, made with Altair: how things are drawn, with no data in it.

Each specification names the data sets that the page's script fills: ``marks`` (edit, name: onset, alarm, first bad),
``chosen`` (edit) and those told at each function. The parameters ``first`` and ``last`` are the ends of the edit axis.
Colours that stand on the page's own background are chosen to be seen on a light and on a dark one; text and grid are
coloured by the script, which also sets the height of charts that have a row per name. Rows keep ``value`` null where
there is nothing to draw on the axis: a number beyond it is ``above`` (NaN, ∞) or ``below`` (−∞, and 0 on a logarithmic
axis), and is drawn at that edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt

ONSET: Final = "#d08700"
ALARM: Final = "#7f8ea0"
BAD: Final = "#e03a63"
CHOSEN: Final = "#2f8fe0"
GOOD: Final = "#1f9d73"
LINES: Final = ("#2f8fe0", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a63d2", "#a0784a")
"""Okabe and Ito's, moved a little so that all of them show on white and on near-black."""
RUNS: Final = ("#2f8fe0", "#8a63d2", "#a0784a", "#1fa5a5", "#7d8a2e", "#5a6fd8", "#6d8299", "#56b4e9")
"""Of several runs, where the colours of verdicts mean something else."""
BAD_CELL: Final = "#b31440"
ZERO_CELL: Final = "#c3d6e8"
SEAM: Final = 0.7
"""Pixels by which a cell reaches under the next: where two only touch, the paper shows through as a line."""
SCALES: Final = ("log", "linear")

Spec = dict[str, Any]

_MARKS: Final = ["onset", "alarm", "first bad"]
_VERDICTS: Final = ["worth knowing", "drifting", "diverging", "collapsed", "non-finite", "failed", "undone"]
_VERDICT_COLOURS: Final = [ALARM, ONSET, "#e8692a", "#b45fa3", BAD, "#8a63d2", "#56b4e9"]
_VERDICT_SHAPES: Final = ["circle", "diamond", "triangle-up", "square", "cross", "triangle-down", "triangle-left"]


def _ends() -> tuple[alt.Parameter, alt.Parameter]:
    return alt.param(name="first", value=0.0), alt.param(name="last", value=1.0)


def _edit(field: str = "edit", **axis: Any) -> alt.X:
    ends: list[Any] = [alt.ExprRef("first"), alt.ExprRef("last")]
    return alt.X(
        f"{field}:Q",
        scale=alt.Scale(domain=ends, nice=False, zero=False),
        axis=alt.Axis(title="edit", format="d", tickMinStep=1, grid=False, tickCount=8, **axis),
    )


def _rules() -> list[alt.Chart]:
    """The flagged edits, and the one that the reader has chosen."""
    marks = (
        alt.Chart(alt.NamedData("marks"))
        .mark_rule(strokeWidth=1.4, clip=True)
        .encode(
            x=_edit(),
            color=alt.Color(
                "name:N", scale=alt.Scale(domain=_MARKS, range=[ONSET, ALARM, BAD]), legend=None, sort=_MARKS
            ),
            strokeDash=alt.StrokeDash(
                "name:N", scale=alt.Scale(domain=_MARKS, range=[[5, 3], [1.5, 2.5], [1, 0]]), legend=None
            ),
        )
    )
    chosen = (
        alt.Chart(alt.NamedData("chosen"))
        .mark_rule(strokeWidth=5, opacity=0.28, color=CHOSEN, clip=True)
        .encode(x=_edit())
    )
    return [chosen, marks]


def _scale(kind: str, **settings: Any) -> alt.Scale:
    """Of values; 0 need not be on it, and on a logarithmic one it can't be."""
    return alt.Scale(type="log", **settings) if kind == "log" else alt.Scale(type="linear", zero=False, **settings)


def _grid(kind: str) -> dict[str, Any]:
    """On a logarithmic axis, lines at powers of ten only."""
    if kind != "log":
        return {}
    whole = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 0.001"
    return {"gridOpacity": {"condition": {"test": whole, "value": 1}, "value": 0}}


def _finished(chart: alt.LayerChart | alt.FacetChart | alt.Chart) -> Spec:
    spec: Spec = chart.to_dict(validate=True)
    spec.pop("config", None)  # Altair's default look; the page's script brings its own
    return spec


def _layered(layers: list[alt.Chart], height: int) -> Spec:
    chart = (
        alt.layer(*layers)
        .add_params(*_ends())
        .properties(width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .resolve_scale(color="independent", strokeDash="independent", shape="independent")
    )
    return _finished(chart)


def timeline() -> Spec:
    """``phases`` (start, end, kind) behind ``events`` (edit, kind): a row per kind of finding, and of lost edits."""
    kinds = ["quiet", "onset", "bad"]
    phases = (
        alt.Chart(alt.NamedData("phases"))
        .mark_rect(opacity=0.16, clip=True)
        .encode(
            x=_edit("start"), x2="end:Q",
            color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=[GOOD, ONSET, BAD]), legend=None),
        )
    )  # fmt: skip
    events = (
        alt.Chart(alt.NamedData("events"))
        .mark_point(filled=True, size=55, opacity=0.95, clip=True)
        .encode(
            x=_edit(),
            y=alt.Y("kind:N", sort=_VERDICTS, title=None, axis=alt.Axis(grid=True, domain=False, ticks=False)),
            color=alt.Color("kind:N", scale=alt.Scale(domain=_VERDICTS, range=_VERDICT_COLOURS), legend=None),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=_VERDICTS, range=_VERDICT_SHAPES), legend=None),
        )
    )
    return _layered([phases, *_rules(), events], 100)


def heatmap(scale: str) -> Spec:
    """``cells`` (start, end, site, value, kind) by edit and site. kind: ``good``, ``bad`` (NaN, ∞) or ``zero``.

    ``outline`` (start, end, site): the chosen cell. ``order``: all sites from the first to the last, as `site` rows.
    """
    site = alt.Y("site:N", sort=None, title=None, axis=alt.Axis(labelLimit=190, labelOverlap="greedy", ticks=False))
    cells = alt.NamedData("cells")

    def kind(name: str) -> alt.Chart:
        chosen: alt.Chart = alt.Chart(cells).transform_filter(f"datum.kind == '{name}'")
        return chosen

    rows = alt.Chart(alt.NamedData("order")).mark_point(opacity=0).encode(y=site)
    bar = alt.Legend(
        orient="bottom",
        direction="horizontal",
        title=None,
        format=".3~g",
        tickCount=4,
        gradientLength=alt.ExprRef("min(width, 260)"),
    )
    good = (
        kind("good").mark_rect(clip=True, x2Offset=SEAM).encode(
            x=_edit("start"), x2="end:Q", y=site,
            color=alt.Color("value:Q", scale=_scale(scale, scheme="cividis"), legend=bar),
        )
    )  # fmt: skip
    zero = (
        kind("zero").mark_rect(color=ZERO_CELL, clip=True, x2Offset=SEAM).encode(x=_edit("start"), x2="end:Q", y=site)
    )
    bad = kind("bad").mark_rect(color=BAD_CELL, clip=True, x2Offset=SEAM).encode(x=_edit("start"), x2="end:Q", y=site)
    outline = (
        alt.Chart(alt.NamedData("outline"))
        .mark_rect(fillOpacity=0, stroke="#ffffff", strokeWidth=3.5, clip=True)
        .encode(x=_edit("start"), x2="end:Q", y=site)
    )
    inner = (
        alt.Chart(alt.NamedData("outline"))
        .mark_rect(fillOpacity=0, stroke="#000000", strokeWidth=1.5, clip=True)
        .encode(x=_edit("start"), x2="end:Q", y=site)
    )
    return _layered([rows, good, zero, bad, _rules()[1], outline, inner], 100)


def _above(rows: alt.NamedData) -> alt.Chart:
    """A cross at the upper edge for what is NaN or infinite."""
    crosses: alt.Chart = (
        alt.Chart(rows)
        .transform_filter("datum.above")
        .mark_point(shape="cross", angle=45, size=34, color=BAD, filled=True, clip=True)
        .encode(x=_edit(), y=alt.value(5))
    )
    return crosses


def lines(scale: str, colours: Sequence[str] = LINES) -> Spec:
    """``points`` (edit, site, value, above, below, lone) as a line per site. ``limits`` (value): dashed across.

    ``rings`` (edit, value): the readings that findings rest on. colours: of the lines, in order.
    """
    points = alt.NamedData("points")
    colour = alt.Color(
        "site:N", sort=None, scale=alt.Scale(range=list(colours)),
        legend=alt.Legend(orient="bottom", title=None, columns=2, labelLimit=170, symbolType="stroke"),
    )  # fmt: skip
    height = alt.Y(
        "value:Q",
        scale=_scale(scale, nice=False, padding=6),
        axis=alt.Axis(title=None, format=".4~g", tickCount=4, domain=False, ticks=False, **_grid(scale)),
    )
    line = (
        alt.Chart(points)
        .mark_line(strokeWidth=1.7, clip=True, invalid="break-paths-show-path-domains")
        .encode(x=_edit(), y=height, color=colour)
    )
    plain = alt.Color("site:N", sort=None, scale=alt.Scale(range=list(colours)), legend=None)
    lone = (
        alt.Chart(points)
        .transform_filter("datum.lone")
        .mark_circle(size=22, clip=True)
        .encode(x=_edit(), y=height, color=plain)
    )
    below = (
        alt.Chart(points)
        .transform_filter("datum.below")
        .mark_point(shape="circle", size=20, color=ALARM, clip=True)
        .encode(x=_edit(), y=alt.value(145))
    )
    limits = (
        alt.Chart(alt.NamedData("limits"))
        .mark_rule(strokeDash=[6, 4], color=ALARM, strokeWidth=1)
        .encode(y=height)
    )  # fmt: skip
    rings = (
        alt.Chart(alt.NamedData("rings"))
        .mark_point(size=70, color=BAD, strokeWidth=1.6, clip=True)
        .encode(x=_edit(), y=height)
    )
    return _layered([*_rules(), limits, line, lone, rings, _above(points), below], 150)


def band() -> Spec:
    """``band`` (edit, low, high, middle, above): smallest to largest logit, and the log-sum-exp as a line."""
    rows = alt.NamedData("band")
    axis = alt.Axis(title=None, format=".3~g", tickCount=5, domain=False, ticks=False)
    low = alt.Y("low:Q", scale=alt.Scale(zero=False, nice=False, padding=6), axis=axis)
    gaps: Any = "break-paths-show-path-domains"
    area = alt.Chart(rows).mark_area(opacity=0.3, color=LINES[0], clip=True, invalid=gaps).encode(
        x=_edit(), y=low, y2="high:Q"
    )  # fmt: skip
    middle = alt.Chart(rows).mark_line(strokeDash=[2, 2], color=LINES[1], clip=True, invalid=gaps).encode(
        x=_edit(), y=alt.Y("middle:Q", axis=axis)
    )  # fmt: skip
    return _layered([*_rules(), area, middle, _above(rows)], 150)


def ridges() -> Spec:
    """``ridge`` (edit, rank, value): a spectrum per edit, one below the other, on one logarithmic axis."""
    rank = alt.X(
        "rank:Q",
        axis=alt.Axis(title="singular value, from the largest", grid=False, format="d", tickMinStep=1),
        scale=alt.Scale(nice=False, zero=False),
    )
    names = alt.Header(labelAngle=0, labelAlign="left", labelOrient="left")
    spectrum = (
        alt.Chart(alt.NamedData("ridge"))
        .mark_area(opacity=0.75, line={"strokeWidth": 1.2}, point={"size": 14}, interpolate="monotone")
        .encode(
            x=rank,
            y=alt.Y("value:Q", axis=None, stack=False, scale=_scale("log", nice=False)),
            y2=alt.value("height"),
            color=alt.Color("edit:O", scale=alt.Scale(scheme="viridis"), legend=None),
        )
        .properties(width=300, height=36)
        .facet(row=alt.Row("edit:O", title=None, header=names))
        .properties(spacing=-12, bounds="flush")
    )
    return _finished(spectrum)


def lanes() -> Spec:
    """``stretches`` (run, verdict, start, end): how long each of several runs kept its verdict, and ``ends``."""
    known = ["stable", "drifting", "diverging", "collapsed", "non-finite"]
    bars = (
        alt.Chart(alt.NamedData("stretches"))
        .mark_bar(height={"band": 0.62})
        .encode(
            x=_edit("start"), x2="end:Q", y=alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color(
                "verdict:N", sort=known, scale=alt.Scale(domain=known, range=[GOOD, *_VERDICT_COLOURS[1:5]]),
                legend=alt.Legend(orient="bottom", title=None, symbolType="square", columns=3),
            ),
        )
    )  # fmt: skip
    return _layered([bars], 100)


def trade() -> Spec:
    """``steps`` (run, drift, agreement, edit): the path of each run, from its first edit to its last."""
    colour = alt.Color(
        "run:N", sort=None, scale=alt.Scale(range=list(RUNS)),
        legend=alt.Legend(orient="bottom", title=None, columns=2, labelLimit=220),
    )  # fmt: skip
    drift = alt.X(
        "drift:Q",
        scale=alt.Scale(type="log", nice=False),
        title="drift.ratio, largest of all layers",
        axis=alt.Axis(format=".3~g", tickCount=6, grid=False),
    )
    path = (
        alt.Chart(alt.NamedData("steps"))
        .mark_line(point={"size": 24}, strokeWidth=1.3)
        .encode(
            x=drift,
            y=alt.Y("agreement:Q", scale=alt.Scale(domain=[0, 1]), title="canary agreement"),
            order="edit:Q",
            color=colour,
        )
        .properties(width="container", height=260, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    )
    return _finished(path)


def run_charts() -> dict[str, Spec]:
    """Every specification that the page of one run draws with, by name."""
    return {
        "timeline": timeline(),
        "band": band(),
        "ridges": ridges(),
        **{f"heatmap.{scale}": heatmap(scale) for scale in SCALES},
        **{f"lines.{scale}": lines(scale) for scale in SCALES},
    }


def comparison_charts() -> dict[str, Spec]:
    """Every specification that the page of several runs draws with, by name."""
    return {"lanes": lanes(), "trade": trade(), **{f"lines.{scale}": lines(scale, RUNS) for scale in SCALES}}
