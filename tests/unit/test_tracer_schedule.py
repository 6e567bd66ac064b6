"""When the tracer is on: decided by what it costs, by what the last edits were like, or by who asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.acting.schedule import ALLOWED, FIRST, QUIET, VARIABLE, Asked, Schedule, mode_of
from stabilitylab.analysis.alertness import LEAST_HEADROOM_BITS, gives_reason
from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.findings import Diagnosis, Finding
from stabilitylab.errors import UsageError
from stabilitylab.record.readings import EditRow, Status
from tests.loops import CANARY, edit_once, make_model

# -- which edits ------------------------------------------------------------------------------------------------------


def paced(schedule: Schedule, traced: float, untraced: float, own: float = 0.0, edits: int = 12) -> list[bool]:
    """Which edits it traces, if each takes so many seconds, `own` of them in the tracer."""
    wanted = []
    for edit in range(1, edits + 1):
        wanted.append(schedule.wants(edit))
        schedule.timed(traced if wanted[-1] else untraced, own if wanted[-1] else None)
        schedule.heard(False)
    return wanted


def test_on_and_off_are_on_and_off() -> None:
    assert paced(Schedule("on"), 2.0, 1.0) == [True] * 12
    assert paced(Schedule("off"), 2.0, 1.0) == [False] * 12
    assert Schedule("on").to_json() == {"mode": "on"}


def test_auto_measures_first_and_stays_on_where_it_costs_little() -> None:
    schedule = Schedule("auto")
    assert schedule.wants(0)
    assert paced(schedule, 1.02, 1.0) == [True] * 3 + [False] * 3 + [True] * 6
    assert schedule.cost == pytest.approx(0.02)
    assert schedule.to_json() == {"mode": "auto", "cost": schedule.cost, "stays_on": True}


def test_auto_is_off_where_it_costs_more() -> None:
    schedule = Schedule("auto")
    assert paced(schedule, 1.2, 1.0) == [True] * 3 + [False] * 9
    assert schedule.cost == pytest.approx(0.2)
    assert schedule.stays_on is False


def test_what_is_spent_inside_counts_where_noise_hides_it() -> None:
    schedule = Schedule("auto")
    assert paced(schedule, 0.9, 1.0, own=0.09) == [True] * 3 + [False] * 9
    assert schedule.cost == pytest.approx(0.1)


@pytest.mark.parametrize(("cost", "stays"), [(ALLOWED - 1e-6, True), (ALLOWED + 1e-6, False)])
def test_the_limit(cost: float, stays: bool) -> None:
    schedule = Schedule("auto")
    paced(schedule, 1.0 + cost, 1.0)
    assert schedule.stays_on is stays


def test_one_slow_edit_decides_nothing() -> None:
    schedule = Schedule("auto")
    for seconds, own in [(9.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, None), (8.0, None), (1.0, None)]:
        settled = schedule.timed(seconds, own)
    assert settled
    assert schedule.cost == 0.0
    assert not schedule.timed(5.0, 0.0)  # settled once


def test_it_is_not_settled_before_both_are_known() -> None:
    schedule = Schedule("auto")
    for _ in range(2 * FIRST):
        assert not schedule.timed(1.0, None)
    assert schedule.cost is schedule.stays_on is None
    assert schedule.to_json() == {"mode": "auto"}
    assert schedule.wants(99)


def test_edits_of_no_time_at_all_decide_without_an_error() -> None:
    schedule = Schedule("auto")
    paced(schedule, 0.0, 0.0)
    assert schedule.cost == 0.0


@pytest.mark.parametrize("mode", ["armed", "auto"])
def test_an_alert_turns_it_on_until_all_is_quiet(mode: Any) -> None:
    schedule = Schedule(mode)
    paced(schedule, 2.0, 1.0)  # costs too much to stay on
    assert not schedule.wants(20)
    schedule.heard(True)
    wanted = []
    for edit in range(21, 21 + QUIET + 2):
        wanted.append(schedule.wants(edit))
        schedule.heard(False)
    assert wanted == [True] * QUIET + [False] * 2
    schedule.heard(True)
    schedule.heard(True)
    assert schedule.is_alert


def test_armed_is_off_before_anything_happens() -> None:
    assert paced(Schedule("armed"), 1.0, 1.0) == [False] * 12
    assert not Schedule("armed").wants(0)


def test_off_stays_off_at_an_alert() -> None:
    schedule = Schedule("off")
    schedule.heard(True)
    assert not schedule.wants(3)


# -- who asks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "edits"),
    [
        ("26", {26}),
        ("25-27", {25, 26, 27}),
        ("3,25-27", {3, 25, 26, 27}),
        (" 3 , 5 ,", {3, 5}),
        ("0", {0}),
        ("4-4", {4}),
        ("", set()),
        (",", set()),
    ],
)
def test_edits_that_are_asked_for(words: str, edits: set[int]) -> None:
    asked = Asked(words)
    assert {edit for edit in range(40) if edit in asked} == edits
    assert bool(asked) == bool(edits)
    assert str(asked) == words


def test_all_edits() -> None:
    assert all(edit in Asked("all") for edit in (0, 1, 10**9))
    assert 7 in Asked("3,all")


@pytest.mark.parametrize("words", ["x", "3-", "-3", "27-25", "3;4", "1.5", "ALL edits", "3-4-5", "auto"])
def test_words_that_cannot_be_read(words: str) -> None:
    with pytest.raises(UsageError, match=VARIABLE):
        Asked(words)


@pytest.mark.parametrize("trace", ["always", "on", 1, 0, None, "", 2.5])
def test_an_unknown_trace_is_refused(trace: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trace="):
        mode_of(trace)
    with pytest.raises(UsageError, match="trace="):
        sl.attach(make_model(), "0", tmp_path / "run", trace=trace)
    assert not (tmp_path / "run").exists()


# -- in a loop --------------------------------------------------------------------------------------------------------


def run(folder: Path, edits: int = 8, rate: float = 0.001, **options: Any) -> sl.Run:
    model = make_model()
    with sl.attach(model, "[03]", folder, canary=CANARY, announce=False, **options) as monitor:
        for _ in range(edits):
            with monitor.edit():
                edit_once(model, rate)
    return sl.load(folder)


def traced(of: sl.Run) -> list[int]:
    return [edit.edit for edit in of.edits if edit.row.trace_seconds > 0]


def test_the_decision_is_in_the_manifest(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    decided = found.manifest["trace"]
    assert decided["mode"] == "auto"
    assert decided["cost"] >= 0.0
    assert decided["stays_on"] is (decided["cost"] < ALLOWED)
    assert traced(found)[:4] == [0, 1, 2, 3]
    assert not {4, 5, 6} & set(traced(found))
    share = found.trace_time_share
    assert share is not None
    assert 0 < share < 1


def test_before_the_decision_the_manifest_says_what_was_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path / "auto", 2).manifest["trace"] == {"mode": "auto"}
    assert run(tmp_path / "on", 2, trace=True).manifest["trace"] == {"mode": "on"}


def test_always_and_never(tmp_path: Path) -> None:
    assert traced(run(tmp_path / "on", 3, trace=True)) == [0, 1, 2, 3]
    never = run(tmp_path / "off", 3, trace=False)
    assert (traced(never), never.trace_time_share) == ([], 0.0)
    assert never.manifest["trace"] == {"mode": "off"}


def test_armed_is_off_in_a_healthy_loop_and_on_in_one_that_dies(tmp_path: Path) -> None:
    assert traced(run(tmp_path / "healthy", 12, trace="armed")) == []
    dying = run(tmp_path / "dying", 14, rate=1e3, trace="armed")
    edits = traced(dying)
    assert edits
    assert edits[0] > 1
    assert dying.operations[0].reach == "weight"


@pytest.mark.parametrize("trace", [False, "armed"])
def test_the_environment_asks_for_edits_in_full(trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2,4-5")
    found = run(tmp_path / "run", 6, trace=trace)
    assert traced(found) == [2, 4, 5]
    assert found.manifest["trace"] == {"mode": "off" if trace is False else trace, "asked": "2,4-5"}


def test_what_the_environment_asked_for_is_kept_with_the_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "5")
    found = run(tmp_path / "run", 9)
    assert found.manifest["trace"]["asked"] == "5"
    assert "cost" in found.manifest["trace"]
    assert 5 in traced(found)


def test_an_environment_that_cannot_be_read_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "soon")
    with pytest.raises(UsageError, match=VARIABLE):
        sl.attach(make_model(), "0", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_in_full_keeps_what_overwritten_operands_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    model = nn.Linear(2, 2)
    with sl.attach(model, "weight", tmp_path / "run", trace=False, announce=False) as monitor, monitor.edit():
        scale = torch.full((2, 2), 3.0) * 1
        scale.div_(torch.zeros(()))
        model.weight.data += scale
    (found,) = sl.load(tmp_path / "run").operations
    assert found.operator == "aten.div_.Tensor"
    assert (found.operands[0].least, found.operands[0].greatest) == (3.0, 3.0)


# -- what is out of the ordinary --------------------------------------------------------------------------------------


def row(readings: Mapping[str, float] | None = None, status: Status = "applied", edit: int = 5) -> EditRow:
    arrays = {(metric, "layer"): np.array([value]) for metric, value in (readings or {}).items()}
    return EditRow(edit, "", status, 0.0, 1.0, 0.0, 0.0, readings=arrays)


def nothing() -> Diagnosis:
    return Analyzer(()).diagnosis()


@pytest.mark.parametrize(
    ("readings", "speaks"),
    [
        ({"weight.norm": 3.0}, False),
        ({"weight.norm": math.nan}, True),
        ({"canary.nll": math.inf}, True),
        ({"gradient.nonfinite": 1.0}, True),
        ({"gradient.nonfinite": 0.0}, False),
        ({"weight.headroom_bits": LEAST_HEADROOM_BITS - 0.1}, True),
        ({"weight.headroom_bits": LEAST_HEADROOM_BITS}, False),
        ({}, False),
    ],
)
def test_readings_that_give_reason_to_look_closer(readings: dict[str, float], speaks: bool) -> None:
    assert gives_reason(row(readings), ()) is speaks


def test_an_edit_that_failed_gives_reason() -> None:
    assert gives_reason(row(status="failed"), ())


def test_a_reading_without_a_value_gives_none() -> None:
    empty = EditRow(5, "", "applied", 0.0, 1.0, 0.0, 0.0, readings={("weight.nonfinite", "layer"): np.array([])})
    assert not gives_reason(empty, ())


def found(**changes: Any) -> Finding:
    given = {"rule": "r", "metric": "weight.norm", "site": "layer", "edit": 5, "value": 1.0, "threshold": 0.0}
    return Finding(**{**given, "says": "", "verdict": "stable", **changes})


@pytest.mark.parametrize(
    ("finding", "speaks"),
    [
        (found, False),
        (lambda: found(verdict="drifting"), True),
        (lambda: found(verdict="drifting", edit=4), False),
        (lambda: found(site="editor"), True),
    ],
)
def test_findings_that_give_reason(
    finding: Callable[[], Finding], speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    diagnosis = nothing()
    object.__setattr__(diagnosis, "findings", (finding(),))
    assert gives_reason(row(), diagnosis.findings) is speaks
