"""Slow trouble: series that leave their own baseline, or grow faster than edits can add up.

Everything is on natural logs, per series (a metric at a site):

- **Baseline**: the median of the first ``BASELINE`` readings in applied edits, fixed from then on, since one that
  adapts learns the drift and never fires. Its spread comes from successive differences, so that growth which has begun
  already does not widen it, and is pulled towards a prior per metric, so that a few quiet edits don't make it
  hair-triggered.
- ``drift`` (verdict ``drifting``): three readings in a row beyond 4 spreads and a factor of 3.
- ``growth`` (verdict ``diverging``), by any of: three readings in a row beyond 8 spreads and a factor of 100; three
  that climb past a quarter, a half and the whole of that distance; or a trend: the median of the last three is beyond 3
  spreads and a factor of 3, and the lower confidence bound of the Theil–Sen slope over the last 12 (or 30) readings
  amounts to a factor of 1.5 over the window, and times the number of the edit in the window's middle to at least 2.
  That product is the exponent of a power law: random steps of equal size add up as t^½, steps in one direction as t.
  From 2 on it is acceleration, which healthy accumulation does not show.
- ``shrink``: three in a row below the baseline by 8 spreads and a factor of its own per metric: a gradient may rightly
  be small when an edit was right already, but logits that draw together die.

A series is in ``TRACKED`` because healthy editing leaves it where it was. ``drift.norm`` (grows as √t or t) and the
canary's agreement and KL (change gently, and have absolute limits) are left out on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Columns, Flat, Once, Places
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.trends import theil_sen
from stabilitylab.analysis.words import number, place_name
from stabilitylab.readings import Array

BASELINE: Final = 8
PRIOR_WEIGHT: Final = 4.0
SHORT: Final = 12
LONG: Final = 30
LONG_EVERY: Final = 4
CONFIDENCE: Final = 0.9995
EXPONENT: Final = 2.0

DRIFT_SPREADS: Final = 4.0
DRIFT_LOG: Final = math.log(3.0)
GROWTH_SPREADS: Final = 8.0
GROWTH_LOG: Final = math.log(100.0)
TREND_SPREADS: Final = 3.0
TREND_LOG: Final = math.log(3.0)
TREND_LEAST: Final = math.log(1.5)
BAND_SPREADS: Final = 2.0
BAND_LOG: Final = math.log(1.5)
VANISHED: Final = 1e-30
"""Stands for zero, which has no log."""


@dataclass(frozen=True)
class Tracked:
    """How a metric is watched.

    spread: prior standard deviation of its log from edit to edit. shrinks: the factor by which it must fall to count,
    infinite where a fall means nothing. fallen: what such a fall is. minus: the metric to subtract, for a range.
    trend: whether its slope is tested.
    """

    spread: float
    shrinks: float = math.inf
    fallen: Verdict = "drifting"
    minus: str | None = None
    trend: bool = True


TRACKED: Final = {
    "update.norm": Tracked(0.5, 1e4),
    "weight.max_abs": Tracked(0.1),
    "activation.rms": Tracked(0.2, 100.0),
    "activation.max_abs": Tracked(0.3, 100.0),
    "activation.rms_beyond_first": Tracked(0.2, 100.0),
    "activation.max_abs_beyond_first": Tracked(0.3, 100.0),
    "gradient.norm": Tracked(1.0, 1e6, trend=False),  # leads by an edit or two at most, and is the noisiest of all
    "logits.max": Tracked(0.2, 30.0, "diverging", "logits.min"),
    "canary.max": Tracked(0.1, 30.0, "diverging", "canary.min"),
    "editor.input_max": Tracked(0.5),
}
_NAMES: Final = {
    "logits.max": "the range of logits (max − min)",
    "canary.max": "the range of canary logits (max − min)",
}

_STATE: Final = np.dtype(
    [
        ("place", np.intp),
        ("prior", np.float64),
        ("shrinks", np.float64),
        ("trend", np.bool_),
        ("count", np.intp),
        ("middle", np.float64),
        ("spread", np.float64),
        # By side, upwards first: since which edit it is outside its band, and readings in a row back inside.
        ("since", np.float64, (2,)),
        ("inside", np.float64, (2,)),
        # Ring buffers of the last readings.
        ("edits", np.float64, (LONG,)),
        ("logs", np.float64, (LONG,)),
    ]
)
UP: Final = 0
DOWN: Final = 1


@dataclass(frozen=True)
class _Claim:
    """What one rule says of some series. limits: logs over the baseline, by series."""

    rule: str
    series: Places
    limits: Array
    side: int = UP
    trends: tuple[str, ...] | None = None


def _rate(slope: float) -> str:
    """Growth per edit from a slope of natural logs: a percentage, or a factor from 2 on."""
    return f"{math.expm1(slope):.0%}" if slope < math.log(2.0) else f"a factor of {number(math.exp(min(slope, 700.0)))}"


class DriftBank:
    """Watches every tracked series at once.

    Only applied edits and finite readings enter; a series may begin late, pause or end.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._once = Once()
        self._number: dict[int, int] = {}
        self._state = np.zeros(0, dtype=_STATE)
        nothing = np.zeros(0, dtype=np.intp)
        self._taken, self._minus, self._series = nothing, nothing, nothing

    @property
    def ready(self) -> int:
        """How many series have a baseline."""
        return int(np.count_nonzero(self._state["count"] >= BASELINE))

    def observe(self, row: Flat) -> list[Hit]:
        """Take one row in; the hits that it brings."""
        if row.fresh:
            self._look_up(row)
        if not row.applied or not self._taken.size:
            return []
        series, logs = self._read(row)
        state, at = self._state, self._state["count"][series] % LONG
        state["logs"][series, at], state["edits"][series, at] = logs, row.edit
        state["count"][series] += 1
        count = state["count"][series]
        self._follow_band(series[count > BASELINE], logs[count > BASELINE], row.edit)
        self._make_baselines(series[count == BASELINE])
        judged = series[count >= BASELINE]
        return self._judge(judged, row.edit) if judged.size else []

    def _look_up(self, row: Flat) -> None:
        """Which positions of the row go to which series, and from which of them a lower end is subtracted."""
        keys = [self._columns.keys[place] for place in row.places]
        positions = {key: position for position, key in enumerate(keys)}
        found: list[tuple[int, int, int]] = []
        new = []
        for position, (metric, site) in enumerate(keys):
            rule = TRACKED.get(metric)
            if rule is None or (rule.minus is not None and (rule.minus, site) not in positions):
                continue
            place = int(row.places[position])
            if place not in self._number:
                self._number[place] = len(self._number)
                new.append((place, rule.spread, math.log(rule.shrinks), rule.trend))
            minus = -1 if rule.minus is None else positions[rule.minus, site]
            found.append((position, minus, self._number[place]))
        self._taken, self._minus, self._series = np.array(found, dtype=np.intp).reshape(-1, 3).T
        if new:
            state = np.zeros(len(new), dtype=_STATE)
            state["place"], state["prior"], state["shrinks"], state["trend"] = zip(*new, strict=True)
            state["middle"], state["spread"], state["since"] = np.nan, np.nan, np.nan
            self._state = np.concatenate((self._state, state))

    def _read(self, row: Flat) -> tuple[Places, Array]:
        """(series, log) of what can be compared: finite, and above zero until there is a baseline."""
        ranged = self._minus >= 0
        good = row.finite[self._taken] & (~ranged | row.finite[self._minus])
        taken, minus, ranged, series = self._taken[good], self._minus[good], ranged[good], self._series[good]
        values = row.values[taken] - np.where(ranged, row.values[minus], 0.0)
        good = (values > 0) | ((values == 0) & (self._state["count"][series] >= BASELINE))
        return series[good], np.log(np.maximum(values[good], VANISHED))

    def _last(self, series: Places, points: int) -> tuple[Array, Array]:
        """(edits, logs) of the last readings in order of time, each [series, points]."""
        at = (self._state["count"][series, None] - points + np.arange(points)) % LONG
        return self._state["edits"][series[:, None], at], self._state["logs"][series[:, None], at]

    def _make_baselines(self, series: Places) -> None:
        if not series.size:
            return
        state = self._state
        edits, logs = self._last(series, BASELINE)
        state["middle"][series] = np.median(logs, axis=1)
        # 1.4826 makes a median of absolute values a standard deviation; a difference has √2 times that of a reading.
        spread = 1.4826 / math.sqrt(2.0) * np.median(np.abs(np.diff(logs, axis=1)), axis=1)
        weight = PRIOR_WEIGHT / (PRIOR_WEIGHT + BASELINE)
        state["spread"][series] = np.sqrt(weight * state["prior"][series] ** 2 + (1.0 - weight) * spread**2)
        for point in range(BASELINE):
            self._follow_band(series, logs[:, point], edits[:, point])

    def _follow_band(self, series: Places, logs: Array, edit: int | Array) -> None:
        """Since which edit each series is outside its band; one reading back inside does not end that."""
        state = self._state
        distance = logs - state["middle"][series]
        band = np.maximum(BAND_SPREADS * state["spread"][series], BAND_LOG)
        outside = np.stack((distance > band, distance < -band), axis=1)
        since, edits = state["since"][series], np.broadcast_to(edit, series.shape)[:, None]
        inside = np.where(outside, 0.0, state["inside"][series] + 1.0)
        state["since"][series] = np.where(outside & np.isnan(since), edits, np.where(inside >= 2, np.nan, since))
        state["inside"][series] = inside

    def _judge(self, series: Places, edit: int) -> list[Hit]:
        state = self._state
        spread = state["spread"][series]
        rise = self._last(series, 3)[1] - state["middle"][series, None]
        far = np.maximum(GROWTH_SPREADS * spread, GROWTH_LOG)
        left = np.maximum(DRIFT_SPREADS * spread, DRIFT_LOG)
        near = np.maximum(TREND_SPREADS * spread, TREND_LOG)
        fall = np.maximum(GROWTH_SPREADS * spread, state["shrinks"][series])
        lowest = rise.min(axis=1)
        climbs = (np.diff(rise, axis=1) > 0).all(axis=1) & (rise > far[:, None] * (0.25, 0.5, 1.0)).all(axis=1)
        growth, drift, fallen = (lowest > far) | climbs, lowest > left, rise.max(axis=1) < -fall
        silent = ~growth & ~self._once.said("growth", state["place"][series])
        tested = (np.median(rise, axis=1) > near) & silent & state["trend"][series]
        hits = self._hits(_Claim("growth", series[growth], far[growth]), edit)
        for claim in self._trends(series[tested], near[tested]):
            hits += self._hits(claim, edit)
        drift &= ~self._once.said("growth", state["place"][series])  # which says more
        hits += self._hits(_Claim("drift", series[drift], left[drift]), edit)
        return hits + self._hits(_Claim("shrink", series[fallen], -fall[fallen], DOWN), edit)

    def _trends(self, series: Places, limits: Array) -> list[_Claim]:
        """Growth that is faster than edits of one size can add up to."""
        count = self._state["count"][series]
        points = np.minimum(count, SHORT)
        windows = [(int(length), points == length) for length in np.unique(points)]
        windows.append((LONG, (count >= LONG) & ((count + series) % LONG_EVERY == 0)))
        claims = []
        for length, chosen in windows:
            if not chosen.any():
                continue
            edits, logs = self._last(series[chosen], length)
            slope, lower, _ = theil_sen(edits, logs, CONFIDENCE)
            fast = (lower * np.median(edits, axis=1) >= EXPONENT) & (
                lower * (edits[:, -1] - edits[:, 0]) >= TREND_LEAST
            )
            says = tuple(
                f"grows by {_rate(here)} per edit (at least {_rate(least)}, over {length} edits), faster than edits"
                " add up"
                for here, least in zip(slope[fast], lower[fast], strict=True)
            )
            claims.append(_Claim("growth", series[chosen][fast], limits[chosen][fast], trends=says))
        return claims

    def _hits(self, claim: _Claim, edit: int) -> list[Hit]:
        state, hits = self._state, []
        for at in np.flatnonzero(self._once.new(claim.rule, state["place"][claim.series])):
            series = claim.series[at : at + 1]
            place, base = int(state["place"][series[0]]), float(np.exp(state["middle"][series[0]]))
            metric, site = self._columns.keys[place]
            log = float(self._last(series, 1)[1][0, 0])
            value = 0.0 if log <= math.log(VANISHED) else math.exp(log)
            left = float(state["since"][series[0], claim.side])
            since = edit if math.isnan(left) else int(left)
            name = f"{_NAMES.get(metric, metric)} at {place_name(site)}"
            factor = f"{number(value / base)} times its baseline of {number(base)}"
            side = "below" if claim.side == DOWN else "above"
            says = f"{name} is {factor} at edit {edit}, and {side} its band since edit {since}."
            if claim.trends is not None:
                says = f"{name} {claim.trends[at]}; at edit {edit} it is {factor}."
            verdict: Verdict = "drifting"
            if claim.rule == "growth":
                verdict = "diverging"
            elif claim.rule == "shrink":
                verdict = TRACKED[metric].fallen
            threshold = base * math.exp(float(claim.limits[at]))
            says = says[0].upper() + says[1:] if metric in _NAMES else says
            hits.append(Hit(claim.rule, metric, place, value, threshold, verdict, says, since))
        return hits
