"""The vectorised drift rules against SciPy and against a naive second implementation that keeps the whole history."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from stabilitylab.analysis import Analyzer
from stabilitylab.analysis.drift import _with_prior
from stabilitylab.analysis.drift_series import PRIOR_WEIGHT, TRACKED
from stabilitylab.analysis.thresholds import NOMINAL
from stabilitylab.analysis.trends import theil_sen
from stabilitylab.record.readings import EditRow, Key
from tests.synthetic_runs import METRICS, growing, healthy


@pytest.mark.parametrize("points", [2, 5, 8, 12, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.99, 0.9995])
def test_theil_sen_is_scipys(points: int, confidence: float) -> None:
    rng = np.random.default_rng(points)
    x = np.cumsum(rng.integers(1, 4, (20, points)), axis=1).astype(np.float64)
    y = rng.normal(size=(20, points)) + rng.normal(size=(20, 1)) * x
    slope, lower, upper = theil_sen(x, y, confidence)
    for series in range(20):
        expected = stats.theilslopes(y[series], x[series], alpha=confidence)
        assert slope[series] == pytest.approx(expected.slope, abs=1e-12)
        assert lower[series] == pytest.approx(expected.low_slope, abs=1e-12)
        assert upper[series] == pytest.approx(expected.high_slope, abs=1e-12)


def _histories(rows: list[EditRow]) -> dict[Key, list[tuple[int, float]]]:
    histories: dict[Key, list[tuple[int, float]]] = {}
    for row in rows:
        for metric, site in row.readings if row.status == "applied" else ():
            value = row.scalar(metric, site)
            minus = TRACKED[metric].minus if metric in TRACKED else None
            if minus is not None and value is not None:
                low = row.scalar(minus, site)
                value = None if low is None else value - low
            if metric in TRACKED and value is not None and value > 0:
                histories.setdefault((metric, site), []).append((row.edit, math.log(value)))
    return histories


def _naive(metric: str, history: list[tuple[int, float]], number: int) -> tuple[int | None, int | None]:
    """(edit of the first `drift` hit before any growth, edit of the first `growth` hit), by the written rules."""
    if len(history) < 8:
        return None, None
    first = [log for _, log in history[:8]]
    middle = float(np.median(first))
    steps = [abs(after - before) for before, after in itertools.pairwise(first)]
    spread = math.sqrt(
        (4 * TRACKED[metric].spread ** 2 + 8 * (1.4826 / math.sqrt(2) * float(np.median(steps))) ** 2) / 12
    )
    far, left = max(8 * spread, math.log(100)), max(4 * spread, math.log(3))
    drift = None
    for count in range(8, len(history) + 1):
        edit = history[count - 1][0]
        a, b, c = (log - middle for _, log in history[count - 3 : count])
        if min(a, b, c) > far or (a < b < c and a > far / 4 and b > far / 2 and c > far):
            return drift, edit
        if sorted((a, b, c))[1] > max(3 * spread, math.log(3)) and TRACKED[metric].trend:
            windows = [min(count, 12)] + ([30] if count >= 30 and (count + number) % 4 == 0 else [])
            for window in windows:
                edits, logs = np.array(history[count - window : count]).T
                least = stats.theilslopes(logs, edits, alpha=0.9995).low_slope
                if least * np.median(edits) >= 2 and least * (edits[-1] - edits[0]) >= math.log(1.5):
                    return drift, edit
        if drift is None and min(a, b, c) > left:
            drift = edit
    return drift, None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["healthy", "exponential", "super-exponential"])
def test_the_first_hits_are_those_of_the_written_rules(seed: int, how: str) -> None:
    rows = (healthy(seed) if how == "healthy" else growing(seed, how)).rows[:-1]
    analyzer = Analyzer(METRICS, NOMINAL)
    for row in rows:
        analyzer.observe(row)
    found = {
        rule: min((finding.edit for finding in analyzer.diagnosis().findings if finding.rule == rule), default=None)
        for rule in ("drift", "growth")
    }
    seen = dict.fromkeys(key for row in rows for key in row.readings if key[0] in TRACKED)
    histories = _histories(rows)
    naive = [_naive(key[0], histories.get(key, []), number) for number, key in enumerate(seen)]
    assert found["drift"] == min((edit for edit, _ in naive if edit is not None), default=None)
    assert found["growth"] == min((edit for _, edit in naive if edit is not None), default=None)


def _naive_peaks(metric: str, history: list[tuple[int, float]]) -> tuple[float, float]:
    """The largest statistic of ``level`` and of ``jump`` over a series, reading by reading."""
    if len(history) < 8:
        return 0.0, 0.0
    logs = [log for _, log in history]
    middle, steps = statistics.median(logs[:8]), [abs(b - a) for a, b in itertools.pairwise(logs[:8])]
    own = 1.4826 / math.sqrt(2) * statistics.median(steps)
    spread = math.sqrt(TRACKED[metric].spread ** 2 / 3 + own**2 * 2 / 3)
    far, huge = max(8 * spread, math.log(100)), max(8 * spread, math.log(1000))
    level = jump = 0.0
    for count in range(8, len(logs) + 1):
        a, b, c = (log - middle for log in logs[count - 3 : count])
        climb = min(4 * a, 2 * b, c) if a < b < c else -math.inf
        level = max(level, min(a, b, c) / far, climb / far)
        usual = max(statistics.median(logs[count - 4 : count - 1]) - middle, 0.0)
        jump = max(jump, (c - usual) / huge)
    return level, jump


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["healthy", "exponential"])
def test_the_largest_statistics_are_those_of_a_naive_pass(seed: int, how: str) -> None:
    rows = (healthy(seed) if how == "healthy" else growing(seed, how)).rows[:-1]
    analyzer = Analyzer(METRICS)
    for row in rows:
        analyzer.observe(row)
    naive = {key: _naive_peaks(key[0], history) for key, history in _histories(rows).items()}
    assert analyzer.peaks["level"] == pytest.approx(max(level for level, _ in naive.values()))
    jumps = [jump for (metric, _), (_, jump) in naive.items() if TRACKED[metric].jumps]
    assert analyzer.peaks["jump"] == pytest.approx(max(jumps))


def test_a_spread_of_few_readings_is_between_its_metrics_prior_and_itself() -> None:
    prior = np.array([3.0])
    np.testing.assert_array_equal(_with_prior(prior, 1.0, 0), prior)
    halfway = _with_prior(prior, 1.0, int(PRIOR_WEIGHT))
    np.testing.assert_allclose(halfway, np.sqrt((9.0 + 1.0) / 2.0))
    assert 1.0 < _with_prior(prior, 1.0, 10_000)[0] < 1.01
