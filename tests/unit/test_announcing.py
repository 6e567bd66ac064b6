"""The alarm is said once on stderr as it is raised, in one line, and never comes near the loop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.analysis import Analyzer
from stabilitylab.record.run import load
from stabilitylab.reports.announcing import WIDEST, AlarmSink
from tests.synthetic import HOSTILE, make_run


def grow(run: Path, *, edits: int = 14, rate: float = 4.0, calibrate: bool = False, **options: object) -> int | None:
    """A loop whose updates grow; the edit of the alarm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def edit_once(target: nn.Module, size: float) -> None:
        with torch.no_grad():
            target[0].weight += size * torch.randn(8, 8)  # type: ignore[index,operator]

    with sl.attach(model, "*", run=run, **options) as monitor:  # type: ignore[arg-type]
        if calibrate:
            monitor.calibrate(edit_once, [1e-3 * 10.0**place for place in range(8)], n=8)
        for place in range(edits):
            with monitor.edit():
                edit_once(model, 1e-3 * rate**place)
        return monitor.diagnosis().alarm_edit


def test_the_alarm_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarm = grow(tmp_path / "run")
    out, err = capsys.readouterr()
    assert out == ""
    assert alarm is not None
    assert err.startswith(f"stabilitylab: edit {alarm}: diverging at 0: update ")
    assert err.endswith(f". Look: stabilitylab check {tmp_path / 'run'}\n")
    assert err.count("\n") == 1
    assert len(err.rstrip()) <= max(WIDEST, 120 + len(str(tmp_path)))


def test_it_can_be_silenced_and_a_healthy_loop_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grow(tmp_path / "loud", announce=False) is not None
    assert grow(tmp_path / "healthy", rate=1.0) is None
    assert capsys.readouterr() == ("", "")


def test_dry_edits_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grow(tmp_path / "run", edits=3, rate=1.0, calibrate=True) is None
    assert capsys.readouterr().err == ""


def test_a_stderr_that_is_closed_or_gone_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise ValueError("I/O operation on closed file")

    for name, stream in (("closed", Closed()), ("gone", None)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert grow(tmp_path / name) is not None
    monkeypatch.undo()
    assert len(load(tmp_path / "closed").edits) == len(load(tmp_path / "gone").edits) == 15


def test_the_line_holds_whatever_a_run_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load(make_run(tmp_path / "run", edits=14, dies_at=9, sites=len(HOSTILE), hostile_labels=True))
    analyzer, sink = Analyzer(run.metrics), AlarmSink(Path("runs/\x1b[31mred"))
    for edit in run.edits:
        analyzer.observe(edit.row)
        sink.on_row(edit.row, analyzer.diagnosis())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    assert len(said.rstrip("\n")) <= WIDEST
    assert r"stabilitylab check runs/\x1b[31mred" in said
