"""What people do to a loop: Ctrl-C, closing too early, forgetting the monitor, forking, two monitors on one model."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.errors import UsageError
from stabilitylab.probes import Metric, Probe, Update
from stabilitylab.probes.weight_pass import WeightPass
from tests.loops import CANARY, make_model


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def bump(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.01)


def attached(model: nn.Module, run: Path, **options: Any) -> sl.Monitor:
    return sl.attach(model, "0", run, announce=False, trace=False, **options)


class Pressing(Probe[WeightPass]):
    """Ctrl-C is pressed while it computes, in the first edit."""

    needs = WeightPass
    metrics = (Metric("pressed", "1", "linear", "after", "-", "-", "-"),)

    def __init__(self, press: Callable[[], None]) -> None:
        super().__init__()
        self.press: Callable[[], None] | None = press

    def compute(self, seen: WeightPass) -> dict[str, float]:
        if self.press is not None and seen.update > 0:
            press, self.press = self.press, None
            press()
        return {"pressed": 1.0}


def by_signal() -> None:
    signal.raise_signal(signal.SIGINT)


def by_exception() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("press", [by_signal, by_exception])
def test_ctrl_c_inside_a_measurement_loses_no_row_and_mixes_no_two_updates(
    tmp_path: Path, press: Callable[[], None]
) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    moved, interrupted = [0.0], 0
    with attached(model, tmp_path / "run", probes=[Pressing(press), Update()]) as monitor:
        for _ in range(3):
            before = model[0].weight.detach().clone()
            try:
                with monitor.edit():
                    bump(model)
            except KeyboardInterrupt:
                interrupted += 1
            moved.append(float((model[0].weight.detach() - before).norm()))
    run = sl.load(tmp_path / "run")
    assert interrupted == 1
    assert [edit.edit for edit in run.edits] == [0, 1, 2, 3]
    assert run.series("update.norm", "0")[1:] == pytest.approx(moved[1:], rel=1e-5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_canary_ends_it_at_once_and_keeps_the_row(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    answers: list[str] = []

    def canary(asked: nn.Module) -> Tensor:
        answers.append("asked")
        if len(answers) == 2:
            by_signal()
            answers.append("went on")
        out: Tensor = asked(torch.ones(2, 6))
        return out

    with attached(model, tmp_path / "run", canary=canary) as monitor:
        with pytest.raises(KeyboardInterrupt), monitor.edit():
            bump(model)
        with monitor.edit():
            bump(model)
    run = sl.load(tmp_path / "run")
    assert answers == ["asked", "asked", "asked"]
    assert [edit.edit for edit in run.edits] == [0, 1, 2]
    assert hooks_on(model) == 0
    assert torch.isfinite(torch.tensor(run.series("update.norm", "0")[1:])).all()


def test_a_handler_of_the_users_is_called_once_and_stays(tmp_path: Path) -> None:
    called: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        called.append(number)

    model = nn.Sequential(nn.Linear(6, 6))
    before = signal.signal(signal.SIGINT, handler)
    try:
        with attached(model, tmp_path / "run", probes=[Pressing(by_signal), Update()]) as monitor, monitor.edit():
            bump(model)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert called == [signal.SIGINT]


def test_in_another_thread_it_watches_as_ever(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))

    def loop() -> None:
        with attached(model, tmp_path / "run") as monitor, monitor.edit():
            bump(model)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert [edit.status for edit in sl.load(tmp_path / "run").edits] == ["start", "applied"]


@contextmanager
def opened(monitor: sl.Monitor) -> Iterator[Any]:
    edit = monitor.edit("half way")
    edit.__enter__()
    yield edit


def test_closing_ends_an_open_edit_as_failed_and_takes_its_hooks_off(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    monitor = attached(model, tmp_path / "run")
    with opened(monitor):
        bump(model)
        assert hooks_on(model) > 0
        monitor.close()
    run = sl.load(tmp_path / "run")
    assert [(edit.edit, edit.status) for edit in run.edits] == [(0, "start"), (1, "failed")]
    assert "closed inside it" in str(run.edits[1].row.error)
    assert run.complete
    assert hooks_on(model) == 0


def test_closing_inside_the_block_of_an_edit_is_no_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    monitor = attached(model, tmp_path / "run")
    with monitor.edit():
        monitor.close()
    assert [edit.status for edit in sl.load(tmp_path / "run").edits] == ["start", "failed"]
    with pytest.raises(UsageError, match="closed"):
        monitor.edit()


def test_a_monitor_that_is_forgotten_inside_an_edit_leaves_no_hook(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    monitor = attached(model, tmp_path / "run")
    edit = monitor.edit()
    edit.__enter__()
    del monitor, edit
    gc.collect()
    assert hooks_on(model) == 0
    assert [edit.status for edit in sl.load(tmp_path / "run").edits] == ["start", "failed"]


@pytest.mark.multiprocess
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_leaves_the_rows_of_its_parent_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    monitor = attached(model, tmp_path / "run")
    with monitor.edit("parent"):
        bump(model)
    child = os.fork()
    if child == 0:
        try:
            with monitor.edit("child"):
                bump(model)
            monitor.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with monitor.edit("parent"):
        bump(model)
    assert not sl.load(tmp_path / "run").complete
    monitor.close()
    run = sl.load(tmp_path / "run")
    assert [edit.row.label for edit in run.edits] == ["", "parent", "parent"]
    assert run.complete


def test_a_second_monitor_does_not_hear_the_canary_of_the_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    ids = torch.randn(3, 6)
    one, two = attached(model, tmp_path / "one"), attached(model, tmp_path / "two", canary={"input": ids})
    with one, two, one.edit(), two.edit():
        model(ids).square().mean().backward()
    assert sl.load(tmp_path / "one").series("logits.passes")[1] == 1


def test_a_loop_that_can_t_be_indented_steps_from_edit_to_edit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    moved = []
    with attached(model, tmp_path / "run") as monitor:
        for number in range(3):
            monitor.step(f"request {number}")
            before = model[0].weight.detach().clone()
            bump(model)
            moved.append(float((model[0].weight.detach() - before).norm()))
    run = sl.load(tmp_path / "run")
    assert [(edit.row.label, edit.status) for edit in run.edits[1:]] == [
        (f"request {number}", "applied") for number in range(3)
    ]
    assert run.series("update.norm", "0")[1:] == pytest.approx(moved, rel=1e-5)
    assert hooks_on(model) == 0


def test_what_ends_a_loop_of_steps_fails_its_last_edit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(RuntimeError, match="out of memory"), attached(model, tmp_path / "run") as monitor:
        monitor.step()
        bump(model)
        monitor.step()
        raise RuntimeError("out of memory")
    statuses = [(edit.status, edit.row.error) for edit in sl.load(tmp_path / "run").edits]
    assert statuses == [("start", None), ("applied", None), ("failed", "RuntimeError: out of memory")]


def test_a_step_inside_the_block_of_an_edit_is_refused(tmp_path: Path) -> None:
    with attached(nn.Sequential(nn.Linear(6, 6)), tmp_path / "run") as monitor:
        with monitor.edit(), pytest.raises(UsageError, match="inside an open edit"):
            monitor.step()
        monitor.step()
        with pytest.raises(UsageError, match="open already"), monitor.edit():
            pass


# -- what applies an edit, outside of it ------------------------------------------------------------------------------


def test_an_optimizer_that_steps_after_the_edit_is_said_once_and_no_edit_is_called_lost(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY, announce=False) as monitor:
        for _ in range(6):
            with monitor.edit():
                optimizer.zero_grad()
                model(torch.randn(2, 5, 8)).pow(2).mean().backward()
            optimizer.step()
    run = sl.load(tmp_path / "run")
    (says,) = [note.says for note in run.notes if note.kind == "moved-outside"]
    assert "edit 1 moved no weight" in says
    found = run.diagnosis()
    assert found == monitor.diagnosis()
    assert (found.landed, found.nothing_lands, found.cause) == (None, False, "unknown")
    assert found.unwatched == (says,)


def test_a_change_between_edits_that_moved_something_is_said_once(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "0", tmp_path / "run", announce=False) as monitor:
        for _ in range(4):
            with monitor.edit(), torch.no_grad():
                model[0].weight += 0.01
            with torch.no_grad():
                model[0].weight *= 1.01
    notes = [note.kind for note in sl.load(tmp_path / "run").notes]
    assert notes.count("restore") == 1
    assert "moved-outside" not in notes
    assert monitor.diagnosis().landed == "all"
