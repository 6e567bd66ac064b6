"""The charts of the page that compares several runs, as Vega-Lite, with no data in them.

As `interactive`: each specification names the data sets that the page's script fills, those told at each function.
"""

from __future__ import annotations

from typing import Any, Final

import altair as alt

from stabilitylab.reports.spec_parts import (
    LABEL,
    NAMED_TICK,
    SCALES,
    VERDICT_COLOURS,
    Spec,
    edit_axis,
    finished,
    layered,
    legend,
    line_and_dots,
    value_axis,
)

_BLUE, _VIOLET, _SLATE, _CYAN = "#2f8fe0", "#8a63d2", "#768290", "#12a3b8"
_SOLID, _DASHED, _DOTTED = (1.0, 0.0), (5.0, 3.0), (1.5, 2.5)
RUNS: Final = (
    (_BLUE, _SOLID), (_VIOLET, _SOLID), (_SLATE, _SOLID), (_CYAN, _DASHED),
    (_BLUE, _DASHED), (_VIOLET, _DASHED), (_SLATE, _DASHED), (_CYAN, _DOTTED),
)  # fmt: skip
"""(colour, dash) of each of several runs: far from the colours of verdicts, which mean something else."""


def lanes() -> Spec:
    """``stretches`` (run, verdict, start, end): how long each of several runs kept its verdict, and ``ends``."""
    known = ["stable", "drifting", "diverging", "collapsed", "non-finite"]
    bars = (
        alt.Chart(alt.NamedData("stretches"))
        .mark_bar(height={"band": 0.62})
        .encode(
            x=edit_axis("start"), x2="end:Q", y=alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color(
                "verdict:N", sort=known, scale=alt.Scale(domain=known, range=list(VERDICT_COLOURS)),
                legend=alt.Legend(orient="bottom", title=None, symbolType="square", columns=3),
            ),
        )
    )  # fmt: skip
    return layered([bars], 100)


def trade() -> Spec:
    """``steps`` (run, drift, agreement, edit): the path of each run, from its first edit to its last."""
    drift = alt.X(
        "drift:Q",
        scale=alt.Scale(type="log", nice=False),
        title="drift.ratio, largest of all layers",
        axis=alt.Axis(format=LABEL, labelExpr=NAMED_TICK, tickCount=6, grid=False),
    )
    path = (
        alt.Chart(alt.NamedData("steps"))
        .mark_line(point={"size": 24}, strokeWidth=1.3)
        .encode(
            x=drift,
            y=alt.Y("agreement:Q", scale=alt.Scale(domain=[0, 1]), title="canary agreement"),
            order="edit:Q",
            **_runs("run:N", legend(220)),
        )
        .properties(width="container", height=340, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    )
    return finished(path)


def _runs(field: str, key: alt.Legend | None) -> dict[str, Any]:
    """Colour and dash of runs, by their name in `field`."""
    colours, dashes = [colour for colour, _ in RUNS], [list(dash) for _, dash in RUNS]
    return {
        "color": alt.Color(field, sort=None, scale=alt.Scale(range=colours), legend=key),
        "strokeDash": alt.StrokeDash(field, sort=None, scale=alt.Scale(range=dashes), legend=key),
    }


def run_lines(scale: str) -> Spec:
    """``points`` as for `lines`, with ``lane``, as a line per run; what has no place on the axis in the run's colour.

    lane: pixels by which a run's crosses and circles stand inside of the edge, so that none hides another's.
    """
    points, height = alt.NamedData("points"), value_axis(scale)
    plain = _runs("site:N", None)["color"]
    line, lone = line_and_dots(points, height, _runs("site:N", legend(170)), plain)
    above = (
        alt.Chart(points)
        .transform_filter("datum.above")
        .mark_point(shape="cross", angle=45, size=26, filled=True, clip=True, yOffset=alt.ExprRef("datum.lane"))
        .encode(x=edit_axis(), y=alt.value(0), color=plain)
    )
    below = (
        alt.Chart(points)
        .transform_filter("datum.below")
        .mark_point(shape="circle", size=18, clip=True, yOffset=alt.ExprRef("-datum.lane"))
        .encode(x=edit_axis(), y=alt.value(150), color=plain)
    )
    return layered([line, lone, above, below], 150)


def survival() -> Spec:
    """``steps`` (edit, share, curve) as a falling line per curve; ``ended`` (edit, share, curve): where runs ended."""
    names = ["not diverging", "of use"]
    colours = list(VERDICT_COLOURS[2:4])
    share = alt.Y(
        "share:Q",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(title="share of runs", format=".0%", tickCount=4, domain=False, ticks=False),
    )

    def colour(key: alt.Legend | None) -> alt.Color:
        return alt.Color("curve:N", sort=names, scale=alt.Scale(domain=names, range=colours), legend=key)

    dash = alt.StrokeDash(
        "curve:N", sort=names, scale=alt.Scale(domain=names, range=[list(_DASHED), list(_SOLID)]), legend=legend(170)
    )
    falling = (
        alt.Chart(alt.NamedData("steps"))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(x=edit_axis(), y=share, color=colour(legend(170)), strokeDash=dash)
    )
    ends = (
        alt.Chart(alt.NamedData("ended"))
        .mark_tick(orient="vertical", size=10, thickness=2)
        .encode(x=edit_axis(), y=share, color=colour(None))
    )
    return layered([falling, ends], 130)


def comparison_charts() -> dict[str, Spec]:
    """Every specification that the page of several runs draws with, by name."""
    charts = {f"lines.{scale}": run_lines(scale) for scale in SCALES}
    return {"lanes": lanes(), "survival": survival(), "trade": trade(), **charts}
