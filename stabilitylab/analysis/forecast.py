"""How many edits are left until the nearest limit, with a 90 % interval, or in words why that can't be told.

Limits: weights, activations or the input of a normalisation overflow (0 bits of headroom); the canary is lost (by the
limits of `stabilitylab.analysis.facts`). Each series is turned into its distance to its limit in bits, as log2 of their
ratio, and fitted over its last ``WINDOW`` readings in applied edits. The canary's agreement too: its easiest answers go
first, so that a line through the share itself would be lost too early. The canary's divergence is taken as it is: on
real models it rises out of rounding error by factors, and from the first few tenths on by nats. It is the share of the
limit that is left, in eighths. In growth runs of the zoo's tuning seeds, intervals from its log held in 3 of 11
moments, and those from the divergence itself in 6 of 7.

**Shapes.** Five kinds of path are fitted: a line (exponential growth); a line with a kink, at four places (growth that
began or changed its pace within the window); a parabola, and exponentials at eight rates (doubling times that shrink or
grow); a line in log t (what adds up as a power of the number of edits, and never gets far).

**Noise.** Activations scatter around their path, weights move in random steps that stay. Both are in the covariance,
σ_o² I + σ_w² min(|t_i|, |t_j|) with t counted back from now; their ratio is taken from the variance and the first
autocovariance of the successive differences, where σ_o² alone gives −σ_o² in the latter. Generalised least squares; its
prediction is Student t.

**Interval.** Shapes are weighted by exp(−BIC/2) and a prior. The share of the weighted predictions that is past the
limit after h edits gives 5, 50 and 95 %: where shapes contradict one another, the interval is wide. It abstains then,
and where too little is known, nothing falls, or the limit is beyond ``HORIZON`` times what the window spans.

**Measured** with ``python -m benchmarks.forecast``: made-up paths with noise as in real runs, seeds that no setting was
chosen with, four moments of each of 400 paths per kind. Growth is exponential: median error 15 %, and 91 % of the
intervals held; the same in runs that are over within 40 edits: 17 % and 93 %; doubling times shrink: 27 % and 86 %. It
spoke at 53, 46 and 33 % of the moments. It was silent on all flat paths and jumps, and at 99.7 % of the moments or more
where values add up as √t or t. On the zoo's held-out loops (docs/detection.md), which are real, it spoke at 11 % of the
moments, nearly always of the canary, and 53 % of the intervals held: a canary is lost in bursts, with rests between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.special import stdtr

from stabilitylab.analysis.columns import Columns, Flat, PerSchema, Places, Schema
from stabilitylab.analysis.facts import AGREEMENT, KL_COLLAPSED
from stabilitylab.analysis.findings import Forecast, LimitKind, Shape
from stabilitylab.analysis.words import place_name
from stabilitylab.record.readings import Array

WINDOW: Final = 48
LEAST: Final = 8
"""Readings that a forecast needs."""
RECENT: Final = 12
FITTED: Final = 2
"""Series that are fitted at one edit, at most: of each metric the nearest, and of these the nearest by its cheap pace.
The second is asked when the first one can't tell."""
STALE: Final = 10
"""Edits after which a series that is no longer read is no longer forecast."""

EIGHTHS: Final = 8.0
"""Bits that the canary's divergence is away from its limit at first."""

FELL: Final = 1.0
"""Bits that a series must have fallen by within the window."""
STEADY: Final = 3.0
"""Standard errors that the slope of the line must be away from zero."""
HORIZON: Final = 6.0
WIDEST: Final = 6.0
"""High over low end of an interval that still says something."""
SLACK: Final = 3.0
"""Edits by which an interval may be wider: 1 to 9 is worth saying."""

KINKS: Final = np.array([0.2, 0.4, 0.6, 0.75])
"""Where within the window's span."""
RATES: Final = np.array([1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0])
"""Of exponentials, per span of the window."""
PARABOLA_PRIOR: Final = 0.1
CURVED_SPREAD: Final = 3.0
"""Curved shapes are taken to err by this factor more: a path that bends does not bend like any formula."""
RANDOM_STEPS: Final = 0.05
"""Share of the variance of differences that random steps have at least: no path is followed for ever."""
RESOLUTION: Final = 0.01
LEAST_CHI2: Final = 0.05
"""Bounds the noise from below where a path is followed exactly: in bits, and in mean squared scaled residuals."""

TAIL: Final = 0.05
NEGLIGIBLE: Final = 1e-3
"""Weight of a shape that is left out of the prediction."""

_GRID: Final = np.linspace(0.0, 1.0, 20)
# Shapes in the order of their columns; parameters of each, and its weight before any reading.
_LINE: Final = 0
_PARABOLA: Final = 1
_KINKED: Final = slice(2, 2 + KINKS.size)
_CURVED: Final = slice(_KINKED.stop, _KINKED.stop + RATES.size)
_POWER: Final = _CURVED.stop
_SHAPES: Final = _POWER + 1
_PARAMETERS: Final = np.array([2, 3, *[3] * KINKS.size, *[2] * RATES.size, 2])
_PRIOR: Final = np.array([1.0, PARABOLA_PRIOR, *[1.0 / KINKS.size] * KINKS.size, *[1.0 / RATES.size] * RATES.size, 1.0])
_SPREAD: Final = np.ones(_SHAPES)
_SPREAD[_PARABOLA] = CURVED_SPREAD
_SPREAD[_CURVED] = CURVED_SPREAD


@dataclass(frozen=True)
class Limit:
    """A limit that a metric can reach. what: who reaches it, and does: what happens then, for a sentence."""

    kind: LimitKind
    what: str
    does: str


LIMITS: Final = {
    "weight.headroom_bits": Limit("weight-overflow", "the weights of {}", "overflow"),
    "activation.headroom_bits": Limit("activation-overflow", "the activations of {}", "overflow"),
    "activation.norm_headroom_bits": Limit("norm-overflow", "the normalisation after {}", "overflows"),
    "canary.kl": Limit("canary-lost", "the canary", "is lost (by its KL to the original)"),
    "canary.agreement": Limit("canary-lost", "the canary", "is lost (by its agreement with the original)"),
}
_METRICS: Final = tuple(LIMITS)
_KL: Final = _METRICS.index("canary.kl")
_AGREEMENT: Final = _METRICS.index("canary.agreement")

Silence = Literal["few", "still", "reached", "unsure"]
"""Why there is no forecast: too few readings, nothing falls, the limit is passed, or too wide an interval."""


@dataclass(frozen=True)
class Crossing:
    """When a path reaches zero, in edits from its last reading, and the shape that fits best. inf: not foreseeable."""

    low: float
    middle: float
    high: float
    shape: Shape

    @property
    def tells(self) -> bool:
        """Whether the interval is narrow enough to be said."""
        return math.isfinite(self.high) and self.high <= WIDEST * self.low + SLACK


def noise(edits: Array, path: Array) -> tuple[float, float]:
    """(σ_o² of a reading, σ_w² of a random step per edit) of a path, from its successive differences."""
    gaps, steps = np.diff(edits), np.diff(path)
    middles = (edits[1:] + edits[:-1]) / 2.0 - edits[0]
    pace = np.stack((gaps, gaps * middles / (edits[-1] - edits[0])), axis=1)
    normal = pace.T @ pace
    left = steps - pace @ np.linalg.solve(normal, pace.T @ steps)
    variance = float(left @ left) / (left.size - 2)
    reading = min(max(-float(left[1:] @ left[:-1]) / (left.size - 3), 0.0), variance / 2.0)
    step = max(variance - 2.0 * reading, RANDOM_STEPS * variance) / float(gaps.mean())
    return reading + RESOLUTION**2, step


def _shapes(back: Array, span: float, now: float) -> Array:
    """Each shape's columns, [shape, time, 3]; an unused third one is zero. back: edits from now, negative before."""
    share = back / span
    columns = np.zeros((_SHAPES, back.size, 3))
    columns[:, :, 0] = 1.0
    columns[:, :, 1] = share
    columns[_PARABOLA, :, 2] = share**2
    columns[_KINKED, :, 2] = np.maximum(0.0, share + 1.0 - KINKS[:, None])
    columns[_CURVED, :, 1] = np.exp(np.minimum(RATES[:, None] * share, 50.0))
    columns[_POWER, :, 1] = np.log2((back + now + 1.0) / (now + 1.0))
    return columns


@dataclass(frozen=True)
class _Fits:
    """All shapes fitted to one path. factors: [shape, 3]; inverse: their covariance, [shape, 3, 3], where the mean
    squared residual, scaled by the noise, is 1; squares: the sum of these squares, [shape].
    """

    now: float
    span: float
    count: int
    reading: float
    step: float
    factors: Array
    inverse: Array
    squares: Array

    @classmethod
    def of(cls, edits: Array, path: Array) -> _Fits:
        """By generalised least squares."""
        now, span, count = float(edits[-1]), float(edits[-1] - edits[0]), edits.size
        back = edits - now
        reading, step = noise(edits, path)
        covariance = step * np.minimum(-back[:, None], -back) + reading * np.eye(count)
        columns = _shapes(back, span, now)
        stacked = np.concatenate((path[:, None], columns.transpose(1, 0, 2).reshape(count, -1)), axis=1)
        white = np.linalg.solve(np.linalg.cholesky(covariance), stacked)
        goal = white[:, 0]
        turned = np.ascontiguousarray(white[:, 1:].T).reshape(_SHAPES, 3, count)
        given = turned.transpose(0, 2, 1)
        gram = turned @ given
        gram[:, 2, 2] += _PARAMETERS == 2  # an unused column: its factor is 0
        inverse = np.linalg.inv(gram)
        factors = inverse @ (turned @ goal)[:, :, None]
        squares = ((goal - (given @ factors)[:, :, 0]) ** 2).sum(axis=1)
        squares = np.maximum(squares, LEAST_CHI2 * count)
        return cls(now, span, count, reading, step, factors[:, :, 0], inverse, squares)

    @property
    def free(self) -> Array:
        """Degrees of freedom by shape."""
        return (self.count - _PARAMETERS).astype(np.float64)

    @property
    def steady(self) -> bool:
        """Whether the line falls by enough, and for certain."""
        fallen = -float(self.factors[_LINE, 1])
        error = math.sqrt(self.inverse[_LINE, 1, 1] * self.squares[_LINE] / self.free[_LINE])
        return fallen >= FELL and fallen >= STEADY * error

    @property
    def weights(self) -> Array:
        """How much each shape is believed; they add up to 1."""
        bic = self.count * np.log(self.squares / self.count) + _PARAMETERS * math.log(self.count)
        weights = _PRIOR * np.exp(-(bic - bic.min()) / 2.0)
        return np.asarray(weights / weights.sum())

    def past_limit(self, ahead: Array, weights: Array) -> Array:
        """The weighted share of predictions that have reached zero within `ahead` edits, by each of these."""
        kept = np.flatnonzero(weights >= NEGLIGIBLE)
        future, free = _shapes(ahead, self.span, self.now)[kept], self.free[kept, None]
        variance = ((future @ self.inverse[kept]) * future).sum(axis=2) + self.reading + self.step * ahead
        spread = _SPREAD[kept, None] * np.sqrt(variance * self.squares[kept, None] / free)
        reached = stdtr(free, -(future @ self.factors[kept, :, None])[:, :, 0] / spread)
        return np.asarray(weights[kept] @ np.maximum.accumulate(reached, axis=1) / weights[kept].sum())

    def shape(self, weights: Array) -> Shape:
        """The name of the kind of shape that is believed most."""
        parabola, bent = float(weights[_PARABOLA]), self.factors[_PARABOLA, 2] < 0
        accelerating = float(weights[_CURVED].sum()) + parabola * bent
        flattening = float(weights[_POWER]) + parabola * (not bent)
        if max(accelerating, flattening) <= 1.0 - accelerating - flattening:
            return "exponential"
        return "accelerating" if accelerating >= flattening else "flattening"


def crossing(edits: Array, path: Array) -> Crossing | Silence:
    """When a falling path reaches zero.

    edits: increasing numbers from 1 on. path: distances to the limit, in bits.
    """
    if edits.size < LEAST:
        return "few"
    if path[-1] <= 0:
        return "reached"
    fits = _Fits.of(edits, path)
    if not fits.steady:
        return "still"
    weights = fits.weights
    coarse = (HORIZON * fits.span) ** _GRID
    past = fits.past_limit(coarse, weights)
    begin = coarse[max(int(np.searchsorted(past, TAIL)) - 1, 0)]
    end = coarse[min(int(np.searchsorted(past, 1.0 - TAIL)), coarse.size - 1)]
    fine = begin * (end / begin) ** _GRID
    past = fits.past_limit(fine, weights)
    low, middle, high = (_reaches(fine, past, share) for share in (TAIL, 0.5, 1.0 - TAIL))
    return Crossing(low, middle, high, fits.shape(weights))


def _reaches(ahead: Array, past: Array, share: float) -> float:
    """The edit from which on at least `share` is past the limit, interpolated; infinite when that is never so."""
    at = int(np.searchsorted(past, share))
    if at == ahead.size:
        return math.inf
    return float(np.interp(share, past[at - 1 : at + 1], ahead[at - 1 : at + 1])) if at else float(ahead[0])


_STATE: Final = np.dtype(
    [
        ("place", np.intp),
        ("metric", np.intp),
        ("count", np.intp),
        # Ring buffers of the last readings: the edit, and the distance to the limit.
        ("edits", np.float64, (WINDOW,)),
        ("path", np.float64, (WINDOW,)),
    ]
)


class Forecaster:
    """Remembers the last readings of every series that has a limit; fits the nearest ones when asked."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._number: dict[int, int] = {}
        self._state = np.zeros(0, dtype=_STATE)
        self._which = PerSchema(self._look_up)
        self._edit = 0

    def observe(self, row: Flat) -> None:
        """Take in a row. Only applied edits and finite readings enter."""
        self._edit = row.edit
        taken, series = self._which.of(row.schema)
        if not row.applied or not taken.size:
            return
        state, metric = self._state, self._state["metric"][series]
        values = row.values[taken]
        good = row.finite[taken]
        series, path = series[good], values[good]
        agreement, kl = metric[good] == _AGREEMENT, metric[good] == _KL
        path[agreement] = np.log2(np.maximum(path[agreement], AGREEMENT / 2.0) / AGREEMENT)  # 0 is past it, that's all
        path[kl] = EIGHTHS * (1.0 - path[kl] / KL_COLLAPSED)
        at = state["count"][series] % WINDOW
        state["edits"][series, at], state["path"][series, at] = row.edit, path
        state["count"][series] += 1

    def _look_up(self, schema: Schema) -> tuple[Places, Places]:
        """Which positions of a row go to which series."""
        found: list[tuple[int, int]] = []
        new = []
        for position, place in enumerate(schema.places.tolist()):
            metric = self._columns.keys[place][0]
            if metric not in LIMITS:
                continue
            if place not in self._number:
                self._number[place] = len(self._number)
                new.append((place, _METRICS.index(metric)))
            found.append((position, self._number[place]))
        if new:
            state = np.zeros(len(new), dtype=_STATE)
            state["place"], state["metric"] = zip(*new, strict=True)
            self._state = np.concatenate((self._state, state))
        taken, series = np.array(found, dtype=np.intp).reshape(-1, 2).T
        return taken, series

    def forecast(self) -> Forecast:
        """The limit that is nearest by its cheap pace and can be told, or why none can."""
        state = self._state
        if not state.size:
            return self._silent("Nothing that has a limit is read: no headroom, no canary.")
        most = int(state["count"].max())
        if most < LEAST:
            return self._silent(f"A forecast needs {LEAST} readings in applied edits; {most or 'none'} so far.")
        unsure: Forecast | None = None
        for series in self._nearest():
            edits, path = self._history(series)
            found = crossing(edits, path)
            if isinstance(found, Crossing):
                if found.tells:
                    return self._said(series, found, self._edit - float(edits[-1]))
                unsure = unsure or self._unsure(series, found)
        return unsure or self._reached() or self._silent("Nothing falls steadily towards a limit.")

    def _reached(self) -> Forecast | None:
        """Says which limit the first series that is past one has reached; None when none is."""
        state = self._state
        last = (np.arange(state.size), (state["count"] - 1) % WINDOW)
        past = (state["count"] > 0) & (state["edits"][last] >= self._edit - STALE) & (state["path"][last] <= 0)
        if not past.any():
            return None
        metric, site, limit = self._named(int(np.argmax(past)))
        why = f"There is nothing left to forecast of {limit.what.format(place_name(site))}: the limit is reached."
        return Forecast(made_at=self._edit, says=why, why=why, limit=limit.kind, site=site, metric=metric)

    def _history(self, series: int) -> tuple[Array, Array]:
        count = int(self._state["count"][series])
        at = np.arange(max(count - WINDOW, 0), count) % WINDOW
        return self._state["edits"][series, at], self._state["path"][series, at]

    def _nearest(self) -> Sequence[int]:
        """The series to fit: those that fell, of each metric the one that is nearest at its cheap pace; nearest first.

        The pace is the steeper of two: over the whole window, and over its last ``RECENT`` readings.
        """
        state = self._state
        known = np.flatnonzero(state["count"] >= LEAST)
        counts = state["count"][known]
        lengths = np.minimum(counts, WINDOW)

        def mean(back: Array) -> tuple[Array, Array]:
            """Mean (edit, distance) of the three readings from `back` readings ago on."""
            at = (counts[:, None] - back.astype(np.intp)[:, None] + np.arange(3)) % WINDOW
            return state["edits"][known[:, None], at].mean(axis=1), state["path"][known[:, None], at].mean(axis=1)

        edit, path = mean(np.full(known.size, 3.0))
        early_edit, early = mean(lengths.astype(np.float64))
        late_edit, late = mean(np.minimum(lengths, RECENT).astype(np.float64))
        pace = np.maximum((early - path) / (edit - early_edit), (late - path) / (edit - late_edit))
        fresh = state["edits"][known, (counts - 1) % WINDOW] >= self._edit - STALE
        good = fresh & (path > 0) & (np.maximum(early, late) - path >= FELL)
        known, left = known[good], path[good] / pace[good]
        nearest: dict[int, int] = {}
        for at in np.lexsort((known, left)).tolist():
            nearest.setdefault(int(state["metric"][known[at]]), int(known[at]))
        return list(nearest.values())[:FITTED]

    def _silent(self, why: str) -> Forecast:
        return Forecast(made_at=self._edit, says=why, why=why)

    def _named(self, series: int) -> tuple[str, str, Limit]:
        metric, site = self._columns.keys[int(self._state["place"][series])]
        return metric, site, LIMITS[metric]

    def _unsure(self, series: int, found: Crossing) -> Forecast:
        metric, site, limit = self._named(series)
        if math.isfinite(found.high):
            low, high = _whole(found.low, math.floor), _whole(found.high, math.ceil)
            ends = f"when that ends can't be told: anything from {low} to {high} edits fits"
        else:
            ends = "whether that ends at a limit can't be told"
        why = f"No forecast: {metric} at {place_name(site)} moves steadily, but {ends}."
        return Forecast(made_at=self._edit, says=why, why=why, limit=limit.kind, site=site, metric=metric)

    def _said(self, series: int, found: Crossing, age: float) -> Forecast:
        metric, site, limit = self._named(series)
        low, middle, high = (
            _whole(end - age, to)
            for end, to in ((found.low, math.floor), (found.middle, round), (found.high, math.ceil))
        )
        says = (
            f"At this pace {limit.what.format(place_name(site))} {limit.does} in about {middle}"
            f" edit{'s' if middle != 1 else ''} ({low} to {high})."
        )
        return Forecast(
            made_at=self._edit, says=says, limit=limit.kind, site=site, metric=metric,
            edits_left=middle, low=low, high=high, shape=found.shape,
        )  # fmt: skip


def _whole(edits: float, to: Callable[[float], int]) -> int:
    return max(to(edits), 1)
