"""The detection benchmark's scoring, on runs made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy.stats import binomtest

import benchmarks.detection.scores as scoring
from benchmarks.detection.judged import Asked, Judged


def failing(**changes: Any) -> Judged:
    """Grows from edit 11 to its loss at 31, is alarmed at 16 at the right site and for the right cause."""
    usual: dict[str, Any] = {
        "scenario": "grows",
        "seed": 1,
        "course": "exponential",
        "known": True,
        "cause": "norm-growth",
        "onset": 11,
        "lost": 31,
        "nonfinite": None,
        "sites": ("layers.1.fc2",),
        "edits": 37,
        "alarm": 16,
        "verdict": "collapsed",
        "said_cause": "norm-growth",
        "confidence": "medium",
        "said_sites": ("layers.1.fc2",),
    }
    return Judged(**{**usual, **changes})


def healthy(**changes: Any) -> Judged:
    """Nothing is wrong and nothing is said."""
    quiet: dict[str, Any] = {
        "scenario": "sound",
        "course": "static",
        "cause": None,
        "onset": None,
        "lost": None,
        "sites": (),
        "edits": 120,
        "alarm": None,
        "verdict": "stable",
        "said_cause": "unknown",
        "confidence": "none",
        "said_sites": (None,),
    }
    return failing(**{**quiet, **changes})


STATIC = failing(scenario="still", course="static", lost=None, alarm=None, verdict="drifting")
SILENT = failing(alarm=None, verdict="stable", said_cause="unknown", said_sites=(None,))


def test_an_alarm_between_onset_and_loss_is_in_time_and_its_lead_is_what_was_left() -> None:
    run = failing()
    assert run.in_time
    assert run.detected
    assert not run.early
    assert run.lead(run.lost) == 0.75


def test_an_alarm_at_the_loss_is_in_time_with_nothing_left() -> None:
    run = failing(alarm=31)
    assert run.in_time
    assert run.lead(run.lost) == 0.0


def test_an_alarm_after_the_loss_is_late() -> None:
    run = failing(alarm=32)
    assert not run.in_time
    assert not run.detected
    assert run.lead(run.lost) == 0.0
    found = scoring.figures([run])
    assert found["recall"].value == 0.0
    assert found["recall_ever"].value == 1.0


def test_an_alarm_before_the_onset_is_a_false_one_and_no_detection() -> None:
    run = failing(alarm=10)
    assert run.early
    assert not run.in_time
    assert not run.detected
    assert run.lead(run.lost) == 0.0
    found = scoring.figures([run, failing()])
    assert found["early_alarms"].value == 0.5
    assert found["recall"].value == found["recall_ever"].value == 0.5
    assert found["site_top1"].runs == 1  # a place is asked of detected runs only


def test_where_no_sound_edit_comes_before_the_onset_an_alarm_at_edit_0_is_in_time() -> None:
    run = failing(onset=1, alarm=0)
    assert run.in_time
    assert not run.early
    assert run.lead(run.lost) == 1.0
    assert scoring.figures([run])["early_alarms"].runs == 0


def test_no_alarm_is_a_miss_that_counts_in_recall_and_lead() -> None:
    found = scoring.figures([failing(), SILENT])
    assert found["recall"].value == 0.5
    assert found["lead_share"].value == found["lead_share_exponential"].value == 0.375
    assert scoring.counts([SILENT])["lost"] == 1


def test_the_lead_on_the_first_non_finite_value_is_a_figure_of_its_own() -> None:
    run = failing(alarm=36, nonfinite=51)
    found = scoring.figures([run])
    assert found["lead_share"].value == 0.0
    assert found["lead_share_nonfinite"].value == 0.375


def test_jumps_and_runs_lost_at_their_onset_do_not_enter_the_lead() -> None:
    at_once = failing(onset=31)
    jump = failing(course="jump", alarm=31)
    found = scoring.figures([failing(), at_once, jump])
    assert (found["lead_share"].value, found["lead_share"].runs) == (0.75, 1)
    assert (found["lead_share_jump"].value, found["lead_share_jump"].runs) == (0.0, 1)
    assert scoring.counts([failing(), at_once, jump])["lost_at_onset"] == 1


@pytest.mark.parametrize(
    ("changes", "detected"),
    [
        ({}, True),
        ({"verdict": "stable"}, True),  # a cause is named
        ({"said_cause": "unknown"}, True),  # it drifts
        ({"verdict": "stable", "said_cause": "unknown"}, False),
        ({"alarm": 5}, False),  # before the onset
    ],
)
def test_a_run_that_is_never_lost_is_detected_when_trouble_is_named(changes: dict[str, Any], detected: bool) -> None:
    run = failing(**{**{"course": "static", "lost": None, "alarm": None, "verdict": "drifting"}, **changes})
    assert run.detected is detected
    found = scoring.figures([run])
    assert found["static_detected"].value == float(detected)
    assert found["recall"].runs == 0
    assert found["recall"].value is None


def test_healthy_runs_give_the_false_alarms_and_the_false_causes() -> None:
    runs = [
        healthy(),
        healthy(verdict="drifting"),
        healthy(alarm=7, verdict="diverging", said_cause="norm-growth"),
        healthy(),
    ]
    found = scoring.figures(runs)
    assert found["false_alarm_rate"].value == found["healthy_cause_rate"].value == 0.25
    assert found["healthy_trouble_rate"].value == 0.5


def test_a_healthy_loop_that_lost_its_model_and_a_mechanism_that_never_struck_are_left_out_and_counted() -> None:
    runs = [healthy(), healthy(lost=50, alarm=40), failing(), failing(onset=None, lost=None, alarm=3)]
    found, counts = scoring.figures(runs), scoring.counts(runs)
    assert (found["false_alarm_rate"].value, found["false_alarm_rate"].runs) == (0.0, 1)
    assert found["cause_accuracy"].runs == found["recall"].runs == 1
    assert (counts["healthy_but_lost"], counts["never_struck"]) == (1, 1)


def test_a_site_is_right_by_any_of_its_names_and_by_a_part_of_one() -> None:
    run = failing(sites=("layers.1.fc2", "editor.transforms.4x4"), said_sites=("editor.transforms.4x4.u",))
    assert run.names_site(1)
    assert not failing(said_sites=("layers.1.fc",)).names_site(1)
    assert not failing(said_sites=("layers.1.fc22",)).names_site(1)


def test_the_third_site_counts_for_top_3_only_and_none_is_wrong() -> None:
    third = failing(said_sites=(None, "layers.0.fc1", "layers.1.fc2"))
    found = scoring.figures([third, failing(said_sites=(None,)), failing(sites=())])
    assert (found["site_top1"].value, found["site_top1"].runs) == (0.0, 2)
    assert found["site_top3"].value == 0.5


def test_f1_is_of_causes_not_of_runs_and_unknown_is_a_miss() -> None:
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("b", "unknown")]
    rows = scoring.by_cause(pairs)
    assert rows["a"] == {"runs": 3.0, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert rows["b"]["f1"] == 0.0
    assert rows["b"]["precision"] == 0.0
    assert scoring.macro_f1(pairs) == pytest.approx(0.4)
    assert math.isnan(scoring.by_cause([("a", "b")])["a"]["precision"])


def test_of_an_unknown_mechanism_unknown_is_right_and_it_stays_out_of_f1() -> None:
    strange = failing(scenario="strange", known=False, cause="bit-flip", said_cause="unknown")
    wrong = failing(scenario="strange", known=False, cause="bit-flip")
    runs = [failing(), strange, wrong]
    found = scoring.figures(runs)
    assert found["unknown_abstains"].value == 0.5
    assert found["cause_macro_f1"].value == 1.0
    assert scoring.confusions(runs) == [("strange", "bit-flip", "norm-growth", 1)]
    assert scoring.by_scenario(runs)[1]["cause_right"] == 1


def test_a_forecast_is_compared_with_the_edits_that_were_left() -> None:
    asked = Asked(edit=20, after=17, true=10, middle=12, low=8, high=20)
    assert asked.error == pytest.approx(0.2)
    assert asked.covered is True
    assert Asked(20, 17, 10, 12, 11, 20).covered is False
    assert Asked(20, 17, 10).error is None


def test_a_limit_that_was_never_reached_is_held_against_a_forecast_only_once_its_interval_is_over() -> None:
    assert Asked(20, 17, None, 12, 8, 17).covered is False
    assert Asked(20, 17, None, 12, 8, 18).covered is None
    assert Asked(20, 17, None, 12, 8, 17).error is None


def test_forecasts_are_scored_by_course_and_a_silent_one_counts_only_as_asked() -> None:
    said, silent = Asked(20, 17, 10, 12, 8, 20), Asked(25, 12, 5)
    runs = [
        failing(asked=(said, silent)),
        failing(course="super-exponential", asked=(Asked(20, 17, 10, 20, 15, 25),)),
        healthy(asked=(Asked(60, 60, None, 9, 5, 12),)),
        healthy(asked=(Asked(60, 60, None),)),
    ]
    found = scoring.figures(runs)
    assert found["forecast_error"].value == pytest.approx(0.2)
    assert found["forecast_error_all"].value == pytest.approx(0.6)
    assert found["forecast_coverage"].value == 0.5
    assert found["forecast_spoke"].value == pytest.approx(2 / 3)
    assert found["healthy_forecast_rate"].value == 0.5


def test_shares_have_wilsons_interval_and_means_one_from_samples_of_runs() -> None:
    found = scoring.share([True] * 19 + [False])
    exact = binomtest(19, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == (exact.low, exact.high)
    mean = scoring.resampled([0.0, 1.0] * 10, lambda some: sum(some) / len(some))
    assert mean.value == 0.5
    assert mean.low is not None
    assert mean.high is not None
    assert 0.2 < mean.low < 0.5 < mean.high < 0.8
    assert mean == scoring.resampled([0.0, 1.0] * 10, lambda some: sum(some) / len(some))
    assert scoring.resampled([0.7], lambda some: some[0]) == scoring.Figure(0.7, None, None, 1)
    assert scoring.share([]) == scoring.Figure(None, None, None, 0)


def test_a_scenarios_row_counts_its_runs() -> None:
    rows = scoring.by_scenario([failing(), SILENT, failing(alarm=10), STATIC, healthy(alarm=3)])
    grows, still, sound = rows
    assert (grows["counted"], grows["lost"], grows["in_time"], grows["early"]) == (3, 3, 1, 1)
    assert grows["lead"] == pytest.approx(0.25)
    assert (still["lost"], still["detected"], still["lead"]) == (0, 1, None)
    assert (sound["alarms"], sound["detected"]) == (1, None)
