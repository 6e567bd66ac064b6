"""Series on an axis: lines, lanes for what is no finite number, rings around what findings rest on, limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from stabilitylab.analysis.findings import Finding
from stabilitylab.analysis.ledger import DRIFT_RULES
from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.record.readings import Array
from stabilitylab.record.run import Run
from stabilitylab.reports import charting
from stabilitylab.reports.charting import INK, MUTED, PAPER
from stabilitylab.reports.text import number, short_names

Mask = NDArray[np.bool_]

POINTS_AS_VECTORS: Final = 12_000
"""Beyond so many points a chart's lines become pixels: those are smaller then."""

_DOTTED_UP_TO: Final = 24
_LANES: Final = 5
_LANE_STEP: Final = 0.035


@dataclass(frozen=True)
class Line:
    """One site's scalar readings of one metric. values, there: [edits]; there: whether the reading was taken.

    place, of: which line it is, of how many. shade: its colour.
    """

    metric: str
    site: str
    values: Array
    there: Mask
    place: int
    of: int
    shade: str

    def drawn(self, log: bool) -> Array:
        """The values that have a place on the axis; NaN elsewhere."""
        good = np.isfinite(self.values) & ((self.values > 0) | (not log))
        return np.where(good, self.values, np.nan)

    def above(self) -> Mask:
        """NaN and ∞, which stand at the top."""
        return np.array(self.there & (np.isnan(self.values) | (self.values == np.inf)))

    def below(self, log: bool) -> Mask:
        """−∞, and zero on a log axis, which stand at the bottom."""
        return np.array(self.there & ((self.values == -np.inf) | ((self.values <= 0) & log)))


def choose(run: Run, metric: str, sites: str | Sequence[str] | None) -> tuple[str, ...]:
    """The sites of a metric that are meant: names, or patterns whose ``*`` crosses dots; None means all.

    In dataflow order for a pattern, else as given. Raises UsageError with the nearest name where one leads nowhere.
    """
    run.metric(metric)
    read_at = run.sites_of(metric)
    if sites is None:
        return read_at
    chosen: dict[str, None] = {}
    for wanted in (sites,) if isinstance(sites, str) else sites:
        found = (wanted,) if wanted in read_at else tuple(site for site in read_at if fnmatchcase(site, wanted))
        if not found:
            raise UsageError(f"metric {metric!r} has no site {wanted!r}{did_you_mean(wanted, read_at)}")
        chosen.update(dict.fromkeys(found))
    return tuple(chosen)


def read(run: Run, metric: str, sites: Sequence[str]) -> list[Line]:
    """A line per site; of a metric that holds several values, the first."""
    shades = charting.colours(len(sites))
    read_lines = []
    for place, site in enumerate(sites):
        values = run.series(metric, site)
        values = values[:, 0] if values.ndim == 2 else values
        there = run.present(metric, site)
        read_lines.append(Line(metric, site, values, there, place, len(sites), shades[place]))
    return read_lines


def names_of(sites: Sequence[str]) -> dict[str, str]:
    """Short names in characters that the font has for certain."""
    names = {site: name.replace("…", "..") for site, name in short_names(sites).items()}
    return {site: name.encode("ascii", "backslashreplace").decode("ascii") for site, name in names.items()}


def lane_height(masks: Iterable[Mask]) -> float:
    """The share of the axis's height that lanes for these take; 0 where there is nothing to show."""
    lanes = sum(bool(mask.any()) for mask in masks)
    return 0.0 if not lanes else 0.06 + _LANE_STEP * min(lanes, _LANES)


def draw(axis: Axes, run: Run, lines: Sequence[Line], *, log: bool) -> None:
    """Lines, lanes, rings, limits and value axis of one metric."""
    above = lane_height(line.above() for line in lines)
    below = lane_height(line.below(log) for line in lines)
    limits = shared_limits(run, lines[0].metric) if lines else np.zeros(0)
    finite = charting.finite_of([line.values for line in lines])
    charting.value_axis(axis, np.concatenate([finite, limits]), log, (above, below))
    names = names_of([line.site for line in lines])
    for line in lines:
        _line(axis, run, line, names[line.site], log)
        lane(axis, run.edit_numbers, line, log)
        ring(axis, run, line, log)
    charting.lane(axis, above, "NaN, ∞")
    charting.lane(axis, below, "0" if log else "−∞", top=False)
    for limit in limits.tolist():
        axis.axhline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (6, 3)), zorder=1)
        axis.annotate(
            f"limit {number(limit)}", (0.006, limit), (0, 2), fontsize=7, color=MUTED,
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip


def _line(axis: Axes, run: Run, line: Line, name: str, log: bool) -> None:
    drawn, edits = line.drawn(log), run.edit_numbers
    culprit, few = line.site == run.diagnosis().first_bad_site, line.of <= len(charting.LINES)
    every = 1 if edits.size <= _DOTTED_UP_TO else -(-edits.size // 8)
    lone = has_lone_points(drawn)
    axis.plot(
        edits, drawn, color=line.shade, label=name, rasterized=edits.size * line.of > POINTS_AS_VECTORS,
        marker=charting.MARKERS[line.place] if few else "." if lone else None,
        markevery=None if lone else (line.place * every // max(1, line.of), every),
        linewidth=2.2 if culprit else 1.3, zorder=3 if culprit else 2,
    )  # fmt: skip


def lane(axis: Axes, edits: Array, line: Line, log: bool) -> None:
    """A site's values that are no finite numbers, each site's a little further in than those of the one before."""
    step = _LANE_STEP * (line.place % _LANES)
    kinds = (
        (np.isnan(line.values) & line.there, "x", 0.97 - step),
        (line.values == np.inf, "^", 0.97 - step),
        (line.values == -np.inf, "v", 0.03 + step),
        (line.below(log) & np.isfinite(line.values), "o", 0.03 + step),
    )
    for mask, marker, height in kinds:
        if mask.any():
            begins = mask & ~np.concatenate([[False], mask[:-1]])
            every = np.arange(mask.size) % max(1, edits.size // 20) == 0
            axis.plot(
                edits, np.where(mask, height, np.nan), color=line.shade, linewidth=0.7, zorder=4, clip_on=False,
                marker=marker, markevery=np.flatnonzero(begins | (mask & every)).tolist(), markersize=3.5,
                markerfacecolor=PAPER if marker == "o" else line.shade, transform=axis.get_xaxis_transform(),
                rasterized=edits.size * line.of > POINTS_AS_VECTORS,
            )  # fmt: skip


def lone_points(drawn: Array) -> Mask:
    """The points that stand between gaps, where no line would show them."""
    known = np.concatenate([[False], np.isfinite(drawn), [False]])
    return np.array(known[1:-1] & ~known[:-2] & ~known[2:])


def has_lone_points(drawn: Array) -> bool:
    """Whether there is a point that no line would show."""
    return bool(lone_points(drawn).any())


def flagged_readings(run: Run, line: Line) -> list[tuple[Finding, float]]:
    """The findings about this line with its reading at their edit: what a finding gives may be a ratio or a sum.

    Those that are worth knowing only, and those about an edit without a reading, are left out.
    """
    places = {edit.edit: place for place, edit in enumerate(run.edits)}
    about = [
        finding
        for finding in run.diagnosis().findings
        if (finding.metric, finding.site) == (line.metric, line.site) and finding.verdict != "stable"
    ]
    return [
        (finding, float(line.values[places[finding.edit]]))
        for finding in about
        if finding.edit in places and line.there[places[finding.edit]]
    ]


def ring(axis: Axes, run: Run, line: Line, log: bool) -> None:
    """Rings around the readings that findings rest on."""
    points = [(finding.edit, value) for finding, value in flagged_readings(run, line)]
    shown = np.array([(edit, value) for edit, value in points if np.isfinite(value) and (value > 0 or not log)])
    if shown.size:
        axis.plot(
            shown[:, 0], shown[:, 1], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK,
            markeredgewidth=1.0, zorder=5,
        )  # fmt: skip


def shared_limits(run: Run, metric: str) -> Array:
    """The absolute limit that findings about the metric share. Drift has one of its own per site: not drawn."""
    found = {
        finding.threshold
        for finding in run.diagnosis().findings
        if finding.metric == metric and finding.verdict != "stable" and finding.rule not in DRIFT_RULES
    }
    shared = [value for value in found if np.isfinite(value) and value > 0]
    return np.array(shared if len(shared) == 1 else [], dtype=np.float64)
