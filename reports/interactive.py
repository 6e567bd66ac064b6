"""The page's charts as Vega-Lite, made with Altair: how things are drawn, with no data in it.

Each specification names the data sets that the page's script fills: ``marks`` (edit, name: onset, alarm, first bad),
``chosen`` (edit) and those told at each function. The parameters ``first`` and ``last`` are the ends of the edit axis.
Text and grid are coloured by the script, which also sets the height of charts that have a row per name. Rows keep
``value`` null where there is nothing to draw on the axis: a number beyond it is ``above`` (NaN, ∞) or ``below`` (−∞,
and 0 on a logarithmic axis), and is drawn at that edge.
"""

from __future__ import annotations

from typing import Any, Final

import altair as alt

from stabilitylab.reports.spec_parts import (
    ALARM,
    BAD,
    CHOSEN,
    GOOD,
    LABEL,
    LINES,
    NAMED_TICK,
    ONSET,
    SCALES,
    VERDICT_COLOURS,
    Spec,
    edit_axis,
    finished,
    layered,
    legend,
    line_and_dots,
    value_axis,
    value_scale,
)

BAD_CELL: Final = "#b31440"
ZERO_CELL: Final = "#c3d6e8"
SEAM: Final = 0.7
"""Pixels by which a cell reaches under the next: where two only touch, the paper shows through as a line."""
_MARKS: Final = ["onset", "alarm", "first bad"]
_VERDICTS: Final = ["worth knowing", "drifting", "diverging", "collapsed", "non-finite", "failed", "undone"]
_VERDICT_COLOURS: Final = [ALARM, *VERDICT_COLOURS[1:], "#8a63d2", "#56b4e9"]
_VERDICT_SHAPES: Final = ["circle", "diamond", "triangle-up", "square", "cross", "triangle-down", "triangle-left"]


def _rules() -> list[alt.Chart]:
    """The flagged edits, and the one that the reader has chosen."""
    marks = (
        alt.Chart(alt.NamedData("marks"))
        .mark_rule(strokeWidth=1.4, clip=True)
        .encode(
            x=edit_axis(),
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
        .encode(x=edit_axis())
    )
    return [chosen, marks]


def timeline() -> Spec:
    """``phases`` (start, end, kind) behind ``events`` (edit, kind): a row per kind of finding, and of lost edits."""
    kinds = alt.Scale(domain=["quiet", "onset", "bad", "ended"], range=[GOOD, ONSET, VERDICT_COLOURS[2], BAD])
    phases = (
        alt.Chart(alt.NamedData("phases"))
        .mark_rect(opacity=0.16, clip=True)
        .encode(
            x=edit_axis("start"), x2="end:Q",
            color=alt.Color("kind:N", scale=kinds, legend=None),
        )
    )  # fmt: skip
    events = (
        alt.Chart(alt.NamedData("events"))
        .mark_point(filled=True, size=55, opacity=0.95, clip=True)
        .encode(
            x=edit_axis(),
            y=alt.Y("kind:N", sort=_VERDICTS, title=None, axis=alt.Axis(grid=True, domain=False, ticks=False)),
            color=alt.Color("kind:N", scale=alt.Scale(domain=_VERDICTS, range=_VERDICT_COLOURS), legend=None),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=_VERDICTS, range=_VERDICT_SHAPES), legend=None),
        )
    )
    return layered([phases, *_rules(), events], 100)


def heatmap(scale: str) -> Spec:
    """``cells`` (start, end, site, value, kind) by edit and site. kind: ``good``, ``bad`` (NaN, ∞) or ``zero``.

    ``outline`` (start, end, site): the chosen cell. ``order``: all sites from the first to the last, as `site` rows.
    ``names`` (edit, name, words, align, row): of the flagged edits, above the map; row 0 is the lowest.
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
        format=LABEL,
        labelExpr=NAMED_TICK,
        tickCount=4,
        gradientLength=alt.ExprRef("min(width, 260)"),
    )
    good = (
        kind("good").mark_rect(clip=True, x2Offset=SEAM).encode(
            x=edit_axis("start"), x2="end:Q", y=site,
            color=alt.Color("value:Q", scale=value_scale(scale, scheme="cividis"), legend=bar),
        )
    )  # fmt: skip
    zero = (
        kind("zero")
        .mark_rect(color=ZERO_CELL, clip=True, x2Offset=SEAM)
        .encode(x=edit_axis("start"), x2="end:Q", y=site)
    )
    bad = (
        kind("bad").mark_rect(color=BAD_CELL, clip=True, x2Offset=SEAM).encode(x=edit_axis("start"), x2="end:Q", y=site)
    )
    outline = (
        alt.Chart(alt.NamedData("outline"))
        .mark_rect(fillOpacity=0, stroke="#ffffff", strokeWidth=3.5, clip=True)
        .encode(x=edit_axis("start"), x2="end:Q", y=site)
    )
    inner = (
        alt.Chart(alt.NamedData("outline"))
        .mark_rect(fillOpacity=0, stroke="#000000", strokeWidth=1.5, clip=True)
        .encode(x=edit_axis("start"), x2="end:Q", y=site)
    )
    return layered([rows, good, zero, bad, _rules()[1], outline, inner, _names()], 100)


def _names() -> alt.Chart:
    """What the lines of flagged edits are, above the frame; as the page's script has placed them."""
    names: alt.Chart = (
        alt.Chart(alt.NamedData("names"))
        .transform_filter("datum.edit >= first && datum.edit <= last")
        .mark_text(
            baseline="bottom", fontSize=12, align=alt.ExprRef("datum.align"), yOffset=alt.ExprRef("-3 - 14 * datum.row")
        )
        .encode(
            x=edit_axis(), y=alt.value(0), text="words:N",
            color=alt.Color("name:N", scale=alt.Scale(domain=_MARKS, range=[ONSET, ALARM, BAD]), legend=None),
        )
    )  # fmt: skip
    return names


def _above(rows: alt.NamedData) -> alt.Chart:
    """A cross at the upper edge for what is NaN or infinite."""
    crosses: alt.Chart = (
        alt.Chart(rows)
        .transform_filter("datum.above")
        .mark_point(shape="cross", angle=45, size=34, color=BAD, filled=True, clip=True)
        .encode(x=edit_axis(), y=alt.value(5))
    )
    return crosses


def lines(scale: str) -> Spec:
    """``points`` (edit, site, value, above, below, lone) as a line per site. ``limits`` (value): dashed across.

    ``rings`` (edit, value): the readings that findings rest on.
    """
    points = alt.NamedData("points")
    colour = alt.Color("site:N", sort=None, scale=alt.Scale(range=list(LINES)), legend=legend(170))
    height = value_axis(scale)
    plain = alt.Color("site:N", sort=None, scale=alt.Scale(range=list(LINES)), legend=None)
    line, lone = line_and_dots(points, height, {"color": colour}, plain)
    below = (
        alt.Chart(points)
        .transform_filter("datum.below")
        .mark_point(shape="circle", size=20, color=ALARM, clip=True)
        .encode(x=edit_axis(), y=alt.value(145))
    )
    limits = (
        alt.Chart(alt.NamedData("limits"))
        .mark_rule(strokeDash=[6, 4], color=ALARM, strokeWidth=1)
        .encode(y=height)
    )  # fmt: skip
    rings = (
        alt.Chart(alt.NamedData("rings"))
        .mark_point(size=70, color=BAD, strokeWidth=1.6, clip=True)
        .encode(x=edit_axis(), y=height)
    )
    return layered([*_rules(), limits, line, lone, rings, _above(points), below], 150)


def band() -> Spec:
    """``band`` (edit, low, high, middle, above): smallest to largest logit, and the log-sum-exp as a line."""
    rows = alt.NamedData("band")
    axis = alt.Axis(title=None, format=LABEL, labelExpr=NAMED_TICK, tickCount=5, domain=False, ticks=False)
    low = alt.Y("low:Q", scale=alt.Scale(zero=False, nice=False, padding=6), axis=axis)
    gaps: Any = "break-paths-show-path-domains"
    area = alt.Chart(rows).mark_area(opacity=0.3, color=LINES[0], clip=True, invalid=gaps).encode(
        x=edit_axis(), y=low, y2="high:Q"
    )  # fmt: skip
    middle = alt.Chart(rows).mark_line(strokeDash=[2, 2], color=LINES[1], clip=True, invalid=gaps).encode(
        x=edit_axis(), y=alt.Y("middle:Q", axis=axis)
    )  # fmt: skip
    return layered([*_rules(), area, middle, _above(rows)], 150)


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
            y=alt.Y("value:Q", axis=None, stack=False, scale=value_scale("log", nice=False)),
            y2=alt.value("height"),
            color=alt.Color("edit:O", scale=alt.Scale(scheme="viridis"), legend=None),
        )
        .properties(width=300, height=36)
        .facet(row=alt.Row("edit:O", title=None, header=names))
        .properties(spacing=-12, bounds="flush")
    )
    return finished(spectrum)


def run_charts() -> dict[str, Spec]:
    """Every specification that the page of one run draws with, by name."""
    return {
        "timeline": timeline(),
        "band": band(),
        "ridges": ridges(),
        **{f"heatmap.{scale}": heatmap(scale) for scale in SCALES},
        **{f"lines.{scale}": lines(scale) for scale in SCALES},
    }
