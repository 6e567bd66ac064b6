"""Whatever breaks around an edit stays out of the loop, costs nothing else, and is said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.probes import Update
from stabilitylab.probes.base import Probe
from stabilitylab.probes.weight_pass import WeightPass
from stabilitylab.record.readings import Metric
from stabilitylab.watching.instruments.outputs import OutputInstrument

EDITS = 3


class Odd(Probe[WeightPass]):
    """Says what it is told to say."""

    needs = WeightPass
    metrics = (Metric("odd.one", "1", "log", "after", "", "", ""),)
    says: ClassVar[Any] = {"odd.one": 1.0}

    def compute(self, seen: WeightPass) -> Any:
        return type(self).says


def loop(run: Path, label: object = "", **arguments: Any) -> sl.Run:
    model = nn.Sequential(nn.Linear(2, 2))
    with sl.attach(model, "0", run=run, announce=False, trace=False, **arguments) as monitor:
        for _ in range(EDITS):
            with monitor.edit(label), torch.no_grad():
                model(torch.ones(1, 2))
                model[0].weight.add_(0.01)
    return sl.load(run)


def notes_of(run: sl.Run, kind: str) -> list[str]:
    return [note.says for note in run.notes if note.kind == kind]


@pytest.mark.parametrize(
    "says",
    [
        "nonsense",
        [1.0],
        {"odd.one": "seven"},
        {"odd.one": np.zeros((2, 2))},
        {"odd.one": 1j},
        {"odd.one": []},
        {"odd.one": [[1.0], [1.0, 2.0]]},
        {"odd.one": None},
        {"another": 1.0},
        {7: 1.0},
    ],
)
def test_a_probe_that_says_nonsense_is_switched_off_and_the_others_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: object
) -> None:
    monkeypatch.setattr(Odd, "says", says)
    run = loop(tmp_path / "run", probes=[Odd(), Update()])
    assert run.present("update.norm", "0").all()
    (said,) = notes_of(run, "probe-off")
    assert said.startswith("probe Odd switched off")


@pytest.mark.parametrize("method", ["is_due", "is_for"])
def test_a_probe_whose_cadence_or_sites_break_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError("every nothing")

    monkeypatch.setattr(Odd, method, broken)
    run = loop(tmp_path / "run", probes=[Odd(), Update()])
    assert run.present("update.norm", "0").all()
    assert notes_of(run, "probe-off") == ["probe Odd switched off: ZeroDivisionError: every nothing"]


def leaves(*_: object) -> None:
    raise SystemExit(3)


class Sink:
    """A sink whose methods are what they are told to be."""

    def __init__(self, on_row: Callable[..., None], close: Callable[..., None]) -> None:
        self.on_row, self.close = on_row, close


def test_a_sink_that_would_end_the_program_does_not(tmp_path: Path) -> None:
    run = loop(tmp_path / "run", sinks=[Sink(leaves, leaves)])
    assert len(run) == EDITS
    assert run.complete
    assert notes_of(run, "probe-off") == ["Sink failed: SystemExit: 3", "Sink.close failed: SystemExit: 3"]


def test_a_sink_that_loses_its_methods_is_said(tmp_path: Path) -> None:
    sink = Sink(lambda *_: vars(sink).clear(), leaves)
    run = loop(tmp_path / "run", sinks=[sink])
    assert len(run) == EDITS
    assert run.complete
    assert "AttributeError" in "".join(notes_of(run, "probe-off"))


def test_a_label_that_can_not_be_said_is_empty(tmp_path: Path) -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    run = loop(tmp_path / "run", Unspeakable())
    assert [edit.label for edit in run.edits] == [""] * (EDITS + 1)


def test_a_hook_that_breaks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such output")

    monkeypatch.setattr(OutputInstrument, "on_output", broken)
    with caplog.at_level(logging.WARNING):
        run = loop(tmp_path / "run")
    assert len(run) == EDITS
    (said,) = notes_of(run, "hook-off")
    assert "RuntimeError: no such output" in said
    assert caplog.text.count("no such output") == 1
