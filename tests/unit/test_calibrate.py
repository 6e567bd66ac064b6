"""`Monitor.calibrate`: dry edits are measured, undone bit by bit, and leave the run as it would be without them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.errors import EditError, UsageError
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.record.run import load
from stabilitylab.watching.instruments.transfer import Shipment
from tests.dry_edits import REQUESTS, assert_same, edit, kinds
from tests.loops import CANARY, edit_once, make_model


def watched(folder: Path, calibrated: bool, sites: str | None, canary: Any = CANARY) -> tuple[nn.Module, sl.Monitor]:
    torch.manual_seed(3)
    model = make_model()
    with sl.attach(model, sites, folder, canary=canary) as monitor:
        if calibrated:
            monitor.calibrate(edit, REQUESTS, 12)
        for request in REQUESTS[:10]:
            with monitor.edit(label=request):
                edit(model, request)
    return model, monitor


@pytest.mark.parametrize("sites", ["[03]", None])
def test_the_runs_own_rows_are_bit_identical_to_those_of_a_run_without(tmp_path: Path, sites: str | None) -> None:
    with_it, _ = watched(tmp_path / "with", True, sites)
    without, _ = watched(tmp_path / "without", False, sites)
    assert_same(with_it, without.state_dict())
    one, other = load(tmp_path / "with"), load(tmp_path / "without")
    assert (len(one.dry_edits), len(other.dry_edits)) == (12, 0)
    assert one.sites == other.sites
    for left, right in zip(one.edits, other.edits, strict=True):
        assert (left.label, left.status, left.outcome) == (right.label, right.status, right.outcome)
        assert left.row.readings.keys() == right.row.readings.keys()
        for key, values in left.row.readings.items():
            assert values.tobytes() == right.row.readings[key].tobytes(), (left.edit, key)


def test_rows_that_are_read_one_edit_late_as_on_an_accelerator_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(tmp_path / "at once", True, "[03]")
    monkeypatch.setattr(Shipment, "is_here", property(lambda _: False))
    watched(tmp_path / "late", True, "[03]")
    one, other = load(tmp_path / "at once"), load(tmp_path / "late")
    assert len(one.dry_edits) == len(other.dry_edits) == 12
    for left, right in zip(one.dry_edits, other.dry_edits, strict=True):
        assert left.readings.keys() == right.readings.keys()
        for key, values in left.readings.items():
            assert values.tobytes() == right.readings[key].tobytes(), (left.edit, key)


@pytest.mark.parametrize("sites", ["[03]", None])
def test_each_dry_edit_is_measured_from_the_same_state(tmp_path: Path, sites: str | None) -> None:
    watched(tmp_path / "run", True, sites, canary=sl.Canary(CANARY, every=50))
    run = load(tmp_path / "run")
    assert [row.edit for row in run.dry_edits] == list(range(1, 13))
    for row in run.dry_edits:
        assert row.status == "applied"
        moved, away = row.scalar("update.norm", "3"), row.scalar("drift.norm", "3")
        assert moved is not None
        assert moved == away > 0
        assert row.scalar("canary.max", MODEL_SITE) is not None
    assert run.dry_edits[0].readings[("update.norm", "3")] != run.dry_edits[1].readings[("update.norm", "3")]
    hooked = [row for row in run.dry_edits if ("gradient.norm", "3") in row.readings]
    assert len(hooked) == 12 - (sites is None)


def test_the_baseline_is_that_of_the_dry_edits_online_and_offline(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY) as monitor:
        assert monitor.diagnosis().baseline == "none yet"
        monitor.calibrate(edit, REQUESTS)
        assert monitor.diagnosis().baseline == "20 dry edits"
        assert load(tmp_path / "run").diagnosis() == monitor.diagnosis()
        for number in range(6):
            with monitor.edit():
                edit_once(model, rate=0.01 * 30.0**number)
            assert load(tmp_path / "run").diagnosis() == monitor.diagnosis()
    said = monitor.diagnosis()
    assert said.baseline == "20 dry edits"
    assert {"jump", "growth", "drift"} & {finding.rule for finding in said.findings}, "without them, it has no baseline"
    run = load(tmp_path / "run")
    assert kinds(run).count("calibrated") == 1
    assert "20 dry edits in " in next(note.says for note in run.notes if note.kind == "calibrated")


def test_what_breaks_in_a_dry_edit_is_said(tmp_path: Path) -> None:
    sound = iter(range(2))  # at attach, and before the first dry edit

    def canary(model: nn.Module) -> Any:
        return "no logits" if next(sound, None) is None else model(torch.ones(1, 8))

    with sl.attach(make_model(), "[03]", tmp_path / "run", canary=sl.Canary(canary)) as monitor:
        monitor.calibrate(edit, REQUESTS)
    assert any(note.says.startswith("in the dry edits, ") for note in load(tmp_path / "run").notes)


def test_it_comes_once_before_the_first_edit(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "late") as monitor:
        with monitor.edit(), pytest.raises(UsageError, match="an edit is open; expected calibrate once, before"):
            monitor.calibrate(edit, REQUESTS)
        with pytest.raises(UsageError, match="1 edit was made already"):
            monitor.calibrate(edit, REQUESTS)
    with pytest.raises(UsageError, match="the monitor is closed"):
        monitor.calibrate(edit, REQUESTS)
    with sl.attach(model, "[03]", tmp_path / "twice") as monitor:
        monitor.calibrate(edit, REQUESTS, 8)
        with pytest.raises(UsageError, match="dry edits were made already"):
            monitor.calibrate(edit, REQUESTS, 8)
    assert len(load(tmp_path / "twice").dry_edits) == 8


@pytest.mark.parametrize("n", [7, 0, -1, True, 8.0, "20"])
def test_too_few_dry_edits_make_no_baseline(tmp_path: Path, n: Any) -> None:
    with (
        sl.attach(make_model(), "[03]", tmp_path / "run") as monitor,
        pytest.raises(UsageError, match="expected a whole number of dry edits, 8 or more"),
    ):
        monitor.calibrate(edit, REQUESTS, n)


def test_too_few_requests(tmp_path: Path) -> None:
    called: list[object] = []

    def apply(model: nn.Module, request: object) -> None:
        called.append(request)
        edit(model, request)

    with sl.attach(make_model(), "[03]", tmp_path / "run") as monitor:
        with pytest.raises(UsageError, match="got 7 requests; expected 8 or more"):
            monitor.calibrate(apply, REQUESTS[:7])
        monitor.calibrate(apply, iter(REQUESTS[:9]))
    assert called == REQUESTS[:9]


def test_an_apply_that_is_wrapped_would_write_rows_of_the_run(tmp_path: Path) -> None:
    with sl.attach(make_model(), "[03]", tmp_path / "run") as monitor:
        with pytest.raises(UsageError, match=r"without monitor\.edit or monitor\.wrap"):
            monitor.calibrate(monitor.wrap(edit), REQUESTS)
        with pytest.raises(UsageError, match="an edit is open"):
            monitor.calibrate(lambda model, request: monitor.calibrate(edit, REQUESTS), REQUESTS)
    assert len(load(tmp_path / "run")) == 0


def test_without_sites_something_must_move(tmp_path: Path) -> None:
    with sl.attach(make_model(), None, tmp_path / "run") as monitor:
        with pytest.raises(EditError, match=r"none of 20 dry edits moved a parameter.*or attach\(sites=\.\.\.\)"):
            monitor.calibrate(lambda model, request: model(CANARY), REQUESTS)
        assert load(tmp_path / "run").dry_edits == ()


@pytest.mark.parametrize("where", ["model", "editor"])
def test_what_can_not_be_copied_is_named_before_anything_is_touched(tmp_path: Path, where: str) -> None:
    model, called = make_model(), []
    sparse = torch.eye(3).to_sparse()
    editor = nn.Module()
    (model if where == "model" else editor).register_buffer("odd", sparse)
    with (
        sl.attach(model, "[03]", tmp_path / "run", editor=editor) as monitor,
        pytest.raises(UsageError, match=r"odd' can't be kept and put back: it is torch.sparse_coo"),
    ):
        monitor.calibrate(lambda *_: called.append(1), REQUESTS)
    assert not called


def test_a_bar_is_shown_only_where_a_person_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with sl.attach(make_model(), "[03]", tmp_path / "piped") as monitor:
        monitor.calibrate(edit, REQUESTS, 8)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with sl.attach(make_model(), "[03]", tmp_path / "seen") as monitor:
        monitor.calibrate(edit, REQUESTS, 8)
    assert "8/8" in terminal.getvalue()
