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
from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.probes import Update
from stabilitylab.probes.base import Probe
from stabilitylab.probes.weight_pass import WeightPass
from stabilitylab.record.readings import Metric
from stabilitylab.record.store import RunWriter
from stabilitylab.watching.instruments.feedback import FeedbackInstrument
from stabilitylab.watching.instruments.gradients import GradientInstrument
from stabilitylab.watching.instruments.logits import CanaryInstrument
from stabilitylab.watching.instruments.outputs import OutputInstrument
from stabilitylab.watching.instruments.state import StateInstrument
from stabilitylab.watching.instruments.weights import WeightInstrument

EDITS = 3


class Odd(Probe[WeightPass]):
    """Says what it is told to say."""

    needs = WeightPass
    metrics = (Metric("odd.one", "1", "log", "after", "", "", ""),)
    says: ClassVar[Any] = {"odd.one": 1.0}

    def compute(self, seen: WeightPass) -> Any:
        return type(self).says


def loop(run: Path, label: object = "", last: float = 0.01, **arguments: Any) -> sl.Run:
    """last: what the last edit adds to each weight."""
    model = nn.Sequential(nn.Linear(2, 2))
    with sl.attach(model, "0", run=run, announce=False, trace=False, **arguments) as monitor:
        for number in range(EDITS):
            with monitor.edit(label), torch.no_grad():
                model(torch.ones(1, 2))
                model[0].weight.add_(last if number == EDITS - 1 else 0.01)
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
        {"odd.one": np.zeros(1_000_000)},
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


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (GradientInstrument, "adopt"),
        (StateInstrument, "before_any_edit"),
        (StateInstrument, "after"),
        (StateInstrument, "look_in_full_next"),
        (OutputInstrument, "after"),
        (FeedbackInstrument, "after"),
        (CanaryInstrument, "forward"),
    ],
)
@pytest.mark.parametrize("error", [ValueError("ours"), SystemExit(3)])
def test_an_instrument_that_breaks_between_passes_costs_no_row_and_no_other_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, step: str, error: BaseException
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(owner, step, broken)
    run = loop(tmp_path / "run", last=float("nan"), canary=torch.ones(1, 2))
    assert [edit.edit for edit in run.edits] == list(range(EDITS + 1))
    assert run.present("update.norm", "0").all()
    assert len([says for says in notes_of(run, "probe-off") if type(error).__name__ in says]) == 1


@pytest.mark.parametrize("method", ["compute", "is_due", "is_for"])
def test_a_probe_that_would_end_the_program_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(Odd, method, leaves)
    run = loop(tmp_path / "run", probes=[Odd(), Update()])
    assert run.present("update.norm", "0").all()
    assert notes_of(run, "probe-off") == ["probe Odd switched off: SystemExit: 3"]


def test_a_hook_that_would_end_the_program_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputInstrument, "on_output", leaves)
    run = loop(tmp_path / "run")
    assert len(run) == EDITS
    assert len(notes_of(run, "hook-off")) == 1


def test_notes_that_can_not_be_written_or_taken_in_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Analyzer, "observe_note", leaves)
    run = loop(tmp_path / "analyzer")
    assert notes_of(run, "probe-off") == ["the analyzer failed: SystemExit: 3"]

    def broken(*_: object) -> None:
        raise ValueError("no room for words")

    monkeypatch.setattr(RunWriter, "note", broken)
    with caplog.at_level(logging.WARNING):
        run = loop(tmp_path / "writer")
    assert len(run) == EDITS
    assert caplog.text.count("no room for words") == 1


def test_weights_that_cannot_be_kept_cost_their_own_readings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightInstrument, "adopt", leaves)
    run = loop(tmp_path / "run", canary=torch.ones(1, 2))
    assert len(run) == EDITS
    assert run.present("canary.kl", "model").all()
    assert "what looks at weights switched off: SystemExit: 3" in notes_of(run, "probe-off")
