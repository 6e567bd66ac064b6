"""The forecast's fit against a naive second one: one shape and one edit at a time, with SciPy's statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import linalg, stats

from stabilitylab.analysis.columns import Columns
from stabilitylab.analysis.forecast import HORIZON, Crossing, Forecaster, _Fits, crossing, noise
from stabilitylab.record.readings import Array, EditRow, Key
from tests.synthetic_runs import METRICS, row


def falling(seed: int, how: str, points: int = 40, gaps: bool = False) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 4, points) if gaps else np.ones(points)
    edits = 7.0 + np.cumsum(steps).astype(np.float64)
    share = (edits - edits[0]) / (edits[-1] - edits[0])
    fallen = {
        "line": share,
        "bent": np.expm1(3.0 * share) / math.expm1(3.0),
        "late": np.maximum(0.0, 2.0 * share - 1.0),
    }
    path = 14.0 - 9.0 * fallen[how] + 0.3 * rng.standard_normal(points)
    return edits, path + 0.1 * rng.standard_normal(points).cumsum()


def naive_noise(edits: Array, path: Array) -> tuple[float, float]:
    gaps = np.diff(edits)
    middle = (edits[1:] + edits[:-1]) / 2.0
    pace = np.column_stack((gaps, gaps * middle))
    left = np.diff(path) - pace @ linalg.lstsq(pace, np.diff(path))[0]
    variance = sum(value**2 for value in left) / (len(left) - 2)
    together = sum(left[at] * left[at + 1] for at in range(len(left) - 1)) / (len(left) - 3)
    reading = min(max(-together, 0.0), variance / 2.0)
    return reading + 1e-4, max(variance - 2.0 * reading, 0.05 * variance) / float(np.mean(gaps))


def naive_shapes(now: float, first: float) -> list[tuple[str, float, float, list[object]]]:
    """(kind, prior, factor on the standard error, columns as functions of the edit)."""
    span = now - first

    def share(edit: float) -> float:
        return (edit - now) / span

    def kink(at: float) -> object:
        return lambda edit: max(0.0, edit - first - at * span)

    def bend(rate: float) -> object:
        return lambda edit: math.exp(rate * share(edit))

    shapes: list[tuple[str, float, float, list[object]]] = [
        ("line", 1.0, 1.0, [lambda edit: 1.0, share]),
        ("parabola", 0.1, 3.0, [lambda edit: 1.0, share, lambda edit: share(edit) ** 2]),
        ("power", 1.0, 1.0, [lambda edit: 1.0, lambda edit: math.log(edit + 1.0)]),
    ]
    shapes += [("kink", 1 / 4, 1.0, [lambda edit: 1.0, share, kink(at)]) for at in (0.2, 0.4, 0.6, 0.75)]
    rates = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
    return shapes + [("bent", 1 / 8, 3.0, [lambda edit: 1.0, bend(rate)]) for rate in rates]


@dataclass(frozen=True)
class NaiveFit:
    """One shape fitted to a path."""

    kind: str
    factor: float
    columns: list[object]
    fit: Array
    spread: Array
    squares: float
    free: int

    def past_limit(self, now: float, edits: int, reading: float, step: float) -> float:
        """The probability that the path is at or below zero `edits` from now."""
        here = np.array([column(now + edits) for column in self.columns])  # type: ignore[operator]
        error = math.sqrt((here @ self.spread @ here + reading + step * edits) * self.squares / self.free)
        return float(stats.t.cdf(-(here @ self.fit) / (self.factor * error), self.free))


def naive_fits(edits: Array, path: Array) -> tuple[list[NaiveFit], Array]:
    """All shapes, and their weights, which add up to 1."""
    reading, step = naive_noise(edits, path)
    now, first, count = float(edits[-1]), float(edits[0]), len(edits)
    covariance = np.array([[step * min(now - a, now - b) + reading * (a == b) for b in edits] for a in edits])
    precision = linalg.inv(covariance)
    fits, weights = [], []
    for kind, prior, factor, columns in naive_shapes(now, first):
        design = np.array([[column(edit) for column in columns] for edit in edits])  # type: ignore[operator]
        spread = linalg.inv(design.T @ precision @ design)
        fit = spread @ design.T @ precision @ path
        left = path - design @ fit
        squares = max(float(left @ precision @ left), 0.05 * count)
        weights.append(prior * math.exp(-0.5 * (count * math.log(squares / count) + len(columns) * math.log(count))))
        fits.append(NaiveFit(kind, factor, columns, fit, spread, squares, count - len(columns)))
    return fits, np.array(weights) / sum(weights)


def naive_shares(edits: Array, path: Array, ahead: Sequence[int]) -> Array:
    """The share of predictions that are past the limit within each of so many edits; once past is past."""
    reading, step = naive_noise(edits, path)
    fits, weights = naive_fits(edits, path)
    kept = [number for number, weight in enumerate(weights) if weight >= 1e-3]
    shares = []
    for number in kept:
        past = [fits[number].past_limit(float(edits[-1]), edit, reading, step) for edit in ahead]
        shares.append(np.maximum.accumulate(past))
    return np.asarray(np.average(shares, axis=0, weights=weights[kept]))


def naive_crossing(edits: Array, path: Array) -> list[float]:
    """Edits to 5, 50 and 95 %, infinite when they are not reached; every whole edit is looked at."""
    ahead = range(1, int(HORIZON * (edits[-1] - edits[0])) + 1)
    mixed = naive_shares(edits, path, ahead)
    return [next((float(edit) for edit, past in zip(ahead, mixed, strict=True) if past >= level), math.inf)
            for level in (0.05, 0.5, 0.95)]  # fmt: skip


def naive_shape(edits: Array, path: Array) -> str:
    """A line, with a kink or without, is exponential growth; a parabola counts as what it bends towards."""
    fits, weights = naive_fits(edits, path)
    down = {fit.kind: fit.fit[2] < 0 for fit in fits if fit.kind == "parabola"}["parabola"]
    words = {"line": "exponential", "kink": "exponential", "bent": "accelerating", "power": "flattening"}
    words["parabola"] = "accelerating" if down else "flattening"
    believed = dict.fromkeys(("exponential", "accelerating", "flattening"), 0.0)
    for fit, weight in zip(fits, weights, strict=True):
        believed[words[fit.kind]] += weight
    return max(believed, key=believed.__getitem__)


@pytest.mark.parametrize("how", ["line", "bent", "late"])
@pytest.mark.parametrize("seed", range(4))
def test_shares_past_the_limit_are_the_naive_ones(seed: int, how: str) -> None:
    edits, path = falling(seed, how, gaps=seed % 2 == 1)
    fits = _Fits.of(edits, path)
    np.testing.assert_allclose(fits.weights, naive_fits_in_order(edits, path), rtol=1e-6, atol=1e-9)
    ahead = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200]
    shares = fits.past_limit(np.array(ahead, dtype=np.float64), fits.weights)
    np.testing.assert_allclose(shares, naive_shares(edits, path, ahead), rtol=1e-6, atol=1e-9)
    assert fits.shape(fits.weights) == naive_shape(edits, path)


def naive_fits_in_order(edits: Array, path: Array) -> Array:
    """Weights as the module has its shapes: line, parabola, kinks, exponentials, power."""
    fits, weights = naive_fits(edits, path)
    order = ["line", "parabola", "kink", "bent", "power"]
    return weights[sorted(range(len(fits)), key=lambda at: (order.index(fits[at].kind), at))]


@pytest.mark.parametrize("seed", range(12))
def test_a_path_is_steady_when_its_line_falls_by_a_bit_and_by_three_errors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edits, said = np.arange(1.0, 21.0), set()
    for fall in np.linspace(0.2, 6.0, 30):
        path = 12.0 - fall * (edits - 1.0) / 19.0 + rng.uniform(0.01, 0.5) * rng.standard_normal(20)
        fits, _ = naive_fits(edits, path)
        line = fits[0]
        fallen, error = -line.fit[1], math.sqrt(line.spread[1, 1] * line.squares / line.free)
        steady = bool(fallen >= 1.0 and fallen >= 3.0 * error)
        assert _Fits.of(edits, path).steady == steady
        assert (crossing(edits, path) == "still") == (not steady)
        said.add(steady)
    assert said == {True, False}


@pytest.mark.parametrize("how", ["line", "bent"])
@pytest.mark.parametrize("seed", range(4))
def test_the_ends_of_the_interval_are_where_the_shares_are(seed: int, how: str) -> None:
    edits, path = falling(seed, how)
    found, fits = crossing(edits, path), _Fits.of(edits, path)
    assert isinstance(found, Crossing)
    for end, share in ((found.low, 0.05), (found.middle, 0.5), (found.high, 0.95)):
        if math.isfinite(end) and end > 1.0:
            (there,) = fits.past_limit(np.array([end]), fits.weights)
            assert there == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize(("path", "why"), [(7, "few"), (8, None)])
def test_eight_readings_are_enough_and_seven_are_few(path: int, why: str | None) -> None:
    edits = np.arange(1.0, path + 1.0)
    found = crossing(edits, 12.0 - edits)
    assert found == "few" if why else isinstance(found, Crossing)


@pytest.mark.parametrize(("last", "reached"), [(0.0, True), (-1.0, True), (0.01, False)])
def test_a_path_at_its_limit_has_reached_it(last: float, reached: bool) -> None:
    edits = np.arange(1.0, 14.0)
    assert (crossing(edits, np.linspace(12.0, last, 13)) == "reached") == reached


@pytest.mark.parametrize(
    ("low", "high", "tells"), [(1.0, 9.0, True), (1.0, 9.01, False), (5.0, 33.0, True), (5.0, math.inf, False)]
)
def test_an_interval_is_said_up_to_six_times_and_three_edits(low: float, high: float, tells: bool) -> None:
    assert Crossing(low, 6.0, high, "exponential").tells == tells


def histories(seed: int) -> tuple[list[EditRow], dict[Key, list[tuple[int, float]]]]:
    """Rows of six layers that fall towards their limits, some late, some with gaps, some not at all."""
    rng = np.random.default_rng([3, seed])
    metrics = ("weight.headroom_bits", "activation.headroom_bits", "activation.norm_headroom_bits")
    keys = [(metrics[number % 3], f"layer.{number}") for number in range(6)]
    pace, begins = rng.uniform(0.0, 0.4, 6), rng.integers(1, 25, 6)
    rows, held = [], {key: [] for key in keys}  # type: ignore[var-annotated]
    for edit in range(1, int(rng.integers(20, 75))):
        readings = {}
        for number, key in enumerate(keys):
            if edit >= begins[number] and rng.random() < 0.9:
                readings[key] = float(13.0 - pace[number] * edit + 0.2 * rng.standard_normal())
                held[key].append((edit, readings[key]))
        rows.append(row(edit, readings))
    return rows, held


def naive_nearest(held: dict[Key, list[tuple[int, float]]], now: int) -> list[Key]:
    """Of each metric the one that is nearest at the steeper of two paces; of these the two nearest."""
    left: dict[Key, float] = {}
    for key, readings in held.items():
        window = readings[-48:]
        if len(readings) < 8 or readings[-1][0] < now - 10:
            continue

        def mean(part: list[tuple[int, float]]) -> tuple[float, float]:
            return sum(edit for edit, _ in part) / 3, sum(value for _, value in part) / 3

        last, starts = mean(window[-3:]), [mean(window[:3]), mean(window[-min(len(window), 12) :][:3])]
        if last[1] <= 0 or max(value for _, value in starts) - last[1] < 1.0:
            continue
        left[key] = last[1] / max((value - last[1]) / (last[0] - edit) for edit, value in starts)
    nearest: dict[str, Key] = {}
    for key in sorted(left, key=left.__getitem__):
        nearest.setdefault(key[0], key)
    return list(nearest.values())[:2]


@pytest.mark.parametrize("seed", range(20))
def test_the_series_that_are_fitted_are_those_of_a_naive_look_at_all_of_them(seed: int) -> None:
    rows, held = histories(seed)
    columns = Columns(METRICS)
    forecaster = Forecaster(columns)
    for each in rows:
        forecaster.observe(columns.flatten(each))
    found = [columns.keys[int(forecaster._state["place"][series])] for series in forecaster._nearest()]
    expected = naive_nearest(held, rows[-1].edit)
    assert found == expected
    said = forecaster.forecast()
    if said.edits_left is not None:
        edits, path = (
            np.array(each, dtype=np.float64) for each in zip(*held[said.metric, said.site][-48:], strict=True)
        )
        crossed = crossing(edits, path)
        assert isinstance(crossed, Crossing)
        age = rows[-1].edit - edits[-1]
        assert said.low == max(math.floor(crossed.low - age), 1)
        assert said.edits_left == max(round(crossed.middle - age), 1)
        assert said.high == max(math.ceil(crossed.high - age), 1)
        assert said.shape == crossed.shape


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_noise_is_the_naive_one(seed: int, gaps: bool) -> None:
    edits, path = falling(seed, "line", gaps=gaps)
    assert noise(edits, path) == pytest.approx(naive_noise(edits, path), rel=1e-9)


def test_noise_tells_scatter_from_steps() -> None:
    rng = np.random.default_rng(0)
    edits = np.arange(1.0, 3001.0)
    scatter, steps = 0.5 * rng.standard_normal(3000), 0.3 * rng.standard_normal(3000).cumsum()
    reading, step = noise(edits, scatter + steps - 0.1 * edits)
    assert (math.sqrt(reading), math.sqrt(step)) == pytest.approx((0.5, 0.3), rel=0.1)


@pytest.mark.parametrize("how", ["line", "bent", "late"])
@pytest.mark.parametrize("seed", range(6))
def test_interval_is_the_naive_one(seed: int, how: str) -> None:
    edits, path = falling(seed, how, gaps=seed % 2 == 1)
    found = crossing(edits, path)
    assert isinstance(found, Crossing)
    for ours, theirs in zip((found.low, found.middle, found.high), naive_crossing(edits, path), strict=True):
        # Ours interpolates over a grid; the naive one goes up to the next whole edit.
        assert math.isinf(theirs) == math.isinf(ours)
        if math.isfinite(theirs):
            assert ours == pytest.approx(theirs - 0.5, rel=0.03, abs=0.6)


@pytest.mark.parametrize("seed", range(5))
def test_the_median_of_a_line_in_scatter_is_polyfits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edits = np.arange(1.0, 49.0)
    path = 20.0 - 0.3 * edits + 0.05 * rng.standard_normal(48)
    found = crossing(edits, path)
    (slope, start), spread = np.polyfit(edits, path, 1, cov=True)
    end = -start / slope - edits[-1]
    assert isinstance(found, Crossing)
    assert found.middle == pytest.approx(end, rel=0.05)
    # The line alone, with independent errors, is the least that can be unsure.
    error = math.sqrt(np.array([end + edits[-1], 1.0]) @ spread @ np.array([end + edits[-1], 1.0])) / -slope
    assert found.high - found.low > 2 * 1.645 * error
