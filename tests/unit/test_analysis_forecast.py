"""Forecasts say when a limit is reached, hold as often as they claim, and are silent where nothing can be told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stabilitylab.analysis import Analyzer, Forecast
from stabilitylab.analysis.forecast import LEAST, WINDOW, Crossing, crossing
from stabilitylab.record.readings import Array, EditRow, Key
from stabilitylab.record.run import load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports.console import closing_table
from tests.synthetic_runs import METRICS, diagnose, row

WEIGHT = ("weight.headroom_bits", "decoder.layers.1.fc1")


def run_of(
    path: Callable[[int], float], edits: int, key: Key = WEIGHT, noise: float = 0.1, seed: int = 0
) -> list[EditRow]:
    rng = np.random.default_rng(seed)
    return [row(edit, {key: path(edit) + noise * rng.standard_normal()}) for edit in range(edits + 1)]


def forecast(rows: list[EditRow]) -> Forecast:
    said = diagnose(rows).forecast
    assert said is not None
    return said


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ("weight.headroom_bits", "weight-overflow"),
        ("activation.headroom_bits", "activation-overflow"),
        ("activation.norm_headroom_bits", "norm-overflow"),
    ],
)
def test_a_steady_fall_is_forecast(metric: str, limit: str) -> None:
    said = forecast(run_of(lambda edit: 15.0 - 0.25 * edit, 40, (metric, "fc1")))
    assert (said.limit, said.metric, said.site, said.made_at, said.shape) == (limit, metric, "fc1", 40, "exponential")
    assert said.low is not None
    assert said.edits_left is not None
    assert said.high is not None
    assert said.low <= 20 <= said.high
    assert said.edits_left == pytest.approx(20, rel=0.2)
    assert f"{said.edits_left} edits ({said.low} to {said.high})" in said.says
    assert "fc1" in said.says
    assert said.why is None


def test_a_bent_fall_is_forecast_by_its_bend() -> None:
    said = forecast(run_of(lambda edit: 15.0 - 12.0 * (edit / 50) ** 3, 50))
    end = 50 * (15 / 12) ** (1 / 3) - 50
    assert said.shape == "accelerating"
    assert said.low is not None
    assert said.high is not None
    assert said.low <= end <= said.high
    # A line through the last readings would have it no later, one through all far later: 15 bits at 0.24 a step.
    assert said.high < 15


def test_the_canary_is_forecast_by_the_limit_of_the_facts() -> None:
    key = ("canary.kl", "model")
    said = forecast([row(edit, {key: 0.001 * 1.2**edit}) for edit in range(42)])
    first = next(edit for edit in range(100) if 0.001 * 1.2**edit >= np.log(100.0))
    assert (said.limit, said.site) == ("canary-lost", "model")
    assert said.edits_left == pytest.approx(first - 41, abs=2)
    lost = forecast([row(edit, {("canary.agreement", "model"): 0.97**edit}) for edit in range(50)])
    assert (lost.limit, lost.metric) == ("canary-lost", "canary.agreement")


@pytest.mark.parametrize(
    "path",
    [
        lambda edit: 14.0,
        lambda edit: 14.0 if edit < 30 else 9.0,
        lambda edit: 14.0 - np.log2(1 + edit),
        lambda edit: 14.0 - 0.5 * np.log2(1 + edit),
        lambda edit: 9.0 + 0.1 * edit,
    ],
    ids=["flat", "jump", "adds up as t", "adds up as root t", "recovers"],
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_it_abstains_with_a_reason(path: Callable[[int], float], seed: int, noise: float) -> None:
    said = forecast(run_of(path, 60, noise=noise, seed=seed))
    assert (said.edits_left, said.low, said.high, said.shape) == (None, None, None, None)
    assert said.why
    assert said.says == said.why


def test_too_few_readings_and_none_at_all() -> None:
    early = forecast(run_of(lambda edit: 14.0 - edit, LEAST - 1))
    assert early.edits_left is None
    assert str(LEAST - 1) in str(early.why)
    nothing = forecast([row(1, {("update.norm", "a"): 1.0})])
    assert nothing.edits_left is None
    assert "no headroom" in str(nothing.why)


def test_a_wide_interval_is_not_said_but_named() -> None:
    said = forecast(run_of(lambda edit: 16.0 - 0.2 * edit, 20, noise=0.4))
    assert said.edits_left is None
    assert (said.metric, said.site) == WEIGHT
    assert WEIGHT[1] in str(said.why)
    assert said.says.startswith(f"No forecast: weight.headroom_bits at {WEIGHT[1]} moves steadily, but ")
    assert "overflow" not in said.says  # what is not forecast is not said


def test_the_nearest_limit_is_named() -> None:
    near, far = ("activation.headroom_bits", "near"), ("weight.headroom_bits", "far")
    rng = np.random.default_rng(0)
    rows = [
        row(edit, {far: 17.0 - 0.1 * edit + wobble, near: 14.0 - 0.3 * edit + wobble})
        for edit, wobble in enumerate(0.1 * rng.standard_normal(35))
    ]
    assert forecast(rows).site == "near"


def test_a_limit_that_is_reached_is_not_forecast() -> None:
    said = forecast([row(edit, {("canary.agreement", "model"): max(1.0 - edit / 20, 0.0)}) for edit in range(20)])
    assert said.edits_left is None
    assert said.limit == "canary-lost"
    assert "reached" in str(said.why)


def test_the_console_page_shows_it(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {}, METRICS)
    rows = run_of(lambda edit: 15.0 - 0.25 * edit, 40)
    for each in rows:
        writer.append(each)
    writer.close()
    run, out = load(tmp_path / "run"), io.StringIO()
    assert run.diagnosis().forecast == forecast(rows)
    Console(file=out, width=250).print(closing_table(run, run.diagnosis()))
    assert f"forecast             {forecast(rows).says}" in out.getvalue()


def test_none_once_the_run_is_lost() -> None:
    rows = run_of(lambda edit: 15.0 - 0.25 * edit, 40)
    bad = row(41, {WEIGHT: -np.inf, ("weight.nonfinite", WEIGHT[1]): 4.0})
    assert diagnose(rows).forecast is not None
    assert diagnose([*rows, bad]).forecast is None
    assert diagnose([*rows, bad]).to_json()["forecast"] is None


def test_a_series_that_is_no_longer_read_is_dropped() -> None:
    rows = run_of(lambda edit: 15.0 - 0.25 * edit, 40)
    rest = [row(edit, {("update.norm", "a"): 1.0}) for edit in range(41, 60)]
    left = forecast(rows).edits_left
    later = forecast([*rows, *rest[:5]]).edits_left
    assert left is not None
    assert later is not None
    assert later == pytest.approx(left - 5, abs=1)
    assert forecast([*rows, *rest]).edits_left is None


def test_failed_edits_and_gaps_are_passed_over() -> None:
    rows = run_of(lambda edit: 15.0 - 0.25 * edit, 40)
    broken = [row(each.edit, {WEIGHT: 3.0}, "failed") if each.edit % 9 == 4 else each for each in rows]
    said = forecast(broken)
    assert said.edits_left == pytest.approx(20, rel=0.2)


def test_only_the_last_readings_count() -> None:
    late = [row(each.edit + 300, dict_of(each)) for each in run_of(lambda edit: 15.0 - 0.25 * edit, WINDOW)]
    before = run_of(lambda edit: 15.0, 299, noise=0.1)
    after_long = Analyzer(())
    for each in [*before, *late]:
        after_long.observe(each)
    said = after_long.diagnosis().forecast
    assert said is not None
    assert said.edits_left == pytest.approx(60 - WINDOW, rel=0.3)


def dict_of(each: EditRow) -> dict[Key, float]:
    return {key: float(values[0]) for key, values in each.readings.items()}


def test_it_is_plain_json() -> None:
    plain = diagnose(run_of(lambda edit: 15.0 - 0.25 * edit, 40)).to_json()["forecast"]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["limit"] == "weight-overflow"


def noisy_fall(seed: int) -> tuple[Array, Array, int]:
    """(edits, path up to now, edits left) of exponential growth with scatter or with random steps that stay."""
    rng = np.random.default_rng([7, seed])
    pace, length = rng.uniform(0.15, 0.6), 300
    steps = rng.gamma(2.0, pace / 2.0, length) if seed % 2 else np.full(length, pace)
    path = 15.0 - np.cumsum(steps) + rng.uniform(0.1, 0.5) * rng.standard_normal(length) * (seed % 2 == 0)
    end = int(np.flatnonzero(path <= 0)[0])
    now = int(0.6 * end)
    first = max(now - WINDOW, 0)
    return np.arange(first + 1.0, now + 1.0), path[first:now], end + 1 - now


def test_intervals_hold_and_medians_are_near() -> None:
    held, errors = [], []
    for seed in range(150):
        edits, path, left = noisy_fall(seed)
        found = crossing(edits, path)
        if isinstance(found, Crossing) and found.tells:
            held.append(np.floor(found.low) <= left <= np.ceil(found.high))
            errors.append(abs(found.middle - left) / left)
    assert len(held) > 75
    assert np.mean(held) >= 0.85
    assert np.median(errors) <= 0.2
