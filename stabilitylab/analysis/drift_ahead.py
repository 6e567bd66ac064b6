"""Many rows of tracked series at once: which of them say nothing, and what is remembered of these.

A run that is read from its file brings its rows by the thousand, and nearly all of them say nothing. That is seen here
with the statistics of `detectors` over all of these rows together; only rows of which it can't be said are looked at
one by one, as online. What they leave in a series' state is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from stabilitylab.analysis import detectors
from stabilitylab.analysis.columns import Flat, Places
from stabilitylab.analysis.detectors import LAST, LEAST
from stabilitylab.analysis.drift_series import BAND_LOG, BAND_SPREADS, DRIFT_LOG, DRIFT_SPREADS, LONG
from stabilitylab.analysis.trends import medians
from stabilitylab.record.readings import Array

State = NDArray[Any]
Flags = NDArray[np.bool_]
PEAKS: Final = ("level", "jump", "shrink")
"""Detectors whose statistic a row has that says nothing; a trend is not tested in such a row."""


@dataclass(frozen=True)
class Said:
    """What has been claimed of each series, and need not be again: [series]."""

    level: Flags
    growth: Flags
    drift: Flags
    shrink: Flags
    jump: Flags


@dataclass(frozen=True)
class _Group:
    """Series that are read in the same rows. rows: increasing. logs: [rows, series]."""

    rows: Places
    series: Places
    logs: Array


class Ahead:
    """Rows that come next, and how far they have come."""

    def __init__(self, flats: Sequence[Flat], loud: Flags, groups: Sequence[_Group], peaks: dict[str, Array]) -> None:
        self._flats = flats
        self._edits = np.array([flat.edit for flat in flats], dtype=np.float64)
        self._loud = loud.tolist()
        self._groups = groups
        self._peaks = peaks
        self._done = self._next = 0

    def is_next(self, row: Flat) -> bool:
        """Whether this row comes next."""
        return self._next < len(self._flats) and self._flats[self._next] is row

    def passes(self) -> bool:
        """Go on by one row. Whether it says nothing: then nobody need look at it."""
        self._next += 1
        return not self._loud[self._next - 1]

    @property
    def left(self) -> Sequence[Flat]:
        """The rows that have not come yet."""
        return self._flats[self._next :]

    def catch_up(self, state: State, peaks: dict[str, float], *, but_last: bool = False) -> None:
        """Remember the rows that have passed. but_last: the last one has not: it is looked at by itself."""
        begin, end, self._done = self._done, self._next - but_last, self._next
        if begin >= end:
            return
        for name, statistics in self._peaks.items():
            most = float(statistics[begin:end].max())
            if most > -np.inf:
                peaks[name] = max(peaks.get(name, 0.0), most)
        for group in self._groups:
            first, last = np.searchsorted(group.rows, (begin, end))
            if last > first:
                _remember(state, group.series, self._edits[group.rows[first:last]], group.logs[first:last])


def _remember(state: State, series: Places, edits: Array, logs: Array) -> None:
    """edits: [rows]. logs: [rows, series]."""
    rows = edits.size
    last = min(rows, LONG)
    at = (state["count"][series, None] + np.arange(rows - last, rows)) % LONG
    state["logs"][series[:, None], at], state["edits"][series[:, None], at] = (
        logs[rows - last :].T,
        edits[rows - last :],
    )
    state["count"][series] += rows
    distance = logs - state["middle"][series]
    band = np.maximum(BAND_SPREADS * state["spread"][series], BAND_LOG)
    outside = np.stack((distance > band, distance < -band), axis=2)
    moves = outside.any(axis=(0, 2)) | ~np.isnan(state["since"][series]).all(axis=1)
    state["inside"][series[~moves]] += float(rows)
    moving = series[moves]
    if moving.size:
        for edit, out in zip(edits, outside[:, moves], strict=True):
            follow_band(state, moving, out, edit)


def follow_band(state: State, series: Places, outside: Flags, edit: float | Array) -> None:
    """Since which edit each series is outside its band; one reading back inside does not end that.

    outside: upwards and downwards, [series, 2]. edit: of all of them, or of each.
    """
    since, edits = state["since"][series], np.broadcast_to(edit, series.shape)[:, None]
    inside = np.where(outside, 0.0, state["inside"][series] + 1.0)
    state["since"][series] = np.where(outside & np.isnan(since), edits, np.where(inside >= 2, np.nan, since))
    state["inside"][series] = inside


def look(
    flats: Sequence[Flat],
    logs: Array,
    starting: Flags,
    state: State,
    said: Said,
    limit: Callable[[str], float],
    last: Callable[[Places, int], Array],
) -> Ahead:
    """Look at rows that come next.

    logs: [rows, series], NaN where a series is not read. starting: whether a row is about a series that has no baseline
    yet, [rows]. limit: of each detector. last: the logs of so many last readings, [series, points].
    """
    loud = starting.copy()
    peaks = {name: np.full(len(flats), -np.inf) for name in PEAKS}
    groups = []
    for rows, series in _read_together(~np.isnan(logs)):
        known = np.isfinite(state["middle"][series]) & (state["count"][series] > LAST)
        if not known.all():
            loud[rows] = True
        group = _Group(rows, series[known], logs[np.ix_(rows, series[known])])
        if group.series.size:
            groups.append(group)
            loud[rows] |= _speaks(group, state, said, limit, last(group.series, LAST), peaks)
    return Ahead(flats, loud, groups, peaks)


def _read_together(read: Flags) -> Iterator[tuple[Places, Places]]:
    """(rows, series) of those series that are read in the same rows. read: [rows, series]."""
    groups: dict[bytes, list[int]] = {}
    for series, packed in enumerate(np.packbits(read, axis=0).T.copy()):
        groups.setdefault(packed.tobytes(), []).append(series)
    for members in groups.values():
        rows = np.flatnonzero(read[:, members[0]])
        if rows.size:
            yield rows, np.array(members, dtype=np.intp)


def _speaks(
    group: _Group,
    state: State,
    said: Said,
    limit: Callable[[str], float],
    before: Array,
    peaks: dict[str, Array],
) -> Flags:
    """Whether a rule may have something new to say, by row. before: the last `LAST` logs, [series, LAST]."""
    series, rows = group.series, group.rows.size
    rise = np.concatenate((before.T, group.logs)) - state["middle"][series]
    windows = sliding_window_view(rise, LAST + 1, axis=0).reshape(-1, LAST + 1)
    # By column, since numpy is slow to reduce many short lines.
    windows = np.asfortranarray(windows)
    recent = windows[:, 1:]

    def each(of_series: NDArray[Any]) -> NDArray[Any]:
        """The same in each row."""
        return np.tile(of_series, rows)

    def peak(name: str, statistics: Array, whose: Flags) -> None:
        if whose.any():
            most = statistics.reshape(rows, -1)[:, whose].max(axis=1)
            peaks[name][group.rows] = np.maximum(peaks[name][group.rows], most)

    spread, shrinks = state["spread"][series], state["shrinks"][series]
    dies, jumps = state["dies"][series], state["jumps"][series]
    level = detectors.level(recent, each(detectors.far(spread)))
    fall = detectors.fall(recent, each(np.maximum(detectors.FAR_SPREADS * spread, shrinks)))
    jump = detectors.jump(windows[:, -1], medians(windows[:, :-1]), each(detectors.huge(spread)))
    peak("level", level, np.ones(series.size, dtype=bool))
    peak("shrink", fall, dies)
    peak("jump", jump, jumps)
    larger = said.level[series] | said.growth[series]
    left = np.maximum(DRIFT_SPREADS * spread, DRIFT_LOG)
    speaks = (level >= limit("level")) & each(~larger)
    speaks |= (jump >= limit("jump")) & each(jumps & ~said.jump[series])
    speaks |= (fall >= each(np.where(dies, limit("shrink"), 1.0))) & each(~said.shrink[series])
    speaks |= (recent.min(axis=1) > each(left)) & each(~larger & ~said.drift[series])
    speaks |= (medians(recent) >= each(LEAST * detectors.near(spread))) & each(state["trend"][series])
    found: Flags = speaks.reshape(rows, -1).any(axis=1)
    return found
