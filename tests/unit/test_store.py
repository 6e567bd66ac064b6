"""The run file: everything that was acknowledged comes back, bit for bit."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab import store
from stabilitylab.errors import RunError
from stabilitylab.readings import Alarm, EditRow, Metric, Note
from stabilitylab.run import load
from stabilitylab.store import FILE_NAME, RunWriter, _pack, unpack

NORM = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
SPECTRUM = Metric("gradient.spectrum", "1", "log", "during", "spectrum", "σ", "—", 4)


def row(edit: int, readings: dict, label: str = "", status: str = "applied", error: str | None = None) -> EditRow:
    arrays = {key: np.atleast_1d(np.asarray(value, dtype=np.float64)) for key, value in readings.items()}
    return EditRow(edit, label, status, 1.0, 0.5, 0.1, 0.2, error, arrays)


def writer(folder: Path) -> RunWriter:
    return RunWriter(folder, {"sites": ["a", "b"]}, [NORM, SPECTRUM])


any_float = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True, width=64)


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(any_float, min_size=1, max_size=4), max_size=6))
def test_values_come_back_bit_for_bit_and_absent_ones_stay_absent(values: dict[str, list[float]]) -> None:
    layout = tuple(("m", site, 4) for site in "abcdef")
    readings = {("m", site): np.array(numbers) for site, numbers in values.items()}
    found = unpack(*_pack(readings, layout), layout)
    assert {key: value.tobytes() for key, value in found.items()} == {
        key: value.tobytes() for key, value in readings.items()
    }


def test_round_trip_through_the_file(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    run.append(row(0, {("update.norm", "a"): 0.0}, status="start"))
    run.append(row(1, {("update.norm", "a"): np.nan, ("gradient.spectrum", "a"): [3.0, np.inf]}, label="Paris"))
    run.append(row(2, {("update.norm", "b"): -0.0}, status="failed", error="ValueError: no"))
    run.outcome(1, "committed")
    run.alarm(Alarm(1, "non-finite", "update.norm", "a", "NaN"))
    run.note(Note(2, "skipped-site", "c: quantised"))
    run.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]

    found = load(tmp_path / "run")
    assert [(edit.edit, edit.label, edit.status, edit.outcome) for edit in found.edits] == [
        (0, "", "start", None),
        (1, "Paris", "applied", "committed"),
        (2, "", "failed", None),
    ]
    assert found.edits[2].row.error == "ValueError: no"
    np.testing.assert_array_equal(found.series("update.norm", "a"), [0.0, np.nan, np.nan])
    np.testing.assert_array_equal(found.present("update.norm", "a"), [True, True, False])
    np.testing.assert_array_equal(found.series("gradient.spectrum")[1], [3.0, np.inf, np.nan, np.nan])
    assert np.signbit(found.edits[2].row.readings[("update.norm", "b")][0])
    assert found.alarms[0].verdict == "non-finite"
    assert found.notes[0].says == "c: quantised"
    assert found.metrics == (NORM, SPECTRUM)


def test_a_layout_is_shared_until_something_new_is_read(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    for edit in range(5):
        run.append(row(edit, {("update.norm", "a"): edit}))
    run.append(row(5, {("update.norm", "late"): 1.0}))
    run.append(row(6, {("update.norm", "a"): 6.0}))
    run.append(row(7, {("gradient.spectrum", "a"): range(9)}))
    run.close()
    with sqlite3.connect(tmp_path / "run" / FILE_NAME) as db:
        assert db.execute("SELECT count(*) FROM layout").fetchone() == (3,)
    found = load(tmp_path / "run")
    np.testing.assert_array_equal(found.series("update.norm", "a"), [0, 1, 2, 3, 4, np.nan, 6, np.nan])
    np.testing.assert_array_equal(found.series("gradient.spectrum")[7], range(9))


def test_a_killed_writer_leaves_every_acknowledged_row(tmp_path: Path) -> None:
    code = f"""
        import numpy as np, sys
        from pathlib import Path
        from stabilitylab.store import RunWriter
        from stabilitylab.readings import EditRow, Metric
        run = RunWriter(Path({str(tmp_path / "run")!r}), {{}}, [Metric("m", "1", "log", "after", "", "", "")])
        edit = 0
        while True:
            values = {{("m", "a"): np.array([float(edit)])}}
            run.append(EditRow(edit, "", "applied", 0.0, 0.0, 0.0, 0.0, None, values))
            print(edit, flush=True)
            edit += 1
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = [int(next(process.stdout)) for _ in range(50)][-1]
        live = load(tmp_path / "run")  # read while it is being written
        assert len(live.edits) >= last
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = [int(line) for line in process.stdout.read().split()]
    found = load(tmp_path / "run")
    assert not found.complete
    np.testing.assert_array_equal(found.series("m"), np.arange(len(found.edits)))
    assert len(found.edits) >= max([last, *acknowledged]) + 1


def test_an_unwritable_folder_with_a_log_is_read_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = writer(tmp_path / "run")
    run.append(row(1, {("update.norm", "a"): 1.0}))  # not closed: the row is in the log only
    opened = []
    original = sqlite3.connect

    class Refused(sqlite3.Connection):
        def execute(self, *_: object) -> sqlite3.Cursor:  # as a folder without write permission answers
            raise sqlite3.OperationalError("unable to open database file")

    def connect(target: str, *args: object, **kwargs: object) -> sqlite3.Connection:
        opened.append(target)
        factory = Refused if len(opened) == 1 else sqlite3.Connection
        return original(target, *args, factory=factory, **kwargs)

    monkeypatch.setattr("stabilitylab.run.sqlite3.connect", connect)
    assert load(tmp_path / "run").series("update.norm").tolist() == [1.0]
    assert len(opened) == 2
    assert str(tmp_path) not in opened[1]
    run.close()


def test_without_write_ahead_logging_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_wal_works", lambda folder: False)
    run = writer(tmp_path / "run")
    run.append(row(1, {("update.norm", "a"): 1.0}))
    assert load(tmp_path / "run").series("update.norm").tolist() == [1.0]
    run.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_what_is_there_already_is_never_overwritten(tmp_path: Path, occupied: str) -> None:
    target = tmp_path / "run"
    if occupied == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(RunError, match=r"exists; expected a new one, such as .*run-2"):
        writer(target)
    assert (target / "notes.txt" if occupied == "folder" else target).read_text() == "mine"
    if occupied == "folder":
        assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_labels_that_sqlite_can_not_hold_are_spelled_out(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    run.append(row(1, {}, label="a\ud800b\x00c"))
    run.append(row(2, {}, label="x" * 1_000_000))
    run.close()
    labels = [edit.label for edit in load(tmp_path / "run").edits]
    assert labels[0] == "a\\ud800b\x00c"
    assert len(labels[1]) == store.LABEL_LIMIT
    assert labels[1].endswith("…")
