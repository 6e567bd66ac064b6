"""Reading one edit late, as on an accelerator: the same run as when each edit is read at once, and nothing is lost."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.analysis import Diagnosis
from stabilitylab.probes import probes_of
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.weight_pass import WeightPass
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.watching.instruments.transfer import Shipment
from tests.loops import CANARY, edit_once, make_model

Loop = Callable[[nn.Module, sl.Monitor], None]


@pytest.fixture
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shipment, "is_here", property(lambda _: False))


late = pytest.mark.usefixtures("_late")


class Rows:
    """A sink that writes down what it is given."""

    def __init__(self) -> None:
        self.edits: list[int] = []

    def on_row(self, row: EditRow, diagnosis: Diagnosis) -> None:
        self.edits.append(row.edit)

    def close(self) -> None:
        pass


class Breaks(Probe[WeightPass]):
    """Breaks at the third measurement of a site that moved."""

    needs = WeightPass
    metrics: ClassVar = (Metric("breaks.value", "1", "linear", "after", "", "", ""),)

    def compute(self, seen: WeightPass) -> Readings:
        if seen.drift > 0.02:
            raise ArithmeticError("bug of ours")
        return {"breaks.value": seen.drift}


def quiet(model: nn.Module, monitor: sl.Monitor) -> None:
    for edit in range(6):
        with monitor.edit(label=f"edit {edit}"):
            edit_once(model)


def dying(model: nn.Module, monitor: sl.Monitor) -> None:
    for edit in range(12):
        with monitor.edit():
            edit_once(model, rate=0.1 * 8.0**edit)


def undone(model: nn.Module, monitor: sl.Monitor) -> None:
    saved = [copy.deepcopy(model.state_dict())]
    with monitor.edit():  # restored to the originals
        edit_once(model)
    model.load_state_dict(saved[0])
    with monitor.edit():  # stays
        edit_once(model)
    saved.append(copy.deepcopy(model.state_dict()))
    with monitor.edit():  # rolled back to what the last one left
        edit_once(model)
    model.load_state_dict(saved[1])
    with monitor.edit():  # followed by a change that no edit made
        edit_once(model)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with monitor.edit():
        pass
    with pytest.raises(KeyError), monitor.edit():
        edit_once(model)
        raise KeyError("mine")
    with monitor.edit():
        edit_once(model)


def lost(model: nn.Module, monitor: sl.Monitor) -> None:
    """NaN in one edit, that later edits leave alone."""
    for edit in range(5):
        with monitor.edit(), torch.no_grad():
            model[3].weight += torch.nan if edit == 1 else 0.1


LOOPS: list[Loop] = [quiet, dying, undone, lost]


def run_of(folder: Path, loop: Loop, **options: object) -> sl.Run:
    model = make_model()
    torch.manual_seed(7)
    given = {"sites": "[03]", "canary": CANARY, "probes": [*probes_of("deep"), Breaks()]} | options
    with sl.attach(model, run=folder, **given) as monitor:
        loop(model, monitor)
    run = sl.load(folder)
    assert run.complete
    assert monitor.diagnosis() == run.diagnosis()
    return run


def untimed(row: EditRow) -> EditRow:
    return replace(row, started=0.0, seconds=0.0, probe_seconds=0.0, canary_seconds=0.0, trace_seconds=0.0, readings={})


def assert_same(first: sl.Run, second: sl.Run) -> None:
    assert [(untimed(edit.row), edit.outcome) for edit in first.edits] == [
        (untimed(edit.row), edit.outcome) for edit in second.edits
    ]
    for one, other in zip(first.edits, second.edits, strict=True):
        assert list(one.row.readings) == list(other.row.readings), one.edit
        for key, values in one.row.readings.items():
            np.testing.assert_array_equal(values, other.row.readings[key], err_msg=f"edit {one.edit}: {key}")
    assert first.alarms == second.alarms
    by_edit = [sorted((n.edit, n.kind, n.says) for n in run.notes) for run in (first, second)]
    assert by_edit[0] == by_edit[1]
    assert first.diagnosis() == second.diagnosis()


@pytest.mark.parametrize("sites", ["[03]", None], ids=str)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_run_is_the_same_as_when_each_edit_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: Loop, sites: str | None
) -> None:
    at_once = run_of(tmp_path / "at once", loop, sites=sites)
    monkeypatch.setattr(Shipment, "is_here", property(lambda _: False))
    assert_same(at_once, run_of(tmp_path / "late", loop, sites=sites))
    if loop is undone and sites is not None:
        kinds = ["restored", "committed", "rolled_back", "committed", "committed", None, "committed"]
        assert [edit.outcome for edit in at_once.edits[1:]] == kinds
    if loop is dying:
        assert at_once.alarms


@pytest.mark.parametrize("options", [{"probes": "light"}, {"canary": sl.Canary(CANARY, every=3)}, {"canary": "replay"}])
def test_so_is_one_with_a_cadence_or_without_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    at_once = run_of(tmp_path / "at once", quiet, **options)
    monkeypatch.setattr(Shipment, "is_here", property(lambda _: False))
    assert_same(at_once, run_of(tmp_path / "late", quiet, **options))


def written(monitor: sl.Monitor) -> list[int]:
    return [edit.edit for edit in sl.load(monitor.path).edits]


@late
def test_a_row_is_written_one_edit_late_and_in_order(tmp_path: Path) -> None:
    model, rows = make_model(), Rows()
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY, sinks=[rows]) as monitor:
        assert written(monitor) == [0]
        for edit in range(1, 5):
            with monitor.edit():
                edit_once(model)
                assert written(monitor) == list(range(max(edit - 1, 1)))
            assert written(monitor) == rows.edits == list(range(edit))
    assert written(monitor) == rows.edits == list(range(5))


def fail(model: nn.Module, monitor: sl.Monitor) -> None:
    with pytest.raises(ZeroDivisionError), monitor.edit():
        edit_once(model)
        raise ZeroDivisionError


FLUSHES: dict[str, Callable[[nn.Module, sl.Monitor], object]] = {
    "exception": fail,
    "close": lambda _, monitor: monitor.close(),
    "diagnosis": lambda _, monitor: monitor.diagnosis(),
    "observe_outcome": lambda _, monitor: monitor.observe_outcome(),
    "last_edit_moved": lambda _, monitor: monitor.last_edit_moved,
}


@late
@pytest.mark.parametrize("how", FLUSHES)
def test_what_is_on_its_way_is_read_before_anything_is_said_of_it(tmp_path: Path, how: str) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY) as monitor:
        for _ in range(2):
            with monitor.edit():
                edit_once(model)
        assert written(monitor) == [0, 1]
        FLUSHES[how](model, monitor)
        assert written(monitor) == ([0, 1, 2, 3] if how == "exception" else [0, 1, 2])
    assert written(monitor)[:3] == [0, 1, 2]


@late
def test_what_is_said_is_of_the_last_edit(tmp_path: Path) -> None:
    model = make_model()
    saved = copy.deepcopy(model.state_dict())
    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        with monitor.edit():
            edit_once(model)
        assert monitor.last_edit_moved
        assert monitor.observe_outcome() == "committed"
        with monitor.edit():
            pass
        assert not monitor.last_edit_moved
        with monitor.edit():
            edit_once(model)
        model.load_state_dict(saved)
        assert monitor.observe_outcome() == "restored"
        assert monitor.observe_outcome() is None
        with monitor.edit(), torch.no_grad():
            model[3].weight.fill_(torch.nan)
        assert monitor.diagnosis().verdict == "non-finite"


@late
def test_diagnoses_online_and_offline_agree_at_each_edit(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=sl.Canary(CANARY, every=2)) as monitor:
        for edit in range(8):
            with monitor.edit():
                edit_once(model, rate=0.1 * 8.0**edit)
            assert monitor.diagnosis() == sl.load(tmp_path / "run").diagnosis()


@late
def test_no_outcome_is_told_while_nothing_is_watched(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, run=tmp_path / "run", canary=CANARY) as monitor:
        for _ in range(3):
            with monitor.edit():
                model(CANARY)
    assert [edit.outcome for edit in sl.load(tmp_path / "run").edits] == [None] * 4


@late
def test_each_row_has_its_own_times(tmp_path: Path) -> None:
    """The canary's time is in the row of the edit after which it was forwarded, and no time is counted twice."""
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=sl.Canary(CANARY, every=3)) as monitor:
        for _ in range(7):
            with monitor.edit():
                edit_once(model)
    rows = [edit.row for edit in sl.load(tmp_path / "run").edits]
    assert [row.edit for row in rows if row.canary_seconds > 0] == [0, 3, 6]
    assert all(0 < row.probe_seconds + row.canary_seconds <= row.seconds for row in rows)


KILLED = """
import os, sys
from pathlib import Path
import stabilitylab as sl
from stabilitylab.watching.instruments.transfer import Shipment
from tests.loops import CANARY, edit_once, make_model
folder, late, inside = Path(sys.argv[1]), sys.argv[2] == "late", sys.argv[3] == "inside"
if late:
    Shipment.is_here = property(lambda _: False)
model = make_model()
monitor = sl.attach(model, "[03]", folder, canary=CANARY)
for _ in range(3):
    with monitor.edit():
        edit_once(model)
if inside:
    monitor.edit().__enter__()
    edit_once(model)
os._exit(9)
"""


@pytest.mark.parametrize("inside", ["inside", "between"])
@pytest.mark.parametrize("when", ["late", "at once"])
def test_a_killed_process_loses_at_most_the_last_edit(tmp_path: Path, when: str, inside: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), when, inside]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == ([0, 1, 2] if when == "late" else [0, 1, 2, 3])
    assert not run.complete
