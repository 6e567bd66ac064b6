"""Opening what someone else may have written: which files are read, how far, and what is said of the others."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from stabilitylab.errors import RunError
from stabilitylab.record import plain_files, reading, runfile
from stabilitylab.record.damage import Damage
from stabilitylab.record.plain_files import expect_few_parts, read_json, read_text
from stabilitylab.record.reading import read_layouts, read_metrics
from stabilitylab.record.runfile import connect, damaged, find_file, find_runs
from stabilitylab.record.store import APPLICATION_ID, FILE_NAME, SCHEMA_VERSION, RunWriter


def run(folder: Path) -> Path:
    RunWriter(folder, {}, ()).close()
    return folder


def test_a_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("é" * 8)
    assert read_text(file, 16) == "é" * 8
    with pytest.raises(ValueError, match=r"^it is larger than 0 MiB$"):
        read_text(file, 15)
    assert plain_files.MOST_BYTES == 16 << 20
    with pytest.raises(ValueError, match=r"^it is larger than 2 MiB$"):
        read_text(_of_size(tmp_path / "b", (2 << 20) + 1), 2 << 20)
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"^not UTF-8 at byte 2$"):
        read_text(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^it is no file$"):
        read_text(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "missing")


def _of_size(file: Path, size: int) -> Path:
    with file.open("wb") as held:
        held.truncate(size)
    return file


def test_json_is_read_or_said_to_be_none(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, NaN]}')
    assert read_json(file)["a"][0] == 1
    file.write_text('{"a":\n  ]}')
    with pytest.raises(ValueError, match=r"^not JSON \(line 2, column 3: "):
        read_json(file)
    file.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"nested too deeply"):
        read_json(file)


def test_how_many_values_a_text_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_files, "MOST_PARTS", 4)
    expect_few_parts('{"a": [1, 2, 3]}')
    with pytest.raises(ValueError, match="more than 4 values"):
        expect_few_parts('{"a": [1, 2, 3, 4]}')


def test_the_runs_of_a_folder_are_named(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"run-{number}") for number in range(7)]
    assert find_runs(tmp_path) == runs
    assert find_file(runs[0]) == find_file(runs[0] / FILE_NAME) == runs[0] / FILE_NAME
    assert find_runs(tmp_path / "missing") == []
    with pytest.raises(RunError) as raised:
        find_file(tmp_path)
    assert str(raised.value).endswith(f"expected one of them: {', '.join(map(str, runs[:5]))}")
    with pytest.raises(RunError) as raised:
        find_file(tmp_path / "zzz")
    said, _, beside = str(raised.value).partition("; runs beside it: ")
    assert said.endswith("does not exist; expected a run folder")
    assert set(beside.split(", ")) < {repr(str(each)) for each in runs}
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=f"holds no {FILE_NAME}; expected a run folder"):
        find_file(tmp_path / "empty")
    with pytest.raises(RunError, match=r"^'[^']*' does not exist; expected a run folder$"):
        find_file(tmp_path / "empty" / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="is no file; expected a run folder"):
        find_file(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("CREATE VIEW v AS SELECT 1", "it holds a view, 'v'; expected tables alone"),
        ("CREATE INDEX i ON note (edit)", "it holds a index, 'i'; expected tables alone"),
        ("CREATE TRIGGER t AFTER INSERT ON note BEGIN SELECT 1; END", "it holds a trigger, 't'"),
        ("CREATE VIRTUAL TABLE f USING fts5(a)", "it holds a table that is not plain, 'f'"),
        ("CREATE TABLE g (a, b AS (a + 1))", "table 'g' has columns that are computed"),
    ],
)
def test_nothing_in_a_file_may_compute(tmp_path: Path, statement: str, says: str) -> None:
    file = run(tmp_path / "run") / FILE_NAME
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(statement)
    with pytest.raises(RunError) as raised, connect(file):
        pass
    assert f"is damaged: {says}" in str(raised.value)


def test_a_table_more_and_what_sqlite_makes_by_itself_are_harmless(tmp_path: Path) -> None:
    file = run(tmp_path / "run") / FILE_NAME
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("CREATE TABLE more (a UNIQUE)")
    with connect(file) as db:
        assert db.execute("SELECT count(*) FROM more").fetchone() == (0,)


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_what_lies_beside_it_is_a_file(tmp_path: Path, ending: str) -> None:
    file = run(tmp_path / "run") / FILE_NAME
    os.mkfifo(file.with_name(FILE_NAME + ending))
    with pytest.raises(RunError, match=f"{ending}' is no file"), connect(file):
        pass


@pytest.mark.parametrize(("version", "read"), [(0, True), (SCHEMA_VERSION, True), (SCHEMA_VERSION + 1, False)])
def test_older_files_are_read_and_newer_ones_are_not(tmp_path: Path, version: int, read: bool) -> None:
    file = run(tmp_path / "run") / FILE_NAME
    with closing(sqlite3.connect(file)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    if read:
        with connect(file):
            return
    with pytest.raises(RunError, match=f"has run schema {version}, .* up to {SCHEMA_VERSION}; upgrade"), connect(file):
        pass


def test_another_programs_database_is_no_run(tmp_path: Path) -> None:
    file = run(tmp_path / "run") / FILE_NAME
    with closing(sqlite3.connect(file)) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID - 1}")
    with pytest.raises(RunError, match="a database but not a run file"), connect(file):
        pass


def test_what_is_said_of_damage_is_cut(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    assert str(damaged(file, ValueError("x" * 300))) == f"'{file}' is damaged: {'x' * 300}"
    assert str(damaged(file, ValueError("x" * 301))) == f"'{file}' is damaged: {'x' * 299}…"


def test_a_file_can_not_be_changed_through_it(tmp_path: Path) -> None:
    file = run(tmp_path / "run") / FILE_NAME
    with connect(file) as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("CREATE TABLE x (a)")


def test_what_would_run_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runfile, "STEPS", 3)
    file = run(tmp_path / "run") / FILE_NAME
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 10000000) SELECT max(x) FROM c"
    with connect(file) as db, pytest.raises(sqlite3.OperationalError, match="interrupted"):
        db.execute(endless).fetchone()


def test_a_killed_writers_journal_is_rolled_back_in_a_copy(tmp_path: Path) -> None:
    """A hot journal can't be read past in place, and the file itself must stay as it is."""
    file = run(tmp_path / "run") / FILE_NAME
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("INSERT INTO note (edit, kind, says, crc) VALUES (1, 'a', 'kept', 0)")
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN IMMEDIATE")
        for _ in range(200):
            db.execute("INSERT INTO note (edit, kind, says, crc) VALUES (2, 'b', ?, 0)", ("x" * 4_000,))
        torn = tmp_path / "torn"
        torn.mkdir()
        for ending in ("", "-journal"):
            (torn / (FILE_NAME + ending)).write_bytes(file.with_name(FILE_NAME + ending).read_bytes())
    before = {each.name: each.read_bytes() for each in torn.iterdir()}
    with connect(torn / FILE_NAME) as db:
        assert db.execute("SELECT says FROM note").fetchall() == [("kept",)]
    assert {each.name: each.read_bytes() for each in torn.iterdir()} == before


def of_table(table: str, columns: str, *rows: tuple[object, ...]) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute(f"CREATE TABLE {table} ({columns})")
    for each in rows:
        db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(each))})", each)
    return db


@pytest.mark.parametrize(
    ("length", "read"),
    [("1", True), (str((1 << 31) - 1), True), (str(1 << 31), False), ("0", False), ("-1", False), ("1.5", False)],
)
def test_how_long_a_reading_of_a_layout_may_be(length: str, read: bool) -> None:
    with closing(of_table("layout", "id, entries", (7, f'[["update.norm", "fc1", {length}]]'))) as db:
        if read:
            assert read_layouts(db) == {7: (("update.norm", "fc1", int(length)),)}
            return
        with pytest.raises(ValueError, match="a layout has a reading of "):
            read_layouts(db)


@pytest.mark.parametrize(("length", "read"), [(1, True), (1 << 16, True), ((1 << 16) + 1, False), (0, False)])
def test_how_many_values_a_metric_may_be_said_to_hold(length: int, read: bool) -> None:
    described = ("m.x", "1", "log", "after", "meaning", "formula", "source", length)
    columns = "name, unit, scale, phase, meaning, formula, source, length"
    with closing(of_table("metric", columns, described)) as db:
        if read:
            assert [metric.length for metric in read_metrics(db, Damage({}))] == [length]
            return
        with pytest.raises(ValueError, match=f"metric 'm.x' is said to hold {length} values"):
            read_metrics(db, Damage({}))


def test_of_several_outcomes_the_last_counts_and_notes_and_alarms_are_in_their_order() -> None:
    rows = [(2, 1, "restored", 0.0), (1, 1, "committed", 0.0), (3, 4, "rolled_back", 0.0)]
    columns = "id, edit, outcome, observed_at"
    with closing(of_table("outcome", columns, *rows)) as db:
        assert dict(reading.outcomes().read(db, Damage({}))) == {1: "restored", 4: "rolled_back"}
    with (
        closing(of_table("outcome", columns, (1, 1, "lost", 0.0))) as db,
        pytest.raises(ValueError, match="outcome"),
    ):
        reading.outcomes().read(db, Damage({}))
    with closing(of_table("note", "id, edit, kind, says", (2, 1, "b", "y"), (1, 9, "a", "x"))) as db:
        assert [note.kind for note in reading.notes().read(db, Damage({}))] == ["a", "b"]
