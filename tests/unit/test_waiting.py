"""What can't be written is tried again; what is lost is said in the run, and never called complete."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.probes.base import Tier
from stabilitylab.record import store, waiting
from stabilitylab.record.acknowledged import acknowledged
from stabilitylab.record.readings import EditRow
from stabilitylab.record.store import FILE_NAME, RunWriter
from stabilitylab.record.waiting import Waiting
from stabilitylab.watching import recording


class Loop:
    """An edit loop of one small layer."""

    def __init__(self, run: Path, probes: Tier = "light") -> None:
        self.model = nn.Sequential(nn.Linear(2, 2))
        self.monitor = sl.attach(self.model, "0", run=run, probes=probes, announce=False, trace=False)

    def edit(self, times: int) -> None:
        for _ in range(times):
            with self.monitor.edit(), torch.no_grad():
                self.model[0].weight.add_(0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """`disk["error"]`, while it is set, is what each write ends with."""
    state: dict[str, str] = {}
    real = RunWriter._db.fget  # type: ignore[attr-defined]

    def database(writer: RunWriter) -> sqlite3.Connection:
        if "error" in state:
            raise sqlite3.OperationalError(state["error"])
        return real(writer)

    monkeypatch.setattr(RunWriter, "_db", property(database))
    return state


def test_what_a_full_disk_refused_is_written_once_there_is_room(tmp_path: Path, disk: dict[str, str]) -> None:
    loop = Loop(tmp_path / "run")
    loop.edit(5)
    disk["error"] = "database or disk is full"
    loop.edit(15)
    del disk["error"]
    loop.edit(1)
    loop.monitor.close()
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == list(range(22))
    assert run.complete
    assert any("database or disk is full" in note.says for note in run.notes)


def test_rows_for_which_there_is_no_memory_either_are_named_in_the_run(
    tmp_path: Path, disk: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MOST_BYTES", 0)
    loop = Loop(tmp_path / "run")
    loop.edit(5)
    disk["error"] = "database or disk is full"
    loop.edit(15)
    del disk["error"]
    loop.edit(3)
    loop.monitor.close()
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == [*range(6), 21, 22, 23]
    says = "edits 6 to 20 were not recorded: database or disk is full"
    assert says in [note.says for note in run.notes]
    assert says in run.diagnosis().says
    assert says in loop.monitor.diagnosis().says
    assert run.closed
    assert not run.complete


def test_a_disk_that_stays_full_is_said_aloud_and_the_run_is_not_closed(
    tmp_path: Path, disk: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "run")
    loop.edit(2)
    disk["error"] = "database or disk is full"
    loop.edit(2)
    loop.monitor.close()
    assert "edits 3 to 4 were not recorded: database or disk is full" in caplog.text
    assert not sl.load(tmp_path / "run").closed


def test_a_row_that_can_never_be_written_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunWriter.append

    def append(writer: RunWriter, row: Any) -> None:
        if row.edit == 2:
            raise ValueError("such a row")
        real(writer, row)

    monkeypatch.setattr(RunWriter, "append", append)
    loop = Loop(tmp_path / "run")
    loop.edit(4)
    loop.monitor.close()
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == [0, 1, 3, 4]
    assert "edit 2 was not recorded: such a row" in [note.says for note in run.notes]
    assert not run.complete


def test_a_write_that_fails_to_the_end_takes_no_later_one_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(RunWriter, "outcome", outcome)
    loop = Loop(tmp_path / "run", probes="default")
    loop.edit(3)
    loop.monitor.close()
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == list(range(4))
    assert any("disk I/O error" in note.says for note in run.notes)
    assert run.closed


def test_a_folder_that_is_deleted_is_written_again_whole(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    loop.edit(3)
    shutil.rmtree(tmp_path / "run")
    loop.edit(2)
    loop.monitor.close()
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == list(range(6))
    assert run.complete
    assert any("was deleted, moved or replaced after edit 3" in note.says for note in run.notes)


def test_a_folder_that_is_replaced_leaves_the_other_run_alone(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    loop.edit(3)
    shutil.rmtree(tmp_path / "run")
    other = Loop(tmp_path / "run")
    other.edit(2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    loop.edit(2)
    loop.monitor.close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    other.monitor.close()
    assert len(sl.load(tmp_path / "run").edits) == 3
    assert len(sl.load(tmp_path / "run-2").edits) == 6


def test_a_reader_of_a_file_without_a_log_holds_no_edit_up_and_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "wal_works", lambda folder: False)
    loop = Loop(tmp_path / "run")
    loop.edit(2)
    with closing(sqlite3.connect(tmp_path / "run" / FILE_NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM edit").fetchone()
        began = time.perf_counter()
        loop.edit(3)
        assert time.perf_counter() - began < 1.0
    loop.monitor.close()
    run = sl.load(tmp_path / "run")
    assert len(run.edits) == 6
    assert run.complete
    assert not [note for note in run.notes if note.kind == "probe-off"]


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


class Table:
    """What is written to, of which a transaction may take long, or be kept waiting by a reader until it gives up."""

    def __init__(self, clock: Clock) -> None:
        self.held: list[int] = []
        self.transactions = 0
        self.locked = False
        self._clock = clock
        self._inside = False

    @contextmanager
    def together(self) -> Iterator[None]:
        before = list(self.held)
        self._inside = True
        try:
            yield
            self._commit()
        except BaseException:
            self.held = before
            raise
        finally:
            self._inside = False

    def _commit(self) -> None:
        self.transactions += 1
        self._clock.now += 0.02
        if self.locked:
            raise sqlite3.OperationalError("database is locked")

    def write(self, number: int) -> None:
        if number < 0:
            raise ValueError("never")
        if not self._inside:
            self._commit()
        self.held.append(number)


def test_a_reader_holds_up_the_many_writes_of_an_edit_as_it_does_one(clock: Clock) -> None:
    table = Table(clock)
    queue = Waiting(table.together)
    table.locked = True
    for number in range(50):
        assert not queue.put(partial(table.write, number))
    assert table.transactions == 1
    table.locked = False
    clock.now += waiting.REST_SECONDS
    assert queue.put(partial(table.write, 50))
    assert table.transactions == 2
    assert table.held == list(range(51))


def test_what_has_waited_is_written_in_its_order_a_part_at_a_time(clock: Clock) -> None:
    table = Table(clock)
    queue = Waiting(table.together)
    table.locked = True
    count = 3 * waiting.AT_ONCE
    for number in range(count):
        queue.put(partial(table.write, number))
    table.locked = False
    clock.now += waiting.REST_SECONDS
    assert not queue.put(partial(table.write, count))
    assert table.held == list(range(waiting.AT_ONCE))
    queue.finish(1.0)
    assert table.held == list(range(count + 1))


def test_what_can_never_be_written_takes_nothing_with_it_that_waits_beside_it(clock: Clock) -> None:
    table = Table(clock)
    queue = Waiting(table.together)
    table.locked = True
    for number in (1, 2, -1, 3):
        queue.put(partial(table.write, number))
    table.locked = False
    queue.finish(1.0)
    assert table.held == [1, 2, 3]


def test_rows_that_are_written_together_are_there_all_or_not_at_all(tmp_path: Path) -> None:
    def row(edit: int) -> EditRow:
        readings = {("update.norm", f"layer {edit}"): np.array([float(edit)])}
        return EditRow(edit, "", "applied" if edit else "start", 0.0, 1.0, 0.0, 0.0, None, readings)

    writer = RunWriter(tmp_path / "run", {}, [])
    writer.append(row(0))
    with pytest.raises(ZeroDivisionError), writer.together():
        writer.append(row(1))
        writer.set_manifest({"more": True})
        raise ZeroDivisionError
    assert acknowledged(writer.path) == 0
    assert "more" not in sl.load(tmp_path / "run").manifest
    with writer.together():
        writer.append(row(1))
        writer.append(row(2))
        assert acknowledged(writer.path) == 0
    assert acknowledged(writer.path) == 2
    writer.append(row(3))
    run = sl.load(tmp_path / "run")
    assert [dict(edit.row.readings) for edit in run.edits] == [row(edit).readings for edit in range(4)]


@pytest.mark.parametrize("wal", [True, False])
def test_close_waits_for_a_reader_no_longer_than_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wal: bool
) -> None:
    monkeypatch.setattr(store, "wal_works", lambda folder: wal)
    monkeypatch.setattr(recording, "PATIENCE_SECONDS", 0.2)
    loop = Loop(tmp_path / "run")
    loop.edit(2)
    with closing(sqlite3.connect(tmp_path / "run" / FILE_NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM edit").fetchone()
        began = time.perf_counter()
        loop.monitor.close()
        assert time.perf_counter() - began < 2.0
    assert len(sl.load(tmp_path / "run").edits) == 3
    assert sl.load(tmp_path / "run").complete is wal
