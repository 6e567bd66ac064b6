"""The detectors' statistics beside naive ones; and from which on a step or a canary counts, and a limit is one."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from stabilitylab.analysis import Analyzer, detectors
from stabilitylab.analysis.detectors import DETECTORS, LEAST
from stabilitylab.analysis.heading import _since
from stabilitylab.analysis.thresholds import NOMINAL, Thresholds, from_json
from stabilitylab.analysis.trends import medians, theil_sen
from stabilitylab.errors import UsageError
from stabilitylab.record.readings import Array
from tests.synthetic_runs import METRICS, row

A, M = "decoder.layers.1.fc1", "model"


def many(seed: int, points: int = 3) -> tuple[Array, Array]:
    """(logs of 60 series over their baselines, their spreads)."""
    rng = np.random.default_rng([8, seed])
    return rng.normal(2.0, 4.0, (60, points)), rng.uniform(0.05, 3.0, 60)


@pytest.mark.parametrize("seed", range(4))
def test_units_are_so_many_spreads_and_at_least_a_factor(seed: int) -> None:
    _, spread = many(seed)
    for unit, spreads, factor in (
        (detectors.far, 8, 100),
        (detectors.huge, 8, 1_000),
        (detectors.near, 3, 3),
    ):
        expected = [max(spreads * each, math.log(factor)) for each in spread]
        np.testing.assert_allclose(unit(spread), expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_level_and_a_fall(seed: int) -> None:
    rise, spread = many(seed)
    unit = detectors.far(spread)
    level, fall = detectors.level(rise, unit), detectors.fall(rise, unit)
    for (a, b, c), one, up, down in zip(rise, unit, level, fall, strict=True):
        climb = min(4 * a, 2 * b, c) / one if a < b < c else -math.inf
        assert up == pytest.approx(max(min(a, b, c) / one, climb))
        assert down == pytest.approx(min(-a, -b, -c) / one)
    assert detectors.fall(rise, np.full(60, np.inf)).tolist() == [0.0] * 60  # where a fall means nothing
    still = np.array([[1.0, 1.0, 5.0]])
    assert detectors.level(still, np.array([4.0])) == pytest.approx(0.25)  # what stands still does not climb


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("points", [8, 12, 30])
def test_a_trend_is_the_least_of_exponent_amount_and_reach(seed: int, points: int) -> None:
    rng = np.random.default_rng([9, seed])
    edits = np.cumsum(rng.integers(1, 3, (20, points)), axis=1).astype(np.float64)
    logs = rng.uniform(0.0, 0.6, (20, 1)) * edits + 0.3 * rng.standard_normal((20, points))
    rise, unit = logs[:, -3:], detectors.near(rng.uniform(0.05, 2.0, 20))
    found, slopes, lowers = detectors.trend(edits, logs, rise, unit)
    for at in range(20):
        line = stats.theilslopes(logs[at], edits[at], alpha=0.9995)
        exponent = line.low_slope * statistics.median(edits[at]) / 2.0
        amount = line.low_slope * (edits[at][-1] - edits[at][0]) / math.log(1.5)
        reach = statistics.median(rise[at]) / unit[at]
        assert found[at] == pytest.approx(min(exponent, amount, reach))
        assert (slopes[at], lowers[at]) == (pytest.approx(line.slope), pytest.approx(line.low_slope))


def test_a_jump_is_over_the_baseline_and_over_what_was_just_before() -> None:
    rise, before, unit = np.array([9.0, 9.0, 9.0]), np.array([-4.0, 0.0, 3.0]), np.array([3.0, 3.0, 3.0])
    assert detectors.jump(rise, before, unit).tolist() == [3.0, 3.0, 2.0]


@pytest.mark.parametrize("points", [1, 2, 3, 4, 7])
def test_medians_of_lines(points: int) -> None:
    values = np.random.default_rng(points).normal(size=(9, points))
    assert medians(values).tolist() == pytest.approx([statistics.median(line) for line in values.tolist()])


def test_slopes_of_series_that_were_read_at_other_edits_each() -> None:
    x = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 5.0, 7.0]])
    slope, lower, upper = theil_sen(x, 2.0 * x, 0.5)
    assert slope.tolist() == lower.tolist() == upper.tolist() == [2.0, 2.0]


def large(ratio: float) -> dict[tuple[str, str], float]:
    """An update of 1, which ends so that the weight's original norm was 1 / ratio."""
    return {("update.norm", A): 1.0, ("drift.norm", A): 2.0, ("drift.ratio", A): 2.0 * ratio}


def said(rule: str, *readings: dict[tuple[str, str], float]) -> list[tuple[int, float, float, int | None]]:
    analyzer = Analyzer(METRICS, NOMINAL)
    for edit, each in enumerate(readings):
        analyzer.observe(row(edit, each))
    findings = [each for each in analyzer.diagnosis().findings if each.rule == rule]
    return [(each.edit, each.value, each.threshold, each.since) for each in findings]


def test_a_step_counts_as_a_share_of_its_weights_original_norm() -> None:
    assert said("large-step", {}, large(1.0)) == [(1, 1.0, 1.0, 1)]
    assert said("large-step", {}, large(0.999)) == []
    assert said("large-step", large(5.0)) == []  # before any edit there is none
    assert said("large-step", {}, large(3.0), large(9.0)) == [(1, 3.0, 1.0, 1)]
    for missing in (("drift.norm", A), ("drift.ratio", A)):
        assert said("large-step", {}, {key: value for key, value in large(5.0).items() if key != missing}) == []
        for bad in (0.0, math.nan, math.inf):
            assert said("large-step", {}, large(5.0) | {missing: bad}) == []


def test_a_canary_is_far_at_one_nat_and_its_answers_at_half_of_them_twice() -> None:
    def kl(value: float) -> dict[tuple[str, str], float]:
        return {("canary.kl", M): value}

    def agree(value: float, nats: float = 0.5) -> dict[tuple[str, str], float]:
        return {("canary.agreement", M): value, ("canary.kl", M): nats}

    assert said("canary-far", {}, kl(1.0)) == [(1, 1.0, 1.0, 1)]
    assert said("canary-far", {}, kl(0.999)) == said("canary-far", kl(5.0)) == []
    assert said("canary-far", {}, agree(0.4), agree(0.5)) == [(2, 0.5, 0.5, 1)]
    assert said("canary-far", {}, agree(0.4), agree(0.501)) == said("canary-far", {}, agree(0.501), agree(0.4)) == []
    assert said("canary-far", {}, agree(0.4, 0.1), agree(0.4, 0.1)) == []  # near ties
    assert said("canary-far", {}, agree(0.4, 0.101), agree(0.4, 0.101)) == [(2, 0.4, 0.5, 1)]


def test_a_step_that_dry_edits_have_made_is_usual_up_to_twice_its_size() -> None:
    def after(dry: float, size: float) -> bool:
        analyzer = Analyzer(METRICS, NOMINAL)
        analyzer.observe(row(0, {}))
        analyzer.observe_dry(row(1, large(dry)))
        analyzer.observe(row(1, large(size)))
        return any(each.rule == "large-step" for each in analyzer.diagnosis().findings)

    assert not after(3.0, 5.99)
    assert after(3.0, 6.0)
    assert after(0.1, 1.0)
    assert not after(0.1, 0.99)


UNIT = Thresholds(dict.fromkeys(DETECTORS, 2.0), 3.0, 1.0, alpha=0.05, runs=19, source="a test")


def test_a_limit_is_its_scale_times_the_score_and_no_less_than_the_least() -> None:
    assert UNIT.limit("level") == 6.0
    assert replace(UNIT, score=0.1).limit("level") == 1.0
    assert str(UNIT) == "limits from 19 healthy runs (a test), at most 5% false alarms on such runs"
    assert UNIT.score_of({"level": 3.0, "jump": 8.0}) == 4.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -0.01},
        {"alpha": 1.01},
        {"runs": -1},
        {"runs": 1.5},
        {"source": "x" * 10_001},
        {"score": 0.0},
        {"score": 1e12},
        {"least": 0.499},
        {"least": 1e12},
        {"scales": dict.fromkeys(DETECTORS, 0.0)},
        {"scales": dict.fromkeys(DETECTORS, 1e12)},
        {"scales": {**dict.fromkeys(DETECTORS, 1.0), "other": 1.0}},
        {"scales": dict.fromkeys(DETECTORS[1:], 1.0)},
        {"score": "1"},
        {"more": 1},
    ],
    ids=str,
)
def test_limits_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^the file"):
        from_json(UNIT.to_json() | wrong, "the file")


@pytest.mark.parametrize(
    "right",
    [
        {"alpha": 0},
        {"alpha": 1},
        {"runs": 0},
        {"source": "x" * 10_000},
        {"score": 1},
        {"least": LEAST},
        {"scales": dict.fromkeys(DETECTORS, 9e11)},
    ],
    ids=lambda right: next(iter(right)),
)
def test_limits_at_the_ends_of_their_range_are_taken(right: dict[str, object]) -> None:
    assert from_json(UNIT.to_json() | right, "the file") == replace(UNIT, **right)  # type: ignore[arg-type]
    assert LEAST == 0.5


@pytest.mark.parametrize(
    ("readings", "since"),
    [
        ([0.0, 0.1, 0.2, 0.27, 0.28, 0.5], 9),  # a tenth of a nat is as near as it gets: up to e times that
        ([0.2, 0.5, 0.54, 0.55, 0.6, 0.7], 8),
        ([0.2, 0.9, 0.3, 0.9, 0.9, 0.9], 8),  # after the last that was near
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], 10),  # all are near one another: the last
    ],
)
def test_a_canary_heads_away_since_it_was_last_near(readings: list[float], since: int) -> None:
    assert _since(np.arange(5.0, 11.0), np.array(readings)) == since
