"""Calibrated limits: the rank, the floor, the file, and that an analyzer heeds them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.analysis import Analyzer, Diagnosis, detectors, thresholds
from stabilitylab.analysis.detectors import DETECTORS, LEAST
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.errors import UsageError
from stabilitylab.record.readings import Array, EditRow
from tests.synthetic_runs import METRICS, healthy, row

A = "decoder.layers.1.fc1"
UNIT = Thresholds(dict.fromkeys(DETECTORS, 1.0), 1.0, LEAST, alpha=0.05, runs=19, source="a test")


@pytest.mark.parametrize(("runs", "alpha", "place"), [(19, 0.05, 19), (99, 0.01, 99), (100, 0.05, 96), (49, 0.02, 49)])
def test_the_rank_is_that_of_split_conformal(runs: int, alpha: float, place: int) -> None:
    assert thresholds.rank(runs, alpha) == place
    assert thresholds.conformal([float(score) for score in range(runs, 0, -1)], alpha) == place


def test_too_few_runs_are_refused_with_how_many_are_needed() -> None:
    with pytest.raises(UsageError, match=r"18 healthy runs can't bound false alarms at 0\.05; expected at least 19"):
        thresholds.rank(18, 0.05)


def test_a_further_exchangeable_run_exceeds_the_limit_with_probability_alpha_at_most() -> None:
    draw = np.random.default_rng(0)
    runs, alpha = 60, 0.1
    scores = draw.lognormal(size=(4000, runs + 1))
    exceeded = [
        last > thresholds.conformal(known.tolist(), alpha) for *_, known, last in ((s[:-1], s[-1]) for s in scores)
    ]
    assert np.mean(exceeded) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 4000)
    assert np.mean(exceeded) >= alpha / 2  # it is not merely never exceeded


def test_no_limit_is_below_the_least_however_quiet_the_runs_were() -> None:
    quiet = replace(UNIT, score=1e-3)
    assert {quiet.limit(detector) for detector in DETECTORS} == {LEAST}


def test_the_score_of_a_run_is_its_largest_standardised_statistic() -> None:
    scaled = replace(UNIT, scales={**UNIT.scales, "jump": 0.1})
    assert scaled.score_of({"level": 0.5, "jump": 0.2}) == pytest.approx(2.0)
    assert scaled.score_of({}) == 0.0


def test_a_file_keeps_them_and_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(UNIT.to_json()))
    assert thresholds.read(path) == UNIT
    for wrong in ("{", "[]", json.dumps({**UNIT.to_json(), "scales": {"level": 1.0}}), "{}"):
        path.write_text(wrong)
        with pytest.raises(UsageError, match=r"thresholds\.json"):
            thresholds.read(path)
    path.write_text(json.dumps({**UNIT.to_json(), "score": -1.0}))
    with pytest.raises(UsageError, match="a score above 0"):
        thresholds.read(path)


def test_the_shipped_ones_have_enough_runs_behind_them() -> None:
    shipped = thresholds.shipped()
    assert thresholds.rank(shipped.runs, shipped.alpha) <= shipped.runs
    assert str(shipped.runs) in str(shipped)


def said(rows: list[EditRow], limits: Thresholds) -> str:
    analyzer = Analyzer(METRICS, limits)
    for each in rows:
        analyzer.observe(each)
    return analyzer.diagnosis().verdict


def test_higher_limits_silence_an_alarm_and_lower_ones_raise_it() -> None:
    rows = [row(edit, {("activation.rms", A): 1.0 if edit < 20 else 300.0}) for edit in range(30)]
    assert said(rows, replace(UNIT, score=100.0)) in {"stable", "drifting"}
    assert said(rows, UNIT) == "diverging"


def test_a_run_below_its_own_score_is_quiet_and_at_it_is_not() -> None:
    analyzer = Analyzer(METRICS, UNIT)
    rows = healthy(7).rows
    for each in rows:
        analyzer.observe(each)
    score = UNIT.score_of(analyzer.peaks)
    assert score > LEAST
    assert said(rows, replace(UNIT, score=score * 1.001)) != "diverging"
    assert said(rows, replace(UNIT, score=score * 0.999)) == "diverging"


def test_a_step_as_large_as_the_weight_is_diverging_at_the_first_edit() -> None:
    def first(update: float) -> list[EditRow]:
        readings = {("update.norm", A): update, ("drift.norm", A): update, ("drift.ratio", A): update / 4.0}
        return [row(0, {}), row(1, readings)]

    assert said(first(3.9), UNIT) == "stable"
    assert said(first(4.1), UNIT) == "diverging"


def test_a_canary_that_is_far_once_is_enough_but_its_answers_must_be_gone_twice() -> None:
    def rows(metric: str, *values: float) -> list[EditRow]:
        return [row(edit, {(metric, "model"): value}) for edit, value in enumerate(values)]

    assert said(rows("canary.kl", 0.0, 0.1, 3.0, 0.1), UNIT) == "diverging"
    assert said(rows("canary.kl", 0.0, 0.1, 0.9, 0.9), UNIT) == "stable"
    assert said(rows("canary.agreement", 1.0, 0.9, 0.4, 0.9, 0.4), UNIT) == "stable"
    assert said(rows("canary.agreement", 1.0, 0.9, 0.4, 0.4), UNIT) == "diverging"


def heading(*kl: float, restored: bool = False, compared: bool = True) -> Diagnosis:
    """Of a run with these divergences from edit 0 on; the weights move by 1 per edit."""
    analyzer = Analyzer(METRICS, UNIT)
    for edit, value in enumerate(kl):
        weights = {("update.norm", A): 1.0, ("drift.norm", A): 1.0 if restored else float(edit)} if compared else {}
        analyzer.observe(
            row(edit, {**(weights if edit else dict.fromkeys(weights, 0.0)), ("canary.kl", "model"): value})
        )
    return analyzer.diagnosis()


def test_a_canary_that_is_past_its_limit_is_no_forecast() -> None:
    found = next(each for each in heading(0.0, 3.0, 3.2, 3.5).findings if each.rule == "canary-heading")
    assert found.forecast is None
    assert found.value > found.threshold
    assert "forecast" not in found.says


def test_a_canary_that_heads_for_loss_raises_the_alarm_while_it_is_near() -> None:
    doubling = (0.0, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
    found = heading(*doubling)
    assert (found.verdict, found.alarm_edit) == ("diverging", 6)
    finding = next(each for each in found.findings if each.rule == "canary-heading")
    assert finding.value == 0.56
    assert 1 <= finding.start <= 5
    assert heading(*doubling, restored=True).verdict == "stable"  # each began anew: it heads nowhere
    assert heading(*doubling, compared=False).verdict == "stable"  # nobody can tell
    assert heading(0.0, *[0.3] * 9).verdict == "stable"  # it has arrived, and stays
    assert heading(0.0, 1e-9, 1e-7, 1e-5, 1e-3, 2e-3).verdict == "stable"  # growth out of rounding error
    assert heading(0.0, 0.1, 0.02, 0.3, 0.01, 0.5, 0.02, 0.3).verdict == "stable"


@given(hnp.arrays(np.float64, st.integers(3, 6), elements=st.floats(0.0, 50.0)), st.integers(1, 5))
def test_where_a_canary_heads_is_that_of_a_naive_pass(kl: Array, every: int) -> None:
    edits = np.arange(kl.size, dtype=np.float64) * every
    logs = [math.log(max(float(value), 0.1)) for value in kl]
    pairs = [(one, other) for one in range(kl.size) for other in range(one + 1, kl.size)]
    growths = sorted((logs[b] - logs[a]) / (edits[b] - edits[a]) for a, b in pairs)
    place = 0.2 * (len(growths) - 1)
    low, part = int(place), place - int(place)
    growth = growths[low] + part * (growths[min(low + 1, len(growths) - 1)] - growths[low])
    ahead = math.exp(min(min(logs[-2:]) + max(growth, 0.0) * (edits[-1] - edits[0]), 300.0))
    assert detectors.heading(edits, kl) == pytest.approx(ahead, rel=1e-6)
    assert detectors.heading(edits[:2], kl[:2]) == 0.0


def test_dry_edits_are_a_baseline_from_the_first_edit_on() -> None:
    def diagnosis(dry: int) -> Diagnosis:
        analyzer = Analyzer(METRICS, UNIT)
        analyzer.observe(row(0, {}))
        for edit in range(1, dry + 1):
            analyzer.observe_dry(row(edit, {("activation.rms", A): 1.0 + 0.01 * edit}))
        for edit in range(1, 5):
            analyzer.observe(row(edit, {("activation.rms", A): 1e4}))
        return analyzer.diagnosis()

    calibrated, plain = diagnosis(12), diagnosis(0)
    assert (calibrated.verdict, calibrated.alarm_edit, calibrated.onset_edit) == ("diverging", 3, 1)
    assert calibrated.baseline == "12 dry edits"
    assert (plain.verdict, plain.baseline) == ("stable", "none yet")


def test_a_dry_edit_after_an_edit_is_refused() -> None:
    analyzer = Analyzer(METRICS)
    analyzer.observe(row(1, {}))
    with pytest.raises(ValueError, match="before the first edit"):
        analyzer.observe_dry(row(1, {}))
