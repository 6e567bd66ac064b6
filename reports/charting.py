"""What all charts have in common: colours, axes, the marks of flagged edits.

The palette is Okabe and Ito's, which stays apart for the colour-blind, with a marker of its own per line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.record.readings import Array
from stabilitylab.reports.text import number
from stabilitylab.reports.verdicts import end

INK: Final = "#1f2933"
MUTED: Final = "#5f6b7a"
GRID: Final = "#e4e8ed"
PAPER: Final = "#fefefe"
LANE: Final = "#fbeef1"
BAD: Final = "#b3123f"
BAD_CELL: Final = "#b31440"
"""Of cells that are pixels: they stay as they are in the dark, and so must their key."""
ZERO_CELL: Final = "#c3d6e8"
"""Of cells without a logarithm, off the colour map."""
ZERO_CELL_INK: Final = "#51687f"
ONSET: Final = "#a85f00"
LINES: Final = ("#0072b2", "#d55e00", "#009e73", "#c4629a", "#b8860b", "#3d9fd6", "#5d3a9b", "#7a5c2e")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")

WIDTH: Final = 4.6
"""Inches, where no style says another. Two or three stand side by side on a desk's screen; one fills a phone's."""

_STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a layer's name is a `$`
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "figure.figsize": (WIDTH, 2.7),
    "figure.dpi": 100.0,
    "savefig.facecolor": PAPER,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "stabilitylab",
}

_EDGE: Final = 2.0
"""Pixels between a figure's left edge and what stands there."""

_OVER: Final[ContextVar[Any]] = ContextVar("over", default=MappingProxyType({}))

_SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def style() -> Iterator[None]:
    """Our settings within the block; what a user has set for their own figures is left alone."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        mpl.rcParams.update(_OVER.get())
        yield


@contextmanager
def over(settings: Any) -> Iterator[None]:
    """Settings of matplotlib's, by name, over ours within the block, and over the user's where a figure is saved."""
    token = _OVER.set(settings)
    try:
        with mpl.rc_context(settings):
            yield
    finally:
        _OVER.reset(token)


def width() -> float:
    """How wide figures are, in inches; heights are each figure's own."""
    return float(mpl.rcParams["figure.figsize"][0])


def canvas(height: float, legend_rows: int = 0, panels: int = 1, left: float = 0.7) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes one above the other, and room for the legend below. Sizes are in inches."""
    figure = Figure(figsize=(width(), height))
    FigureCanvasAgg(figure)
    below = 0.46 + 0.19 * legend_rows
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left / width(), below / height, 1 - 0.12 / width(), 1 - 0.1 / height, hspace=0.32)
    return figure, list(axes)


def legend_columns(names: Iterable[str], most: int) -> int:
    """How many of these names fit beside each other below a figure, at most `most`."""
    widest = 0.5 + 0.07 * max(map(len, names), default=0)
    return max(1, min(most, int((width() - 0.1) / widest)))


def legend(figure: Figure, axis: Axes, columns: int) -> None:
    """The axis's labelled lines, below everything."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=columns, handlelength=1.6, columnspacing=1.1, labelspacing=0.25,
        borderaxespad=0.15, bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip


def colours(count: int) -> list[str]:
    """A colour per line: apart from each other for up to 8, else running with depth."""
    if count <= len(LINES):
        return list(LINES[:count])
    shades = mpl.colormaps["viridis"](np.linspace(0.15, 0.8, count))
    return [mpl.colors.to_hex(shade) for shade in shades]


def tick_text(value: float, _: int | None = None) -> str:
    """``0.01``, ``100``, ``10⁵``: powers of ten as such where they get long; nothing beyond all floats."""
    if math.isinf(value):
        return ""
    if value > 0 and (value >= 1e4 or value < 1e-2):
        exponent = math.floor(math.log10(value) + 1e-9)
        factor = value / 10.0**exponent if exponent > -300 else 1.0
        power = f"10{str(exponent).translate(_SUPERSCRIPT)}"
        return power if math.isclose(factor, 1.0, rel_tol=1e-6) else f"{number(factor)}·{power}"
    return number(value)


def edit_axis(axis: Axes, edits: Array) -> None:
    """Edit numbers along the bottom: whole ones."""
    first, last = (float(edits[0]), float(edits[-1])) if edits.size else (0.0, 0.0)
    axis.set_xlim(first - 0.5, last + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True) if last > first else FixedLocator([first]))
    axis.set_xlabel("edit", labelpad=1)


def value_axis(axis: Axes, finite: Array, log: bool, lanes: tuple[float, float]) -> None:
    """Scale and limits for `finite` values. lanes: shares of the height to keep free at the top and at the bottom."""
    above, below = lanes
    values = finite[finite > 0] if log else finite
    if not values.size:
        axis.set_yticks([])
        axis.set_ylim(0, 1)
        return
    if not log and needs_symlog(values):
        typical = max(float(np.median(np.abs(values[values != 0]))), 1e-300)
        axis.set_yscale("symlog", linthresh=typical)
        scale = axis.yaxis.get_transform()
        low, high = scale.transform(np.array([values.min(), values.max()]))
        pad = 0.05 * (high - low)
        with np.errstate(over="ignore"):
            ends = scale.inverted().transform(np.array([low - pad, high + pad]))
        axis.set_ylim(*np.clip(ends, -1e307, 1e307).tolist())
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(FixedLocator(symlog_ticks(values, typical)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"−{tick_text(-v)}" if v < 0 else tick_text(v)))
        return
    low, high = float(values.min()), float(values.max())
    if log:
        low, high = math.log10(low), math.log10(high)
    pad = 0.06 * (high - low) or (0.3 if log else 0.05 * abs(high) or 0.5)
    low, high = low - pad, high + pad
    span = (high - low) / (1.0 - above - below)
    low, high = low - below * span, high + above * span
    if not log:
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return
    axis.set_yscale("log")
    axis.set_ylim(10.0 ** max(low, -307.0), 10.0 ** min(high, 307.0))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(tick_text))
    if high - low < 0.8:
        axis.yaxis.set_major_locator(MaxNLocator(4))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high - low < 2.5 else (1.0,), numticks=6))


def needs_symlog(values: Array) -> bool:
    """Whether a linear axis would flatten all but a few values."""
    sizes = np.abs(values[values != 0])
    return sizes.size > 2 and float(sizes.max()) > 300.0 * float(np.median(sizes))


def symlog_ticks(values: Array, typical: float) -> list[float]:
    """Zero and a few powers of ten on each side that holds values, from `typical` on."""
    decades = np.arange(math.ceil(math.log10(typical)), math.floor(math.log10(float(np.abs(values).max()))) + 1)
    chosen = 10.0 ** decades[:: max(1, len(decades) // 3)].astype(float)
    return [*(-chosen[::-1] if (values < 0).any() else []), 0.0, *chosen]


LineStyle = tuple[float, tuple[float, ...]] | Literal["-"]
Mark = tuple[int, str, str, LineStyle]
"""(edit, name, colour, line style) of an edit that is marked on a chart."""


def flagged(diagnosis: Diagnosis) -> list[Mark]:
    """Each edit that every chart marks, in order of edit."""
    return _marks(diagnosis, (diagnosis.first_bad_edit, "first bad"))


def story(diagnosis: Diagnosis) -> list[Mark]:
    """Onset, alarm and the end: the first NaN or infinity, or the collapse, if the run came to one."""
    return _marks(diagnosis, end(diagnosis))


def _marks(diagnosis: Diagnosis, last: tuple[int | None, str]) -> list[Mark]:
    marks: list[tuple[int | None, str, str, LineStyle]] = [
        (diagnosis.onset_edit, "onset", ONSET, (0, (4, 2))),
        (diagnosis.alarm_edit, "alarm", MUTED, (0, (1, 1.6))),
        (*last, BAD, "-"),
    ]
    known = [(edit, name, colour, line) for edit, name, colour, line in marks if edit is not None]
    return sorted(known, key=lambda mark: mark[0])


def mark_edits(axis: Axes, marks: Sequence[Mark], *, named: bool = True) -> None:
    """A line at each edit. named: also write their names above the axis."""
    at: dict[int, list[tuple[str, str]]] = {}
    for edit, name, colour, line in marks:
        axis.axvline(edit, color=colour, linestyle=line, linewidth=1.2, zorder=1.5)
        at.setdefault(edit, []).append((name, colour))
    low, high = axis.get_xlim()
    taken = [-1.0, -1.0, -1.0]  # where the last name of each row of names ends
    for edit, names in at.items() if named else ():
        words = " · ".join(name for name, _ in names) + f" {edit}"
        place, long = (edit - low) / (high - low), 0.0175 * len(words) * WIDTH / width()
        start = min(max(place - long / 2, -0.05), 1.0 - long)
        row = next((row for row, end in enumerate(taken) if start > end), len(taken) - 1)
        taken[row] = start + long + 0.02
        axis.annotate(
            words, (start, 1.0), (0, 2 + 9.5 * row), xycoords="axes fraction", textcoords="offset points",
            color=names[-1][1], fontsize=8, va="bottom", annotation_clip=False,
        )  # fmt: skip
    figure = axis.figure
    if isinstance(figure, Figure):
        _keep_in_view(figure, axis)
        if named:
            rows = sum(end >= 0 for end in taken)
            figure.subplots_adjust(top=1.0 - (0.1 + 0.13 * rows) / float(figure.get_figheight()))


def _keep_in_view(figure: Figure, axis: Axes) -> None:
    """Make room at the left for the value axis's own words, where they need more than there is."""
    box = axis.yaxis.get_tightbbox(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    if box is not None and box.x0 < _EDGE:
        figure.subplots_adjust(left=figure.subplotpars.left + (_EDGE - float(box.x0)) / float(figure.bbox.width))


def lane(axis: Axes, share: float, words: str, *, top: bool = True) -> None:
    """Keep a share of the height for what is not a finite number, and say what stands there."""
    if not share:
        return
    bottom = 1.0 - share if top else 0.0
    shade, ink = (GRID, MUTED) if words == "0" else (LANE, BAD)
    axis.add_patch(Rectangle((0, bottom), 1, share, transform=axis.transAxes, color=shade, zorder=0.5, linewidth=0))
    axis.text(
        0.008, bottom + share / 2, words, transform=axis.transAxes, fontsize=7, color=ink, va="center", zorder=1.6,
        bbox={"facecolor": shade, "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip  # on ground of its own: over the line of a flagged edit, below the readings


def finite_of(series: Sequence[Array]) -> Array:
    """All finite values of some series as one array."""
    values = np.concatenate([np.ravel(line) for line in series]) if series else np.zeros(0)
    return np.array(values[np.isfinite(values)], dtype=np.float64)
