"""Series against their own baseline: slow trouble, and sudden.

Everything is on natural logs, per series (a metric at a site):

- **Baseline**: from dry edits where there are any (the median of single edits, each of which was rolled back), else
  the median of the first ``BASELINE`` readings in applied edits. Fixed from then on, since one that adapts learns the
  drift and never fires. Of the first edits, the spread comes from successive differences, so that growth which has
  begun already does not widen it. Either is pulled towards a prior per metric, so that a few quiet edits don't make
  it hair-triggered.
- ``drift`` (verdict ``drifting``): three readings in a row beyond 4 spreads and a factor of 3.
- ``growth`` (verdict ``diverging``): `level` or `trend` of `stabilitylab.analysis.detectors` reach their limits.
- ``jump`` (verdict ``diverging``): one update does.
- ``shrink``: a gradient may rightly be small when an edit was right already, but logits that draw together die.

Which series these are: see `drift_series`. A weight that is exactly zero before the first
edit, such as the one half of an adapter, and what its layer answers, are left out too: all of that is edits, and grows
as drift does. So is an update of zero, or of less than ``ROUNDING`` beside its weight: that edit did not land, or was
undone but for rounding, see `landing`. Where an optimizer's learning rate is known, an update counts as it would have
been at the series' first one: a warm-up makes larger steps, and that is no trouble of the model's. A rate that is too
large shows in what it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis import detectors, drift_ahead
from stabilitylab.analysis.columns import Columns, Flat, Once, PerSchema, Places, Schema
from stabilitylab.analysis.detectors import LAST, LEAST
from stabilitylab.analysis.drift_rates import log_rates, logs_without, rises
from stabilitylab.analysis.drift_series import (
    BAND_LOG,
    BAND_SPREADS,
    BASELINE,
    DOWN,
    DRIFT_LOG,
    DRIFT_SPREADS,
    FIXED,
    LONG,
    LONG_EVERY,
    NOTHING,
    PRIOR_WEIGHT,
    ROUNDING,
    SHORT,
    STATE,
    TRACKED,
    UP,
    updates,
)
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.analysis.trends import medians
from stabilitylab.analysis.words import number, place_name
from stabilitylab.record.readings import Array

_SIZE: Final = "weight.max_abs"
_RATE: Final = "gradient.learning_rate"
_NAMES: Final = {
    "logits.max": "the range of logits (max − min)",
    "canary.max": "the range of canary logits (max − min)",
}


@dataclass(frozen=True)
class _Claim:
    """What one rule says of some series. limits: logs over the baseline, by series. says: where a sentence is made."""

    rule: str
    series: Places
    limits: Array
    side: int = UP
    says: tuple[str, ...] | None = None


def _rate(slope: float) -> str:
    """Growth per edit from a slope of natural logs: a percentage, or a factor from 2 on."""
    return f"{math.expm1(slope):.0%}" if slope < math.log(2.0) else f"a factor of {number(math.exp(min(slope, 700.0)))}"


class DriftBank:
    """Watches every tracked series at once.

    Only applied edits and finite readings enter; a series may begin late, pause or end.
    """

    def __init__(self, columns: Columns, thresholds: Thresholds) -> None:
        self._peaks: dict[str, float] = {}
        self._columns = columns
        self._limits = {detector: thresholds.limit(detector) for detector in detectors.DETECTORS}
        self._once = Once()
        self._ahead: drift_ahead.Ahead | None = None
        self._number: dict[int, int] = {}
        self._state = np.zeros(0, dtype=STATE)
        self._dry: dict[int, list[float]] = {}
        self._from_zero: set[str] = set()
        self._which = PerSchema(self._look_up)
        self._updates = PerSchema(updates)

    @property
    def peaks(self) -> dict[str, float]:
        """The largest statistic of each detector so far."""
        if self._ahead is not None:
            self._ahead.catch_up(self._state, self._peaks)
        return self._peaks

    @property
    def ready(self) -> int:
        """How many series have a baseline."""
        return int(np.count_nonzero(self._has_baseline(slice(None))))

    def _has_baseline(self, series: Places | slice) -> NDArray[np.bool_]:
        known: NDArray[np.bool_] = np.isfinite(self._state["middle"][series])
        return known

    def observe_dry(self, row: Flat) -> None:
        """Take in a dry edit, which is for the baseline alone. From ``BASELINE`` of them on there is one."""
        read = self._read(row)
        state = self._state
        for one, log in zip(*read, strict=True):
            logs = self._dry.setdefault(int(one), [])
            logs.append(float(log))
            if len(logs) < BASELINE:
                continue
            # Dry edits are independent of one another: deviations from their median say how they spread.
            state["middle"][one] = middle = np.median(logs)
            spread = 1.4826 * float(np.median(np.abs(np.array(logs) - middle)))
            state["spread"][one] = _with_prior(state["prior"][one], spread, len(logs))

    def forget(self, hit: Hit) -> None:
        """What was claimed may be claimed again."""
        self._once.forget(hit.rule, hit.place)
        self._look_again()

    def look_ahead(self, rows: Sequence[Flat]) -> None:
        """Rows that will be observed next, none of them edit 0: those that say nothing are told from the others."""
        if self._ahead is not None:
            self._ahead.catch_up(self._state, self._peaks)
        for row in rows:
            self._which.of(row.schema)  # which numbers the series, in the order of the rows
        logs, starting = np.full((len(rows), self._state.size), np.nan), np.zeros(len(rows), dtype=bool)
        alike: dict[Schema, list[int]] = {}
        for at, row in enumerate(rows):
            if row.applied:
                alike.setdefault(row.schema, []).append(at)
        for schema, numbers in alike.items():
            values, finite = (
                np.stack([rows[at].values for at in numbers]),
                np.stack([rows[at].finite for at in numbers]),
            )
            series, read, good = self._readable(schema, values, finite)
            known = self._has_baseline(series)
            starting[numbers] = (good & (read >= 0) & ~known).any(axis=1)
            # What a first learning rate is compared with is known once its row has been looked at.
            rates, first = log_rates(values, self._which.of(schema)[3]), self._state["first_rate"][series]
            if rates is not None:
                new = np.flatnonzero((np.isfinite(rates) & np.isnan(first)).any(axis=1))
                if new.size:
                    starting[numbers[int(new[0])] :] = True
            here = np.where(good & known & (read >= 0), logs_without(read, rises(rates, first)), np.nan)
            logs[np.ix_(np.array(numbers), series)] = here
        places = self._state["place"]
        said = drift_ahead.Said(
            **{rule: self._once.said(rule, places) for rule in ("level", "growth", "drift", "shrink", "jump")}
        )
        self._ahead = drift_ahead.look(
            rows, logs, starting, self._state, said, self._limits.__getitem__, lambda which, n: self._last(which, n)[1]
        )

    def _look_again(self) -> None:
        """What was claimed counts in what there is to say."""
        if self._ahead is not None and self._ahead.left:
            self.look_ahead(self._ahead.left)

    def observe(self, row: Flat) -> list[Hit]:
        """Take one row in; the hits that it brings."""
        if self._ahead is not None:
            expected = self._ahead.is_next(row)
            if expected and self._ahead.passes():
                return []
            self._ahead.catch_up(self._state, self._peaks, but_last=expected)
            self._ahead = self._ahead if expected else None
        hits = self._observe(row)
        if hits:
            self._look_again()
        return hits

    def _observe(self, row: Flat) -> list[Hit]:
        if row.edit == 0:
            self._see_beginning(row)
        series, logs = self._read(row)
        if not row.applied or not series.size:
            return []
        state, at = self._state, self._state["count"][series] % LONG
        state["logs"][series, at], state["edits"][series, at] = logs, row.edit
        state["count"][series] += 1
        known = self._has_baseline(series)
        self._follow_band(series[known], logs[known], row.edit)
        self._make_baselines(series[~known & (state["count"][series] == BASELINE)])
        judged = series[self._has_baseline(series)]
        return self._judge(judged, row.edit) if judged.size else []

    def _see_beginning(self, row: Flat) -> None:
        """Which weights are zero before any edit."""
        positions = row.schema.position.items()
        self._from_zero = {site for (metric, site), at in positions if metric == _SIZE and row.values[at] == 0}
        for at, place in enumerate(self._state["place"].tolist()):
            metric, site = self._columns.keys[place]
            self._state["from_zero"][at] = self._grows_from_zero(metric, site, row.schema)

    def _grows_from_zero(self, metric: str, site: str, schema: Schema) -> bool:
        """schema: of the first row that has it. Of a weight that the first edit was seen to move there is no reading
        before any edit, and its distance from what it was is no share of that where that was zero.
        """
        unscaled = ("drift.norm", site) in schema.position and ("drift.ratio", site) not in schema.position
        zero = site in self._from_zero or (unscaled and self._columns.measures("drift.ratio"))
        return zero and metric.startswith(("weight.", "activation."))

    def _look_up(self, schema: Schema) -> tuple[Places, Places, Places, Places | None]:
        """Which positions of a row go to which series, and from which of them a lower end is subtracted; where learning
        rates of theirs are, -1 for none, or None where there is none at all.
        """
        found: list[tuple[int, int, int, int]] = []
        new = []
        for position, (metric, site) in enumerate(schema.keys):
            rule = TRACKED.get(metric)
            if rule is None or (rule.minus is not None and (rule.minus, site) not in schema.position):
                continue
            place = int(schema.places[position])
            if place not in self._number:
                self._number[place] = len(self._number)
                dies = rule.fallen == "diverging"
                zero = self._grows_from_zero(metric, site, schema)
                new.append((place, rule.spread, math.log(rule.shrinks), dies, rule.trend, rule.jumps, zero))
            minus = -1 if rule.minus is None else schema.position[rule.minus, site]
            rate = schema.position.get((_RATE, site), -1) if metric == "update.norm" else -1
            found.append((position, minus, self._number[place], rate))
        if new:
            state = np.zeros(len(new), dtype=STATE)
            for field, column in zip(FIXED, zip(*new, strict=True), strict=True):
                state[field] = column
            for field in ("middle", "spread", "since", "first_rate"):
                state[field] = np.nan
            self._state = np.concatenate((self._state, state))
        taken, minus, series, rates = np.array(found, dtype=np.intp).reshape(-1, 4).T
        return taken, minus, series, rates if (rates >= 0).any() else None

    def _read(self, row: Flat) -> tuple[Places, Array]:
        """(series, log) of what can be compared: finite, and above zero until there is a baseline."""
        series, read, good = self._readable(row.schema, row.values, row.finite)
        rates, first = log_rates(row.values, self._which.of(row.schema)[3]), self._state["first_rate"][series]
        if rates is not None and row.applied:
            self._state["first_rate"][series] = first = np.where(np.isnan(first), rates, first)
        self._state["risen"][series] = rises(rates, first)
        good &= (read > 0) | ((read == 0) & self._has_baseline(series))
        series = series[good]
        return series, logs_without(read[good], self._state["risen"][series])

    def _readable(
        self, schema: Schema, values: Array, finite: NDArray[np.bool_]
    ) -> tuple[Places, Array, NDArray[np.bool_]]:
        """(series, what is read of each, whether it can be compared). values, finite: of one row, or of several."""
        taken, minus, series, _ = self._which.of(schema)
        ranged = minus >= 0
        good = finite[..., taken] & (~ranged | finite[..., minus]) & ~self._state["from_zero"][series]
        update, ratio = self._updates.of(schema)
        lost = (values[..., update] == 0) | ((ratio >= 0) & (values[..., ratio] < ROUNDING))
        if lost.any():
            gone = np.zeros(values.shape, dtype=bool)
            gone[..., update] = lost
            good &= ~gone[..., taken]
        read = np.zeros(good.shape)
        np.subtract(values[..., taken], np.where(ranged, values[..., minus], 0.0), out=read, where=good)
        return series, read, good

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
        state["spread"][series] = _with_prior(state["prior"][series], spread, BASELINE)
        for point in range(BASELINE):
            self._follow_band(series, logs[:, point], edits[:, point])

    def _follow_band(self, series: Places, logs: Array, edit: int | Array) -> None:
        """Since which edit each series is outside its band; one reading back inside does not end that."""
        state = self._state
        distance = logs - state["middle"][series]
        band = np.maximum(BAND_SPREADS * state["spread"][series], BAND_LOG)
        outside = np.stack((distance > band, distance < -band), axis=1)
        if not outside.any() and np.isnan(state["since"][series]).all():  # as mostly: all are where they were
            state["inside"][series] += 1.0
            return
        drift_ahead.follow_band(state, series, outside, edit)

    def _judge(self, series: Places, edit: int) -> list[Hit]:
        state = self._state
        hits = self._jumps(series[state["jumps"][series]], edit)
        series = series[state["count"][series] >= LAST]
        if not series.size:
            return hits
        spread = state["spread"][series]
        # By column, since numpy is slow to reduce many short lines.
        rise = np.asfortranarray(self._last(series, LAST)[1]) - state["middle"][series, None]
        level = self._peak("level", detectors.level(rise, detectors.far(spread)))
        hits += self._levels(series, level, edit)
        for claim in self._trends(series, rise, spread):
            hits += self._hits(claim, edit)
        left = np.maximum(DRIFT_SPREADS * spread, DRIFT_LOG)
        drift = rise.min(axis=1) > left
        for more in ("level", "growth"):
            drift &= ~self._once.said(more, state["place"][series])
        hits += self._hits(_Claim("drift", series[drift], left[drift]), edit)
        return hits + self._falls(series, rise, spread, edit)

    def _peak(self, detector: str, statistics: Array) -> Array:
        if statistics.size:
            self._peaks[detector] = max(self._peaks.get(detector, 0.0), float(statistics.max()))
        return statistics

    def _levels(self, series: Places, level: Array, edit: int) -> list[Hit]:
        high = level >= self._limits["level"]
        high &= ~self._once.said("growth", self._state["place"][series])  # which says more, and is never size alone
        limits = self._limits["level"] * detectors.far(self._state["spread"][series[high]])
        return self._hits(_Claim("level", series[high], limits), edit)

    def _falls(self, series: Places, rise: Array, spread: Array, edit: int) -> list[Hit]:
        """A fall that makes a run diverge is calibrated; one that is only drift has the metric's own limit."""
        unit = np.maximum(detectors.FAR_SPREADS * spread, self._state["shrinks"][series])
        fall, dies = detectors.fall(rise, unit), self._state["dies"][series]
        self._peak("shrink", fall[dies])
        limits = np.where(dies, self._limits["shrink"], 1.0)
        low = fall >= limits
        return self._hits(_Claim("shrink", series[low], -(limits * unit)[low], DOWN), edit)

    def _jumps(self, series: Places, edit: int) -> list[Hit]:
        """An update that is far beyond the baseline, and beyond those just before it."""
        state = self._state
        series = series[state["count"][series] >= 1]
        points = np.minimum(state["count"][series], LAST + 1)
        claims = []
        for length in np.unique(points):
            here = series[points == length]
            rise = self._last(here, int(length))[1] - state["middle"][here, None]
            before = medians(rise[:, :-1]) if length > 1 else np.zeros(here.size)
            unit = detectors.huge(state["spread"][here])
            jump = self._peak("jump", detectors.jump(rise[:, -1], before, unit))
            high = jump >= self._limits["jump"]
            claims.append(_Claim("jump", here[high], self._limits["jump"] * unit[high]))
        return [hit for claim in claims for hit in self._hits(claim, edit)]

    def _trends(self, series: Places, rise: Array, spread: Array) -> list[_Claim]:
        """Growth that is faster than edits of one size can add up to."""
        state, limit = self._state, self._limits["trend"]
        near = detectors.near(spread)
        # Below LEAST nothing counts, so that nothing needs be fitted.
        tested = (medians(rise) >= LEAST * near) & state["trend"][series]
        tested &= state["count"][series] >= BASELINE
        series, rise, near = series[tested], rise[tested], near[tested]
        count = state["count"][series]
        points = np.minimum(count, SHORT)
        windows = [(int(length), points == length) for length in np.unique(points)]
        windows.append((LONG, (count >= LONG) & ((count + series) % LONG_EVERY == 0)))
        claims = []
        for length, chosen in windows:
            if not chosen.any():
                continue
            edits, logs = self._last(series[chosen], length)
            statistic, slope, lower = detectors.trend(edits, logs, rise[chosen], near[chosen])
            fast = self._peak("trend", statistic) >= limit
            says = tuple(
                f"grows by {_rate(here)} per edit (at least {_rate(least)}, over {length} edits), faster than edits"
                " add up"
                for here, least in zip(slope[fast], lower[fast], strict=True)
            )
            claims.append(_Claim("growth", series[chosen][fast], limit * near[chosen][fast], says=says))
        return claims

    def _hits(self, claim: _Claim, edit: int) -> list[Hit]:
        if not claim.series.size:
            return []
        state, hits = self._state, []
        for at in np.flatnonzero(self._once.new(claim.rule, state["place"][claim.series])):
            series = claim.series[at : at + 1]
            place, risen = int(state["place"][series[0]]), float(state["risen"][series[0]])
            base = float(np.exp(min(state["middle"][series[0]] + risen, 700.0)))
            metric, site = self._columns.keys[place]
            log = float(self._last(series, 1)[1][0, 0])
            value = 0.0 if log <= NOTHING else math.exp(log + risen)
            left = float(state["since"][series[0], claim.side])
            since = edit if math.isnan(left) or claim.rule == "jump" else int(left)
            name = f"{_NAMES.get(metric, metric)} at {place_name(site)}"
            factor = f"{number(value / base)} times its baseline of {number(base)}"
            factor += " at this learning rate" if risen else ""
            side = "below" if claim.side == DOWN else "above"
            says = f"{name} is {factor} at edit {edit}, and {side} its band since edit {since}."
            if claim.rule == "jump":
                says = f"{name} jumped at edit {edit}: it is {factor}."
            if claim.says is not None:
                says = f"{name} {claim.says[at]}; at edit {edit} it is {factor}."
            threshold = base * math.exp(min(float(claim.limits[at]), 700.0))
            says = says[0].upper() + says[1:] if metric in _NAMES else says
            verdict = _verdict(claim.rule, metric)
            hits.append(Hit(claim.rule, metric, place, value, threshold, verdict, says, since, usual=base))
        return hits


def _verdict(rule: str, metric: str) -> Verdict:
    if rule == "shrink":
        return TRACKED[metric].fallen
    return "drifting" if rule == "drift" else "diverging"


def _with_prior(prior: Array, spread: Array | float, readings: int) -> Array:
    """A spread pulled towards its metric's prior, which counts for ``PRIOR_WEIGHT`` readings."""
    weight = PRIOR_WEIGHT / (PRIOR_WEIGHT + readings)
    return np.sqrt(weight * prior**2 + (1.0 - weight) * spread**2)
