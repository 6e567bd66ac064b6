"""The run file: everything that was acknowledged comes back, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitylab.errors import RunError
from stabilitylab.record import runfile, store
from stabilitylab.record.packing import pack, unpack
from stabilitylab.record.readings import Alarm, EditRow, Metric, Note
from stabilitylab.record.run import load
from stabilitylab.record.store import FILE_NAME, RunWriter

NORM = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
SPECTRUM = Metric("gradient.spectrum", "1", "log", "during", "spectrum", "σ", "—", 4)


def row(edit: int, readings: dict, label: str = "", status: str = "applied", error: str | None = None) -> EditRow:
    arrays = {key: np.atleast_1d(np.asarray(value, dtype=np.float64)) for key, value in readings.items()}
    return EditRow(edit, label, status, 1.0, 0.5, 0.1, 0.2, error, arrays)


def writer(folder: Path) -> RunWriter:
    return RunWriter(folder, {"sites": ["a", "b"]}, [NORM, SPECTRUM])


# Any bit pattern: every NaN with its payload, both infinities and zeros, subnormals.
any_bits = st.integers(0, 2**64 - 1).map(lambda bits: np.array([bits], dtype="<u8").view("<f8")[0])
any_float = any_bits | st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 5e-324, -5e-324])


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(any_float, min_size=1, max_size=4), max_size=6))
def test_values_come_back_bit_for_bit_and_absent_ones_stay_absent(values: dict[str, list[float]]) -> None:
    layout = tuple(("m", site, 4) for site in "abcdef")
    readings = {("m", site): np.array(numbers) for site, numbers in values.items()}
    found = unpack(*pack(readings, layout), layout)
    assert {key: value.tobytes() for key, value in found.items()} == {
        key: value.tobytes() for key, value in readings.items()
    }


@settings(max_examples=15)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.lists(any_float, min_size=1, max_size=4)), max_size=4))
def test_bits_survive_the_file_and_its_growing_layouts(edits: list[dict[str, list[float]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = writer(Path(folder) / "run")
        rows = [row(edit, {("m", site): values for site, values in found.items()}) for edit, found in enumerate(edits)]
        for each in rows:
            run.append(each)
        run.close()
        found = load(Path(folder) / "run").edits
    for wrote, read in zip(rows, found, strict=True):
        assert {key: value.tobytes() for key, value in read.row.readings.items()} == {
            key: value.tobytes() for key, value in wrote.readings.items()
        }


def test_a_row_that_is_refused_takes_its_new_layout_with_it(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    run.append(row(1, {("update.norm", "a"): 1.0}))
    with pytest.raises(sqlite3.IntegrityError):
        run.append(row(1, {("update.norm", "b"): 7.0}))
    run.append(row(2, {("update.norm", "b"): 2.0}))
    run.close()
    np.testing.assert_array_equal(load(tmp_path / "run").series("update.norm", "b"), [np.nan, 2.0])


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
    with closing(sqlite3.connect(tmp_path / "run" / FILE_NAME)) as db, db:
        assert db.execute("SELECT count(*) FROM layout").fetchone() == (3,)
    found = load(tmp_path / "run")
    np.testing.assert_array_equal(found.series("update.norm", "a"), [0, 1, 2, 3, 4, np.nan, 6, np.nan])
    np.testing.assert_array_equal(found.series("gradient.spectrum")[7], range(9))


@pytest.mark.parametrize("wal", [True, False])
def test_a_killed_writer_leaves_every_acknowledged_row(tmp_path: Path, wal: bool) -> None:
    code = f"""
        import numpy as np, time
        from pathlib import Path
        from stabilitylab.record import store
        from stabilitylab.record.store import RunWriter
        store.wal_works = lambda folder: {wal}
        from stabilitylab.record.readings import EditRow, Metric
        run = RunWriter(Path({str(tmp_path / "run")!r}), {{}}, [Metric("m", "1", "log", "after", "", "", "")])
        edit = 0
        while True:
            values = {{("m", "a"): np.array([float(edit)])}}
            run.append(EditRow(edit, "", "applied", 0.0, 0.0, 0.0, 0.0, None, values))
            print(edit, flush=True)
            edit += 1
            time.sleep(0.005)  # an edit takes time: without it, a file with no log is locked nearly always
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = [int(next(process.stdout)) for _ in range(50)][-1]
        for _ in range(10):  # read while it is being written: always whole, and never behind what was acknowledged
            live = load(tmp_path / "run")
            assert len(live.edits) > last
            np.testing.assert_array_equal(live.series("m"), np.arange(len(live.edits)))
            last = len(live.edits) - 1
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = [int(line) for line in process.stdout.read().split()]
    found = load(tmp_path / "run")
    assert not found.complete
    np.testing.assert_array_equal(found.series("m"), np.arange(len(found.edits)))
    assert len(found.edits) >= max([last, *acknowledged]) + 1


def test_a_transaction_that_was_cut_off_without_write_ahead_logging_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "wal_works", lambda folder: False)
    run = writer(tmp_path / "run")
    for edit in range(20):
        run.append(row(edit, {("update.norm", f"site {n}"): edit for n in range(200)}))
    run._db.execute("PRAGMA cache_size=2")  # so that pages reach the file before the commit
    run._db.execute("BEGIN")
    run._db.execute("UPDATE edit SET label = 'never committed', data = zeroblob(1600)")
    shutil.copytree(tmp_path / "run", tmp_path / "cut off")  # as kill -9 or a power cut leaves it
    run._db.rollback()
    run.close()
    assert (tmp_path / "cut off" / f"{FILE_NAME}-journal").stat().st_size > 0
    before = (tmp_path / "cut off" / FILE_NAME).read_bytes()
    assert b"never committed" in before
    found = load(tmp_path / "cut off")
    assert {edit.label for edit in found.edits} == {""}
    np.testing.assert_array_equal(found.series("update.norm", "site 3"), np.arange(20))
    assert (tmp_path / "cut off" / FILE_NAME).read_bytes() == before  # reading changes nothing


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX users and permissions")
def test_someone_who_may_only_read_the_folder_reads_what_is_in_the_log() -> None:
    """In a process that is not root, since root may write everywhere. pytest's own folders are closed to others."""
    code = """
        import os, sys
        from stabilitylab.errors import RunError
        from stabilitylab.record.run import load
        if os.getuid() == 0:
            os.setuid(65534)
        folder = sys.argv[1]
        try:
            open(folder + "/run/probe", "w")
        except PermissionError:
            print(load(folder + "/run").series("update.norm").tolist())
        try:
            load(folder + "/secret")
        except RunError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        run = writer(folder / "run")
        run.append(row(1, {("update.norm", "a"): 1.0}))  # in the log only
        shutil.copytree(folder / "run", folder / "copy")
        run.close()
        shutil.rmtree(folder / "run")
        (folder / "copy").rename(folder / "run")
        (folder / "run" / f"{FILE_NAME}-shm").unlink()
        (folder / "secret").mkdir()
        shutil.copy(folder / "run" / FILE_NAME, folder / "secret")
        (folder / "secret" / FILE_NAME).chmod(0)
        (folder / "run").chmod(0o555)
        command = [sys.executable, "-c", textwrap.dedent(code), name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / "run").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[1.0]"
    assert "can't read" in done.stdout.splitlines()[1]


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

    monkeypatch.setattr("stabilitylab.record.runfile.sqlite3.connect", connect)
    assert load(tmp_path / "run").series("update.norm").tolist() == [1.0]
    assert len(opened) == 2
    assert str(tmp_path) not in opened[1]
    run.close()


def test_a_copy_that_is_torn_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"first")
    (tmp_path / "copy").mkdir()
    copied: list[str] = []
    plain = shutil.copyfile

    def copyfile(source: Path, target: Path) -> None:
        plain(source, target)
        copied.append(source.name)
        if len(copied) < rewrites:
            source.write_bytes(b"x" * len(copied))  # the writer goes on

    monkeypatch.setattr("stabilitylab.record.runfile.shutil.copyfile", copyfile)
    rewrites = 3
    assert runfile._copy(tmp_path / FILE_NAME, tmp_path / "copy").read_bytes() == b"xx"
    copied.clear()
    rewrites = 1_000
    with pytest.raises(RunError, match="changes faster than it can be copied"):
        runfile._copy(tmp_path / FILE_NAME, tmp_path / "copy")


def test_a_run_that_another_program_has_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runfile, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(store, "wal_works", lambda folder: False)
    run = writer(tmp_path / "run")
    run._db.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match="is locked by another program"):
        load(tmp_path / "run")
    run._db.rollback()
    run.close()


def test_without_write_ahead_logging_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "wal_works", lambda folder: False)
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


def test_names_and_notes_that_sqlite_can_not_hold_are_spelled_out_and_their_readings_found(tmp_path: Path) -> None:
    lone = "lone \ud800"
    metric = Metric(lone, lone, "log", "after", lone, lone, lone)
    run = RunWriter(tmp_path / "run", {"sites": [lone]}, [metric])
    run.append(row(1, {(lone, lone): [2.0]}))
    run.note(Note(1, lone, lone))
    run.alarm(Alarm(1, "diverging", lone, lone, lone))
    run.close()
    found, spelled = load(tmp_path / "run"), "lone \\ud800"
    assert [each.name for each in found.metrics] == [spelled]
    assert found.edits[0].row.scalar(spelled, lone) == 2.0  # sites are JSON in the file, which holds any text
    assert found.sites_of(spelled) == (lone,)
    assert [(note.kind, note.says) for note in found.notes] == [(spelled, spelled)]
    assert [(alarm.metric, alarm.site, alarm.says) for alarm in found.alarms] == [(spelled, spelled, spelled)]


def test_dry_edits_have_a_table_and_numbers_of_their_own(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    run.append(row(0, {("update.norm", "a"): 0.0}, status="start"))
    dry = [row(edit, {("update.norm", "a"): edit, ("update.norm", "b"): np.nan}) for edit in (1, 2)]
    assert run.append_dry(dry) == len(dry)
    run.append(row(1, {("update.norm", "a"): 7.0}))
    run.close()
    found = load(tmp_path / "run")
    assert [each.edit for each in found.dry_edits] == [1, 2]
    assert found.dry_edits[1].scalar("update.norm", "a") == 2.0
    assert np.isnan(found.dry_edits[0].readings[("update.norm", "b")])
    assert ("update.norm", "b") not in found.edits[1].row.readings
    assert len(found) == 1
    np.testing.assert_array_equal(found.series("update.norm", "a"), [0.0, 7.0])


def test_dry_edits_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    with pytest.raises(sqlite3.IntegrityError):
        run.append_dry([row(1, {("update.norm", "a"): 1.0}), row(1, {("update.norm", "b"): 2.0})])
    run.append(row(1, {("update.norm", "b"): 2.0}))
    run.close()
    assert load(tmp_path / "run").dry_edits == ()
    np.testing.assert_array_equal(load(tmp_path / "run").series("update.norm", "b"), [2.0])


def test_a_reading_may_have_more_values_than_a_spectrum(tmp_path: Path) -> None:
    run = writer(tmp_path / "run")
    run.append(row(1, {("gradient.spectrum", "a"): range(1_000)}))
    run.close()
    np.testing.assert_array_equal(load(tmp_path / "run").series("gradient.spectrum")[0], range(1_000))
