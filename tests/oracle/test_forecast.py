"""The forecast's fit against a naive second one: one shape and one edit at a time, with SciPy's statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import linalg, stats

from stabilitylab.analysis.forecast import HORIZON, Crossing, crossing, noise
from stabilitylab.record.readings import Array


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


def naive_crossing(edits: Array, path: Array) -> list[float]:
    """Edits to 5, 50 and 95 %, infinite when they are not reached; every whole edit is looked at."""
    reading, step = naive_noise(edits, path)
    now, first, count = float(edits[-1]), float(edits[0]), len(edits)
    covariance = np.array([[step * min(now - a, now - b) + reading * (a == b) for b in edits] for a in edits])
    precision = linalg.inv(covariance)
    ahead = range(1, int(HORIZON * (now - first)) + 1)
    weights, shares = [], []
    for _, prior, factor, columns in naive_shapes(now, first):
        design = np.array([[column(edit) for column in columns] for edit in edits])  # type: ignore[operator]
        spread = linalg.inv(design.T @ precision @ design)
        fit = spread @ design.T @ precision @ path
        left = path - design @ fit
        squares = max(float(left @ precision @ left), 0.05 * count)
        free = count - len(columns)
        weights.append(prior * math.exp(-0.5 * (count * math.log(squares / count) + len(columns) * math.log(count))))
        past = []
        for edit in ahead:
            with np.errstate(over="ignore"):
                here = np.array([column(now + edit) for column in columns])  # type: ignore[operator]
            error = math.sqrt((here @ spread @ here + reading + step * edit) * squares / free)
            past.append(float(stats.t.cdf(-(here @ fit) / (factor * error), free)))
        shares.append(np.maximum.accumulate(past))
    mixed = np.average(shares, axis=0, weights=weights)
    return [next((float(edit) for edit, past in zip(ahead, mixed, strict=True) if past >= level), math.inf)
            for level in (0.05, 0.5, 0.95)]  # fmt: skip


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
