"""What changed in a run file after it was written is left out and named, or refused; what is sound is read."""

from __future__ import annotations

import random
import sqlite3
import struct
import tempfile
from contextlib import closing
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitylab.commands.options import EXIT_UNWATCHED
from stabilitylab.errors import RunError
from stabilitylab.record.damage import Gap
from stabilitylab.record.following import Follower
from stabilitylab.record.note_kinds import DAMAGED, DAMAGED_ENTRY
from stabilitylab.record.readings import Alarm, EditRow, Metric, Note
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import FILE_NAME, RunWriter
from stabilitylab.record.tables import EDIT, NOTE, OUTCOME, TABLES
from tests.command_line import run_cli

NORM = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
LAST = 9


def row(edit: int, site: str = "a", label: str = "", seconds: float = 0.5, error: str | None = None) -> EditRow:
    readings = {("update.norm", site): np.array([1.0 + edit])}
    return EditRow(edit, label, "applied" if edit else "start", 1.0, seconds, 0.1, 0.2, error, readings)


def writer(folder: Path) -> RunWriter:
    return RunWriter(folder, {"sites": ["a", "b"], "config": {"rate": 0.5}}, [NORM])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Edits 0 to 9, the last two in a layout of their own, with dry edits and a record of everything else."""
    held = writer(tmp_path / "run")
    held.append(row(0))
    held.append_dry([row(1), row(2)])
    for edit in range(1, LAST + 1):
        held.append(row(edit, "b" if edit > 7 else "a", f"edit {edit}"))
        held.outcome(edit, "committed")
        held.note(Note(edit, "kind", f"note {edit}"))
    held.alarm(Alarm(3, "diverging", "update.norm", "a", "says"))
    held.set_manifest({"closed": True})
    held.close()
    return tmp_path / "run"


def change(run: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(run / FILE_NAME)) as db, db:
        db.execute(statement, values)


def looked_at(run: Path) -> Run:
    """As it is loaded, which is as it is followed."""
    found, follower = load(run), Follower(run, keeps_rows=True)
    follower.look()
    assert follower.run.notes == found.notes
    assert follower.run.manifest == found.manifest == follower.manifest
    assert [edit.edit for edit in follower.run.edits] == [edit.edit for edit in found.edits]
    assert follower.diagnosis() == found.diagnosis()
    assert follower.complete == found.complete
    return found


def lacks(run: Run) -> list[str]:
    """What it says it lacks."""
    assert not run.complete
    says = [note.says for note in run.notes if note.kind == DAMAGED]
    assert all(each in run.diagnosis().says for each in says[:1])
    return [each.replace(" of the run file changed after it was written", "") for each in says]


@pytest.mark.parametrize(
    ("statement", "gone", "says"),
    [
        ("UPDATE edit SET data = x'0000000000000000' WHERE edit = 2", {2}, "edit 2 can't be read any more: its record"),
        ("UPDATE edit SET present = x'00' WHERE edit = 2", {2}, "edit 2 can't be read any more: its record"),
        ("UPDATE edit SET label = 'edit 3' WHERE edit = 2", {2}, "edit 2 can't be read any more: its record"),
        ("UPDATE edit SET error = '' WHERE edit = 2", {2}, "edit 2 can't be read any more: its record"),
        ("UPDATE edit SET seconds = NULL WHERE edit = 2", None, ""),
        ("UPDATE edit SET edit = 55 WHERE edit = 2", {2}, "edit 2 can't be read any more: its record"),
        ("UPDATE edit SET edit = -5 WHERE edit = 0", {0}, "edit 0 can't be read any more: its record"),
        ("UPDATE edit SET layout = 2 WHERE edit = 2", {2}, "edit 2 can't be read any more: its record"),
        ("UPDATE edit SET crc = crc + 1 WHERE edit < 2", {0, 1}, "edits 0 to 1 can't be read any more: their records"),
        ("DELETE FROM edit WHERE edit IN (4, 5, 6)", {4, 5, 6}, "edits 4 to 6 can't be read any more: their records"),
        ("DELETE FROM edit WHERE edit = 9", {9}, "the last edit, after edit 8, can't be read any more: its record"),
        ("UPDATE edit SET crc = 0 WHERE edit > 7", {8, 9}, "the last 2 edits, after edit 7, can't be read any more:"),
        ("UPDATE layout SET entries = replace(entries, 'b', '')", {8, 9}, "edits 8 to 9 can't be read any more: "),
        ("DELETE FROM layout WHERE id = 2", {8, 9}, "edits 8 to 9 can't be read any more: "),
        ("UPDATE dry SET status = 'failed' WHERE edit = 1", set(), "dry edit 1 can't be read any more: its record"),
        ("UPDATE note SET says = 'x' WHERE edit = 4", set(), "1 note can't be read any more: its record"),
        ("UPDATE note SET says = x'ff' WHERE edit < 4", set(), "3 notes can't be read any more: their records"),
        ("DELETE FROM note", set(), "9 notes can't be read any more: their records"),
        ("UPDATE outcome SET outcome = 'restored' WHERE edit = 4", set(), "1 outcome can't be read any more: its"),
        ("UPDATE alarm SET edit = 4", set(), "1 alarm can't be read any more: its record"),
    ],
)  # fmt: skip
def test_what_is_of_one_edit_is_left_out_and_named(run: Path, statement: str, gone: set[int] | None, says: str) -> None:
    if gone is None:
        with pytest.raises(sqlite3.IntegrityError):
            change(run, statement)
        return
    sound = load(run)
    change(run, statement)
    found = looked_at(run)
    (said,) = lacks(found)
    assert said.startswith(says)
    assert [edit.edit for edit in found.edits] == [each for each in range(LAST + 1) if each not in gone]
    assert all(edit.row == sound.edits[edit.edit].row for edit in found.edits)
    assert found.manifest[DAMAGED_ENTRY] >= 1
    assert set(found.alarms) <= set(sound.alarms)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE manifest SET value = replace(value, '0.5', '0.7')", "an entry of the manifest is not as it was"),
        ("DELETE FROM manifest WHERE key = 'config'", "its table 'manifest' holds 2 of 3 records"),
        ("DELETE FROM manifest WHERE key = 'records'", "the manifest lacks an entry"),
        ("UPDATE metric SET scale = 'linear'", "the description of a metric is not as it was written"),
        ("DELETE FROM metric", "its table 'metric' holds 0 of 1 records"),
        ("UPDATE layout SET id = id + 5", "edits 0 to 7 can't be read any more: layout 1"),
        ("UPDATE edit SET trace_seconds = 1", "the last 10 edits can't be read any more"),
        ("ALTER TABLE edit DROP COLUMN crc", "crc"),
        ("DROP TABLE note", "note"),
        ("PRAGMA user_version = 0", "the number of its schema is not as it was written"),
    ],
)  # fmt: skip
def test_what_is_of_the_whole_run_refuses_it_in_one_line(run: Path, statement: str, says: str) -> None:
    change(run, statement)
    for read in (load, lambda path: Follower(path).look()):
        with pytest.raises(RunError, match=r"^[^\n]* is damaged: [^\n]*$") as raised:
            read(run)
        assert says in str(raised.value)


def test_records_that_changed_places_are_not_taken_for_each_other(run: Path) -> None:
    with closing(sqlite3.connect(run / FILE_NAME)) as db, db:
        for old, new in ((3, -3), (4, 3), (-3, 4)):
            db.execute("UPDATE edit SET edit = ? WHERE edit = ?", (new, old))
        db.execute("DELETE FROM edit WHERE edit = 6")
        columns = ", ".join((*EDIT.columns[1:], "crc"))
        db.execute(f"INSERT INTO edit SELECT 6, {columns} FROM edit WHERE edit = 7")
        db.execute(f"INSERT INTO dry SELECT 3, {columns} FROM edit WHERE edit = 2")
    found = looked_at(run)
    assert [edit.edit for edit in found.edits] == [0, 1, 2, 5, 7, 8, 9]
    assert [row.edit for row in found.dry_edits] == [1, 2]
    assert [each.split(" can't")[0] for each in lacks(found)] == [
        "edits 3 to 4",
        "edit 6",
        "the last dry edit, after dry edit 2,",
    ]


def test_a_check_names_the_edit_and_is_no_clean_verdict(run: Path) -> None:
    change(run, "UPDATE edit SET label = x'ff' WHERE edit = 5")
    done = run_cli("check", run)
    assert done.returncode == EXIT_UNWATCHED
    assert "edit 5 can't be read any more" in " ".join(done.stdout.split())


def test_a_bit_that_flips_anywhere_gives_no_wrong_value(run: Path) -> None:
    sound, whole, draw = load(run), (run / FILE_NAME).read_bytes(), random.Random(0)
    rows = {edit.edit: (edit.row, edit.outcome) for edit in sound.edits}
    named = 0
    used = [at for at, byte in enumerate(whole) if byte and at >= 100]
    for at in draw.sample(used, 400):
        flipped = whole[at] ^ (1 << draw.randrange(8))
        (run / FILE_NAME).write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        try:
            found = load(run)
        except RunError:
            continue
        if found.complete:
            assert {edit.edit: (edit.row, edit.outcome) for edit in found.edits} == rows
            assert (found.notes, found.alarms, found.dry_edits) == (sound.notes, sound.alarms, sound.dry_edits)
        else:
            named += 1
            assert lacks(found)
            assert all(edit.row == rows[edit.edit][0] for edit in found.edits)
            assert set(found.alarms) <= set(sound.alarms)
        assert found.metrics == sound.metrics
    assert named > 50


def test_a_run_is_followed_past_a_row_that_was_damaged_while_it_goes_on(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    for edit in range(5):
        held.append(row(edit))
    follower = Follower(tmp_path / "run", keeps_rows=True)
    assert len(follower.look()) == 5
    held.append(row(5))
    held._connection.execute("UPDATE edit SET crc = 0 WHERE edit = 5")
    held._connection.commit()
    assert follower.look() == []
    assert follower.run.notes == load(tmp_path / "run").notes
    held.append(row(6))
    assert [seen.row.edit for seen in follower.look()] == [6]
    assert [note.says.split(" can't")[0] for note in follower.run.notes] == ["edit 5"]
    assert follower.run.notes == load(tmp_path / "run").notes
    assert follower.diagnosis() == load(tmp_path / "run").diagnosis()
    held.close()


def test_edits_that_were_never_recorded_are_no_damage(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    for edit in (0, 1, 4, 5, 9):
        held.append(row(edit))
    held.set_manifest({"closed": True})
    held.close()
    found = looked_at(tmp_path / "run")
    assert found.complete
    assert found.notes == ()
    change(tmp_path / "run", "DELETE FROM edit WHERE edit = 5")
    assert lacks(looked_at(tmp_path / "run")) == ["1 of the edits 5 to 8 can't be read any more: its record"]


def test_what_was_rolled_back_leaves_no_gap(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    held.append(row(0))
    held.note(Note(0, "kind", "first"))
    with pytest.raises(ZeroDivisionError), held.together():
        held.append(row(1, "b"))
        held.note(Note(1, "kind", "undone"))
        raise ZeroDivisionError
    with pytest.raises(sqlite3.IntegrityError):
        held.append(row(0))
    held._connection.execute("BEGIN")
    with pytest.raises(KeyboardInterrupt), held._transaction() as db:
        db.commit()  # an interrupt between the commit and the end of the call
        raise KeyboardInterrupt
    held.append(row(1, "b"))
    held.note(Note(1, "kind", "second"))
    held.set_manifest({"closed": True})
    held.close()
    found = looked_at(tmp_path / "run")
    assert found.complete
    assert [edit.edit for edit in found.edits] == [0, 1]
    assert [note.says for note in found.notes] == ["first", "second"]


texts = st.text(max_size=20) | st.sampled_from(["", "\0", "a\0b", "\ud800", "é", "\1"])
seconds = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 5e-324, 1e300, 1 << 40])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts | st.none(), seconds), min_size=1, max_size=4))
def test_whatever_is_written_is_sound(given_rows: list[tuple[str, str | None, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        held = writer(Path(folder) / "run")
        for edit, (label, error, took) in enumerate(given_rows):
            held.append(row(edit, label=label, error=error, seconds=took))
            held.note(Note(edit, label, error or ""))
        held.set_manifest({"closed": True})
        held.close()
        found = load(Path(folder) / "run")
    assert found.complete
    assert len(found.edits) == len(found.notes) == len(given_rows)


def test_a_checksum_is_of_all_that_a_record_holds_and_of_its_table() -> None:
    record = (1, 4, "kind", "says")
    assert NOTE.is_sound(NOTE.signed(record))
    for other in ((2, 4, "kind", "says"), (1, 5, "kind", "says"), (1, 4, "kin", "dsays"), (1, 4, "kind", None)):
        assert not NOTE.is_sound((*other, NOTE.checksum(record)))
    for wrong in ((1, 4, "kind", 5), (1, 4, b"kind", "says"), (1, 4.0, "kind", "says"), (1, 1 << 64, "kind", "says")):
        assert NOTE.checksum(wrong) is None
        assert not NOTE.is_sound((*wrong, None))
        with pytest.raises(sqlite3.IntegrityError, match="can't hold"):
            NOTE.signed(wrong)
    assert OUTCOME.checksum((1, 4, "kind", 0.5)) != OUTCOME.checksum((1, 4, "kind", 0.25))
    assert len({table.checksum((1, 4, "a", "b")) for table in TABLES if len(table.columns) == 4}) > 1


def test_the_checksum_of_a_record_stays_what_it_is() -> None:
    """It is in files: another one would call them damaged."""
    record = (3, 4, "é", "applied", 1.7e9, 0.5, 0.25, 0.125, 0.0, None, 1, b"\x80", b"\0" * 8)
    numbers = struct.pack("<qqdddddqqq", 3, 4, 1.7e9, 0.5, 0.25, 0.125, 0.0, 1, 1, 8)
    assert EDIT.checksum(record) == crc32(b"edit" + numbers + "é\0applied\0\1".encode() + b"\x80" + b"\0" * 8)
    assert NOTE.checksum((7, 3, "kind", "says")) == crc32(b"note" + struct.pack("<qq", 7, 3) + b"kind\0says")


@pytest.mark.parametrize(
    ("gap", "says"),
    [
        (Gap("edit", 3, 5, 1), "edit 4 can't be read any more: its record"),
        (Gap("edit", 3, 7, 3), "edits 4 to 6 can't be read any more: their records"),
        (Gap("edit", 3, 9, 2), "2 of the edits 4 to 8 can't be read"),
        (Gap("edit", 3, None, 1), "the last edit, after edit 3, can't be read any more: its record"),
        (Gap("edit", 3, None, 2), "the last 2 edits, after edit 3, can't be read any more: their records"),
        (Gap("edit", 3, 5, 1, layout=7), "edit 4 can't be read any more: layout 7"),
    ],
)
def test_which_rows_are_gone_is_told_by_those_beside_them(gap: Gap, says: str) -> None:
    assert gap.says.startswith(says)
