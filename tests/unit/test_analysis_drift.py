"""Drift: baselines, false alarms and lead on synthetic runs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from stabilitylab.analysis import Diagnosis, severity
from tests.synthetic_runs import METRICS, diagnose, false_alarms, lead, row

A, B = "decoder.layers.1.fc1", "decoder.layers.1.fc2"
WITH_RATIO = (*METRICS, replace(METRICS[0], name="drift.ratio", phase="after"))


def series(values: list[float], metric: str = "update.norm", first: int = 1, gap: int | None = None) -> Diagnosis:
    rows = [row(0, {})]
    rows += [
        row(first + at, {} if gap is not None and at % gap == 0 else {(metric, A): value})
        for at, value in enumerate(values)
    ]
    return diagnose(rows)


def test_healthy_runs_are_seldom_called_diverging() -> None:
    alarms = false_alarms(range(5_000, 5_100))
    assert len(alarms) <= 2, [(seed, diagnosis.says) for seed, diagnosis in alarms]


@pytest.mark.parametrize(("how", "ahead"), [("exponential", 0.7), ("super-exponential", 0.45)])
def test_growth_is_caught_with_most_of_its_way_ahead(how: str, ahead: float) -> None:
    measured = lead(range(5_000, 5_040), how)
    assert measured.recall == 1.0
    assert measured.ahead >= ahead
    assert measured.early <= 0.05
    assert abs(measured.onset_error) <= 0.3


def noisy(edits: int, spread: float = 0.1) -> np.ndarray:
    return np.exp(spread * np.random.default_rng(3).normal(size=edits))


def test_spikes_that_recover_are_no_divergence() -> None:
    values = noisy(80)
    values[[20, 40, 41, 60]] *= 1e5
    assert series(values.tolist(), "activation.rms").verdict == "stable"


@pytest.mark.parametrize(
    ("beginning", "later", "verdict"),
    [
        ({}, {"drift.norm": 1.0, "drift.ratio": 0.5}, "drifting"),
        ({}, {"drift.norm": 1.0}, "stable"),  # no share of its original norm, which is zero
        ({"weight.max_abs": 0.0}, {"drift.norm": 1.0}, "stable"),
        ({"weight.max_abs": 0.1}, {"drift.norm": 1.0, "drift.ratio": 0.5}, "drifting"),
        ({}, {}, "drifting"),  # nothing is known of its beginning
    ],
)
@pytest.mark.parametrize("metric", ["weight.max_abs", "activation.rms"])
def test_what_grows_from_a_weight_of_zeros_has_no_usual_size(
    metric: str, beginning: dict[str, float], later: dict[str, float], verdict: str
) -> None:
    sizes = [*np.linspace(1.0, 1.2, 10), *np.linspace(1.2, 6.0, 30)]
    rows = [row(0, {(name, A): value for name, value in beginning.items()})]
    for edit, size in enumerate(sizes, start=1):
        rows.append(row(edit, {(name, A): value for name, value in later.items()} | {(metric, A): size}))
    found = severity(diagnose(rows, WITH_RATIO).verdict)
    assert (found >= severity("drifting")) == (verdict == "drifting")


def rated(updates: np.ndarray, rates: np.ndarray) -> Diagnosis:
    """A layer whose updates an optimizer makes, at these learning rates."""
    sizes = zip(updates.tolist(), rates.tolist(), strict=True)
    rows = [
        row(edit, {("update.norm", A): update, ("gradient.learning_rate", A): rate})
        for edit, (update, rate) in enumerate(sizes, start=1)
    ]
    return diagnose([row(0, {}), *rows])


def test_updates_that_grow_with_the_learning_rate_are_a_warm_up() -> None:
    rates = 1e-5 * np.minimum(np.arange(1, 61) / 40, 1.0)
    updates = rates * noisy(60)
    assert series(updates.tolist()).verdict != "stable"  # where no rate is known
    assert rated(updates, rates).verdict == "stable"
    assert rated(updates, rates * (rates > rates[30])).verdict != "stable"  # or only later on
    decaying = rates[::-1].copy()
    assert rated(decaying * noisy(60), decaying).verdict == "stable"


def test_updates_that_outgrow_their_learning_rate_are_none() -> None:
    rates = 1e-5 * np.geomspace(1.0, 20.0, 40)
    found = rated(rates * noisy(40) * np.geomspace(1.0, 1e4, 40), rates)
    assert found.verdict == "diverging"
    assert "at this learning rate" in found.findings[0].says
    finding = next(each for each in found.findings if each.metric == "update.norm")
    at = finding.edit - 1
    assert finding.value == pytest.approx(float(rates[at] * noisy(40)[at] * np.geomspace(1.0, 1e4, 40)[at]), rel=1e-3)


def test_one_huge_update_is_a_jump_at_once_and_a_large_one_is_not() -> None:
    values = noisy(40)
    values[20] *= 1e5
    diagnosis = series(values.tolist())
    assert (diagnosis.verdict, diagnosis.onset_edit, diagnosis.alarm_edit) == ("diverging", 21, 21)
    assert "jumped at edit 21" in diagnosis.says
    values[20] /= 1e3
    assert series(values.tolist()).verdict == "stable"


def test_a_jump_is_measured_against_what_is_usual_by_now() -> None:
    values = noisy(60, 0.02) * np.geomspace(1.0, 50.0, 60)
    values[40] *= 200
    assert not [finding for finding in series(values.tolist()).findings if finding.rule == "jump"]


def test_one_huge_step_that_stays_is_diverging() -> None:
    values = noisy(40)
    values[20:] *= 1e4
    diagnosis = series(values.tolist(), "activation.rms")
    assert (diagnosis.verdict, diagnosis.onset_edit, diagnosis.alarm_edit) == ("diverging", 21, 23)
    assert (diagnosis.first_bad_edit, diagnosis.first_bad_site) == (23, A)  # no hard fact: the alarm is named


def test_a_small_step_that_stays_is_drifting() -> None:
    values = noisy(40)
    values[20:] *= 10
    diagnosis = series(values.tolist())
    assert (diagnosis.verdict, diagnosis.onset_edit, diagnosis.alarm_edit) == ("drifting", 21, None)
    assert diagnosis.says.startswith("Drifting since edit 21")


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_adding_up_is_not_acceleration(power: float) -> None:
    time = np.arange(1, 300)
    values = noisy(299, 0.03) * (1 + 0.1 * time) ** power
    assert severity(series(values.tolist(), "activation.rms").verdict) <= severity("drifting")


def test_growth_that_begins_at_the_first_edit_is_seen() -> None:
    diagnosis = series([math.exp(0.5 * edit) for edit in range(14)])
    assert diagnosis.verdict == "diverging"
    assert diagnosis.alarm_edit is not None
    assert diagnosis.alarm_edit <= 10


def test_a_series_that_begins_late_or_has_gaps_has_its_own_baseline() -> None:
    values = noisy(60)
    values[40:] *= 1e4
    assert series(values.tolist(), first=100).onset_edit == 140
    assert series(values.tolist(), gap=3).verdict == "diverging"


def test_drift_norm_grows_in_any_healthy_run() -> None:
    assert series(np.cumsum(noisy(200)).tolist(), "drift.norm").verdict == "stable"


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "stable"), (1e-3, "diverging")])
def test_logits_that_draw_together(factor: float, verdict: str) -> None:
    rows = [
        row(edit, {("logits.min", "model"): 3.0 - 2 * scale, ("logits.max", "model"): 3.0 + 2 * scale})
        for edit, scale in enumerate([1.0] * 20 + [factor] * 10)
    ]
    diagnosis = diagnose(rows)
    assert diagnosis.verdict == verdict
    if verdict != "stable":
        assert "range of logits" in diagnosis.findings[0].says


def test_a_gradient_that_is_small_because_the_edit_was_right_is_fine_and_one_that_vanished_is_not() -> None:
    values = noisy(40)
    values[20:] *= 1e-3
    assert series(values.tolist(), "gradient.norm").verdict == "stable"
    values[20:] = 0.0
    diagnosis = series(values.tolist(), "gradient.norm")
    assert (diagnosis.verdict, diagnosis.findings[0].rule, diagnosis.findings[0].value) == ("drifting", "shrink", 0.0)


def test_failed_edits_do_not_make_the_baseline() -> None:
    rows = [row(edit, {("update.norm", A): 1e6}, "failed") for edit in range(1, 8)]
    rows += [row(edit, {("update.norm", A): 1.0}) for edit in range(8, 14)]
    assert "baseline to compare with exists" in diagnose(rows).says
    rows += [row(edit, {("update.norm", A): 1.0}) for edit in range(14, 20)]
    assert diagnose(rows).says.startswith("Stable over 19 edits. Worth knowing: Edits 1 to 3 had no effect: each")


def test_values_at_the_ends_of_float64_raise_nothing() -> None:
    extremes = [1e-308, 1e308, 0.0, math.inf, -1.0, math.nan, 5e-324] * 8
    assert series([1.0] * 9 + extremes).verdict == "non-finite"
    assert series([1e-308] * 9 + [1e308] * 30).verdict == "diverging"


def test_many_growing_sites_make_few_findings() -> None:
    rows = [
        row(edit, {("update.norm", f"layer.{site}"): math.exp(0.3 * edit) for site in range(60)}) for edit in range(40)
    ]
    diagnosis = diagnose(rows)
    assert len(diagnosis.findings) <= 6
    assert any("57 more sites" in finding.says for finding in diagnosis.findings)


@pytest.mark.parametrize("metric", ["weight.max_abs", "activation.rms"])
@pytest.mark.parametrize(("start", "verdict"), [(0.0, "stable"), (1e-4, "diverging")])
def test_a_weight_that_begins_at_zero_has_no_size_to_grow_from(start: float, verdict: str, metric: str) -> None:
    sizes = [1e-4 * (edit if edit <= 8 else 8 * 1.2 ** (edit - 8)) for edit in range(1, 40)]
    rows = [row(0, {("weight.max_abs", A): start})]
    rows += [row(edit, {(metric, A): size}) for edit, size in enumerate(sizes, start=1)]
    assert diagnose(rows).verdict == verdict


def test_a_loop_that_steps_at_each_fifth_edit_has_no_updates_that_shrink() -> None:
    assert series([0.01 * (1 + 0.1 * (at % 3)) if at % 5 == 0 else 0.0 for at in range(120)]).verdict == "stable"


@pytest.mark.parametrize(("ratio", "verdict"), [(1e-8, "stable"), (1e-5, "diverging")])
def test_what_rounding_leaves_of_an_undone_edit_does_not_grow(ratio: float, verdict: str) -> None:
    sizes = [1e-8 * 1.3 ** max(0, edit - 10) for edit in range(1, 41)]
    rows = [row(0, {})]
    rows += [
        row(edit, {("update.norm", A): size, ("update.ratio", A): ratio}) for edit, size in enumerate(sizes, start=1)
    ]
    assert diagnose(rows).verdict == verdict
