"""Slow trouble: series that leave their own baseline, or grow faster than edits can add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from stabilitylab.analysis.columns import Columns, Flat, Places
from stabilitylab.analysis.facts import number, place_name
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.readings import Array

BASELINE: Final = 8
SHORT: Final = 10
LONG: Final = 30
LONG_EVERY: Final = 4
CONFIDENCE: Final = 0.999
PRIOR_WEIGHT: Final = 4.0
EXPONENT: Final = 2.0

DRIFT_SIGMAS, DRIFT_LOG = 4.0, math.log(3.0)
GROWTH_SIGMAS, GROWTH_LOG = 8.0, math.log(100.0)
TREND_SIGMAS, TREND_LOG = 3.0, math.log(3.0)
BAND_SIGMAS, BAND_LOG = 2.0, math.log(1.5)
TINY: Final = 1e-30


@dataclass(frozen=True)
class Tracked:
    """How a metric is watched. spread: prior standard deviation of its log from edit to edit. shrinks: by what factor
    it must fall to count, None when a fall means nothing. minus: the metric to subtract, for a range."""

    spread: float
    shrinks: float | None = None
    minus: str | None = None


TRACKED: Final = {
    "update.norm": Tracked(0.5, 1e4),
    "weight.max_abs": Tracked(0.1),
    "activation.rms": Tracked(0.2, 100.0),
    "activation.max_abs": Tracked(0.3, 100.0),
    "activation.rms_beyond_first": Tracked(0.2, 100.0),
    "activation.max_abs_beyond_first": Tracked(0.3, 100.0),
    "gradient.norm": Tracked(1.0, 1e6),
    "logits.max": Tracked(0.2, 30.0, "logits.min"),
    "canary.max": Tracked(0.1, 30.0, "canary.min"),
    "editor.input_max": Tracked(0.5),
}


def theil_sen(x: Array, y: Array, confidence: float = CONFIDENCE) -> tuple[Array, Array, Array]:
    """Median of all pairwise slopes with Sen's two-sided confidence bounds, for many series at once.

    x, y: [series, points], without ties in x. Returns slope, lower and upper bound, each [series]. The bounds are order
    statistics of the slopes from the normal approximation of Kendall's statistic, as `scipy.stats.theilslopes` has
    them (Sen 1968), but for its correction for ties in y.
    """
    points = x.shape[1]
    first, second = np.triu_indices(points, 1)
    slopes = np.sort((y[:, second] - y[:, first]) / (x[:, second] - x[:, first]), axis=1)
    pairs = slopes.shape[1]
    reach = ndtri(0.5 + confidence / 2.0) * math.sqrt(points * (points - 1) * (2 * points + 5) / 18.0)
    upper = min(int(np.round((pairs + reach) / 2.0)), pairs - 1)
    lower = max(int(np.round((pairs - reach) / 2.0)) - 1, 0)
    return np.median(slopes, axis=1), slopes[:, lower], slopes[:, upper]


Side = Literal[1, -1]


class DriftBank:
    """Watches every tracked series with arrays over all of them: [series] and a ring buffer [series, LONG].

    Only applied edits and finite readings enter; a series may begin late and pause. The baseline is the median of its
    first ``BASELINE`` readings and stays: one that adapts learns the drift and never fires.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._series: dict[int, int] = {}
        self._rules: list[Tracked] = []
        self.places: Places = np.zeros(0, dtype=np.intp)
        self._values = np.zeros((0, LONG))
        self._edits = np.zeros((0, LONG))
        self._count = np.zeros(0, dtype=np.intp)
        self._middle = np.zeros(0)
        self._scale = np.zeros(0)
        self._prior = np.zeros(0)
        self._shrinks = np.zeros(0)
        self._since = {1: np.zeros(0), -1: np.zeros(0)}
        self._inside = {1: np.zeros(0, dtype=np.intp), -1: np.zeros(0, dtype=np.intp)}
        self._spoken: dict[str, NDArray[np.bool_]] = {}
        self._rows: tuple[Places, Places, Places] = (self.places, self.places, self.places)

    @property
    def ready(self) -> int:
        """How many series have a baseline."""
        return int(np.count_nonzero(self._count >= BASELINE))

    def _look_up(self, row: Flat) -> None:
        """Which positions of the row go to which series, and from which positions a lower end is subtracted."""
        keys = [self._columns.keys[place] for place in row.places]
        position = {key: at for at, key in enumerate(keys)}
        taken, minus, series = [], [], []
        new = []
        for at, (metric, site) in enumerate(keys):
            rule = TRACKED.get(metric)
            if rule is None or (rule.minus is not None and (rule.minus, site) not in position):
                continue
            place = int(row.places[at])
            if place not in self._series:
                self._series[place] = len(self._series)
                new.append((place, rule))
            taken.append(at)
            minus.append(-1 if rule.minus is None else position[rule.minus, site])
            series.append(self._series[place])
        self._grow(new)
        self._rows = (np.array(taken, np.intp), np.array(minus, np.intp), np.array(series, np.intp))

    def _grow(self, new: list[tuple[int, Tracked]]) -> None:
        if not new:
            return
        more = len(new)

        def longer(array: NDArray[np.generic], fill: float) -> NDArray[np.generic]:
            return np.concatenate((array, np.full((more, *array.shape[1:]), fill, dtype=array.dtype)))

        self.places = np.concatenate((self.places, np.array([place for place, _ in new], np.intp)))
        self._values, self._edits = longer(self._values, 0.0), longer(self._edits, 0.0)  # type: ignore[assignment]
        self._count = longer(self._count, 0)  # type: ignore[assignment]
        self._middle, self._scale = longer(self._middle, np.nan), longer(self._scale, np.nan)  # type: ignore[assignment]
        self._prior = np.concatenate((self._prior, np.array([rule.spread for _, rule in new])))
        self._shrinks = np.concatenate(
            (self._shrinks, np.array([math.inf if rule.shrinks is None else math.log(rule.shrinks) for _, rule in new]))
        )
        for side in (1, -1):
            self._since[side] = longer(self._since[side], np.nan)  # type: ignore[assignment]
            self._inside[side] = longer(self._inside[side], 0)  # type: ignore[assignment]
        self._spoken = {rule: longer(spoken, False) for rule, spoken in self._spoken.items()}  # type: ignore[misc]

    def observe(self, row: Flat) -> list[Hit]:
        """Take one row in; the hits that it brings."""
        if row.fresh:
            self._look_up(row)
        if not row.applied:
            return []
        taken, minus, series = self._rows
        values = _ranges(row, taken, minus)
        with np.errstate(invalid="ignore"):
            good = np.isfinite(values) & (values >= 0)
            # Zeros count as vanished once there is a baseline, but can't make one.
            good &= (values > 0) | (self._count[series] >= BASELINE)
        series, logs = series[good], np.log(np.maximum(values[good], TINY))
        if not series.size:
            return []
        at = self._count[series] % LONG
        self._values[series, at], self._edits[series, at] = logs, row.edit
        self._count[series] += 1
        self._make_baselines(series[self._count[series] == BASELINE])
        based = self._count[series] > BASELINE
        self._track_band(series[based], logs[based], row.edit)
        return self._judge(series[self._count[series] >= BASELINE], row.edit)

    def _last(self, series: Places, points: int) -> tuple[Array, Array]:
        """(edits, logs) of the last readings in order of time, each [series, points]."""
        at = (self._count[series, None] - points + np.arange(points)) % LONG
        return self._edits[series[:, None], at], self._values[series[:, None], at]

    def _make_baselines(self, series: Places) -> None:
        if not series.size:
            return
        edits, logs = self._last(series, BASELINE)
        self._middle[series] = np.median(logs, axis=1)
        # Spread from successive differences, so that growth that has begun already does not widen it; shrunk towards
        # the prior, so that a few quiet edits don't make it hair-triggered.
        spread = 1.4826 * np.median(np.abs(np.diff(logs, axis=1)), axis=1) / math.sqrt(2.0)
        prior = self._prior[series]
        weight = PRIOR_WEIGHT / (PRIOR_WEIGHT + BASELINE)
        self._scale[series] = np.sqrt(weight * prior**2 + (1.0 - weight) * spread**2)
        for point in range(BASELINE):
            self._track_band(series, logs[:, point], edits[:, point])

    def _track_band(self, series: Places, logs: Array, edit: int | Array) -> None:
        """Since which edit each series is outside its band; one reading back inside does not end that."""
        distance = logs - self._middle[series]
        band = np.maximum(BAND_SIGMAS * self._scale[series], BAND_LOG)
        for side in (1, -1):
            outside = side * distance > band
            since, inside = self._since[side][series], np.where(outside, 0, self._inside[side][series] + 1)
            since = np.where(outside & np.isnan(since), edit, np.where(inside >= 2, np.nan, since))
            self._since[side][series], self._inside[side][series] = since, inside

    def _judge(self, series: Places, edit: int) -> list[Hit]:
        if not series.size:
            return []
        _, last = self._last(series, 3)
        scale = self._scale[series]
        rise = last - self._middle[series, None]
        lowest, highest = rise.min(axis=1), rise.max(axis=1)
        far = np.maximum(GROWTH_SIGMAS * scale, GROWTH_LOG)
        left = np.maximum(DRIFT_SIGMAS * scale, DRIFT_LOG)
        climbing = (np.diff(last, axis=1) > 0).all(axis=1)
        growth = (lowest > far) | (climbing & (rise[:, 2] > far) & (rise[:, 1] > left))
        hits = self._speak("growth", series[growth], edit, 1, np.exp(far[growth]), "diverging", _says_far)
        tested = np.median(rise, axis=1) > np.maximum(TREND_SIGMAS * scale, TREND_LOG)
        hits += self._trends(series[tested & ~growth], edit)
        drift = lowest > left
        hits += self._speak("drift", series[drift], edit, 1, np.exp(left[drift]), "drifting", _says_far)
        fall = np.maximum(GROWTH_SIGMAS * scale, self._shrinks[series])
        fallen = highest < -fall
        return hits + self._speak("shrink", series[fallen], edit, -1, np.exp(-fall[fallen]), "drifting", _says_fallen)

    def _trends(self, series: Places, edit: int) -> list[Hit]:
        """Growth that is faster than adding up edits of the same size can be."""
        spoken = self._spoken.get("growth")
        if spoken is not None:
            series = series[~spoken[series]]
        hits: list[Hit] = []
        counts = self._count[series]
        short = np.minimum(counts, SHORT)
        for points in np.unique(short):
            hits += self._trend(series[short == points], int(points), edit)
        slow = series[(counts >= LONG) & (counts % LONG_EVERY == 0)]
        return hits + self._trend(slow, LONG, edit)

    def _trend(self, series: Places, points: int, edit: int) -> list[Hit]:
        if not series.size:
            return []
        edits, logs = self._last(series, points)
        slope, lower, _ = theil_sen(edits, logs)
        fast = lower * np.median(edits, axis=1) >= EXPONENT
        threshold = np.exp(np.maximum(TREND_SIGMAS * self._scale[series], TREND_LOG))[fast]

        def says(at: int, factor: float, since: int) -> Callable[[str, str], str]:
            per_edit, least = math.expm1(slope[fast][at]), math.expm1(lower[fast][at])
            return lambda metric, site: (
                f"{_name(metric)} at {place_name(site)} grows by {per_edit:.0%} per edit (at least {least:.0%} over the"
                f" last {points}), faster than edits add up; at edit {edit} it is {number(factor)} times its baseline."
            )

        return self._speak("growth", series[fast], edit, 1, threshold, "diverging", says)

    def _speak(
        self,
        rule: str,
        series: Places,
        edit: int,
        side: Side,
        factors: Array,
        verdict: Verdict,
        says: Callable[[int, float, int], Callable[[str, str], str]],
    ) -> list[Hit]:
        """Hits for those series that have not been reported for `rule` yet. factors: the thresholds, over baseline."""
        spoken = self._spoken.setdefault(rule, np.zeros(self.places.size, dtype=bool))
        hits = []
        for at in np.flatnonzero(~spoken[series]):
            number_, place = int(series[at]), int(self.places[series[at]])
            spoken[number_] = True
            base = math.exp(self._middle[number_])
            value = math.exp(self._last(series[at : at + 1], 1)[1][0, 0])
            left = self._since[side][number_]
            since = edit if np.isnan(left) else int(left)
            hits.append(
                Hit(
                    rule,
                    self._columns.keys[place][0],
                    place,
                    value,
                    base * float(factors[at]),
                    verdict,
                    says(int(at), value / base, since),
                    since,
                )
            )
        return hits


def _ranges(row: Flat, taken: Places, minus: Places) -> Array:
    """Values of the row with the lower ends subtracted where there are any; NaN where either is not finite."""
    low = np.where(minus >= 0, row.values[minus], 0.0)
    finite = row.finite[taken] & ((minus < 0) | row.finite[minus])
    return np.where(finite, row.values[taken] - np.where(finite, low, 0.0), np.nan)


def _name(metric: str) -> str:
    return {"logits.max": "The range of the logits (max − min)", "canary.max": "The range of the canary's logits"}.get(
        metric, metric
    )


def _says_far(at: int, factor: float, since: int) -> Callable[[str, str], str]:
    return lambda metric, site: (
        f"{_name(metric)} at {place_name(site)} is {number(factor)} times its baseline, and above it since edit {since}."
    )


def _says_fallen(at: int, factor: float, since: int) -> Callable[[str, str], str]:
    return lambda metric, site: (
        f"{_name(metric)} at {place_name(site)} has fallen to {number(factor)} times its baseline, below it since edit"
        f" {since}."
    )
