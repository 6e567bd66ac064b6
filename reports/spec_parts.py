"""What all of the pages' charts have in common: colours, the edit axis, axes of values, legends, and how they end.

Colours that stand on the page's own background are chosen to be seen on a light and on a dark one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import altair as alt

ONSET: Final = "#d08700"
ALARM: Final = "#7f8ea0"
BAD: Final = "#e03a63"
CHOSEN: Final = "#2f8fe0"
GOOD: Final = "#1f9d73"
LINES: Final = ("#2f8fe0", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a63d2", "#a0784a")
"""Okabe and Ito's, moved a little so that all of them show on white and on near-black."""
VERDICT_COLOURS: Final = (GOOD, ONSET, "#e8692a", "#b45fa3", BAD)
"""From stable to non-finite."""
SCALES: Final = ("log", "linear")
LABEL: Final = ".4~g"
"""An axis's own format. On a logarithmic one it leaves out the ticks between, which `NAMED_TICK` leaves out too."""
TICK: Final = (
    "abs(datum.value) >= 1e5 || (datum.value != 0 && 1e-3 > abs(datum.value))"
    " ? replace(format(datum.value, '.3~e'), '+', '') : format(datum.value, ',.6~g')"
)
"""How a value stands at its axis: ``0.01``, ``6,000``, ``3.2e5``, as in `text.number`."""
NAMED_TICK: Final = f"datum.label == '' ? '' : {TICK}"
"""The same, of ticks that have a label."""

Spec = dict[str, Any]


def _ends() -> tuple[alt.Parameter, alt.Parameter]:
    return alt.param(name="first", value=0.0), alt.param(name="last", value=1.0)


def edit_axis(field: str = "edit", **axis: Any) -> alt.X:
    """The axis of edits, from the parameter ``first`` to ``last``."""
    ends: list[Any] = [alt.ExprRef("first"), alt.ExprRef("last")]
    return alt.X(
        f"{field}:Q",
        scale=alt.Scale(domain=ends, nice=False, zero=False),
        axis=alt.Axis(title="edit", format="d", tickMinStep=1, grid=False, tickCount=8, **axis),
    )


def value_scale(kind: str, **settings: Any) -> alt.Scale:
    """Of values; 0 need not be on it, and on a logarithmic one it can't be."""
    return alt.Scale(type="log", **settings) if kind == "log" else alt.Scale(type="linear", zero=False, **settings)


def _grid(kind: str) -> dict[str, Any]:
    """On a logarithmic axis, lines at powers of ten only."""
    if kind != "log":
        return {}
    whole = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 0.001"
    return {"gridOpacity": {"condition": {"test": whole, "value": 1}, "value": 0}}


def finished(chart: alt.LayerChart | alt.FacetChart | alt.Chart) -> Spec:
    """A specification as plain values, without a look of its own."""
    spec: Spec = chart.to_dict(validate=True)
    spec.pop("config", None)  # Altair's default look; the page's script brings its own
    return spec


def layered(layers: list[alt.Chart], height: int) -> Spec:
    """Layers on one axis of edits, as wide as the page lets them be. height: of the frame, in pixels."""
    chart = (
        alt.layer(*layers)
        .add_params(*_ends())
        .properties(width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .resolve_scale(color="independent", strokeDash="independent", shape="independent")
    )
    return finished(chart)


def legend(width: int) -> alt.Legend:
    """Of lines, below the chart. width: pixels that a name may take."""
    return alt.Legend(
        orient="bottom", title=None, columns=2, labelLimit=width, symbolType="stroke", symbolStrokeWidth=2
    )


def line_and_dots(points: alt.NamedData, height: alt.Y, named: Mapping[str, Any], plain: alt.Color) -> list[alt.Chart]:
    """A line for each name, broken where it is not finite, and a dot where a reading has no neighbour. named: how the
    lines are told apart, with their legend; plain: their colour without one.
    """
    line = (
        alt.Chart(points)
        .mark_line(strokeWidth=1.7, clip=True, invalid="break-paths-show-path-domains")
        .encode(x=edit_axis(), y=height, **named)
    )
    lone = (
        alt.Chart(points)
        .transform_filter("datum.lone")
        .mark_circle(size=22, clip=True)
        .encode(x=edit_axis(), y=height, color=plain)
    )
    return [line, lone]


def value_axis(scale: str) -> alt.Y:
    """The axis of a value."""
    return alt.Y(
        "value:Q",
        scale=value_scale(scale, nice=False, padding=6),
        axis=alt.Axis(
            title=None, format=LABEL, labelExpr=NAMED_TICK, tickCount=4, domain=False, ticks=False, **_grid(scale)
        ),
    )
