"""A run file that anyone wrote: it is read, or called damaged in one line; it computes nothing, and nobody waits."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import sqlite3
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabilitylab.acting.scanning import archives
from stabilitylab.acting.scanning.archives import open_archive
from stabilitylab.acting.scanning.editors import scan_archive
from stabilitylab.acting.scanning.opening import load_pickle, open_folder, read_json
from stabilitylab.acting.scanning.places import of_hparams
from stabilitylab.analysis.thresholds import from_json, read, shipped, write
from stabilitylab.commands import check, cli
from stabilitylab.errors import RecordError, RunError, UsageError, nearest
from stabilitylab.record import plain_files, runfile
from stabilitylab.record.following import Follower
from stabilitylab.record.note_kinds import DAMAGED, DAMAGED_ENTRY
from stabilitylab.record.run import load
from stabilitylab.record.scanned import Scan, scan_from_json
from stabilitylab.record.store import FILE_NAME
from stabilitylab.record.tables import EDIT
from stabilitylab.reports.comparison import write_comparison
from stabilitylab.reports.html import write_pages, write_report
from stabilitylab.testbed.compare import expect_writable
from stabilitylab.testbed.records import load_records
from tests.sealing import seal
from tests.synthetic import make_run

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", edits=4, sites=1, dies_at=None)


def change(run: Path, *statements: str, values: Iterable[tuple[Any, ...]] = ((),)) -> None:
    with closing(sqlite3.connect(run / FILE_NAME)) as db, db:
        for statement in statements:
            db.executemany(statement, values)
    seal(run / FILE_NAME)  # whoever means it does that too


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE metric SET phase = ?", "sideways"),
        ("UPDATE metric SET length = ?", 100_000_000),
        ("UPDATE metric SET length = ?", 0),
        ("UPDATE metric SET unit = ?", b"\xff"),
        ("INSERT OR REPLACE INTO manifest VALUES ('config', ?, 0)", "[1]"),
        ("INSERT OR REPLACE INTO manifest VALUES ('sites', ?, 0)", "5"),
        ("INSERT OR REPLACE INTO manifest VALUES ('sites', ?, 0)", "[5]"),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?, 0)", DEEP),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?, 0)", '{"rate": NaN}'),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?, 0)", "1e999"),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?, 0)", "9" * 4_000),
        ("UPDATE layout SET entries = ?", DEEP),
        ("UPDATE layout SET entries = ?", "5"),
        ("UPDATE layout SET entries = ?", '[["update.norm", 5, 1]]'),
        ("UPDATE layout SET entries = ?", '[["update.norm", "a", 99999999999999999999]]'),
        ("UPDATE layout SET entries = ?", '[["update.norm", "a", -1]]'),
        ("UPDATE edit SET label = ?", b"bytes"),
        ("UPDATE edit SET status = ?", "\x1b[31mapplied"),
        ("UPDATE edit SET seconds = ?", "long"),
        ("UPDATE edit SET seconds = ?", float("inf")),
        ("UPDATE edit SET data = ?", "text"),
        ("UPDATE edit SET present = ?", 3),
        ("UPDATE edit SET layout = ?", 77),
        ("INSERT INTO outcome (edit, outcome, observed_at, crc) VALUES (1, ?, 0, 0)", "evaporated"),
        ("INSERT INTO operation (edit, says, crc) VALUES (1, ?, 0)", '{"edit": 1}'),
        ("INSERT INTO operation (edit, says, crc) VALUES (1, ?, 0)", DEEP),
    ],
)
def test_what_is_of_another_kind_is_called_damaged(run: Path, statement: str, value: object) -> None:
    change(run, statement, values=[(value,)])
    with pytest.raises(RunError, match="is damaged") as raised:
        load(run)
    assert len(str(raised.value)) < 400
    with pytest.raises(RunError, match="is damaged"):
        Follower(run, keeps_rows=True).look()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE edit SET data = 'text' WHERE edit = 2",
        "UPDATE edit SET seconds = 'long' WHERE edit = 2",
        "UPDATE edit SET label = x'00' WHERE edit = 2",
        "INSERT INTO note (edit, kind, says, crc) VALUES (1, 'x', x'00', 0)",
        "INSERT INTO alarm (edit, verdict, metric, site, says, crc) VALUES (1, 'x', x'00', '', '', 0)",
    ],
)
def test_what_no_checksum_can_be_of_is_left_out_and_said(run: Path, statement: str) -> None:
    sound = load(run)
    change(run, statement)
    follower = Follower(run, keeps_rows=True)
    follower.look()
    for found in (load(run), follower.run):
        assert found.manifest[DAMAGED_ENTRY] == 1
        assert [note.kind for note in found.notes if note not in sound.notes] == [DAMAGED]
        assert len(found.edits) == len(sound.edits) - ("UPDATE edit" in statement)
        assert found.alarms == sound.alarms


@pytest.mark.parametrize("byte", [b"\xff", b"["])
def test_a_schema_that_is_damaged_is_told_in_one_line(run: Path, byte: bytes) -> None:
    data = (run / FILE_NAME).read_bytes()
    at = data.index(b" TEXT", data.index(b"CREATE TABLE alarm"))
    (run / FILE_NAME).write_bytes(data[:at] + byte + data[at + 1 :])
    with pytest.raises(RunError, match=r"^[^\n]*is (damaged|not a run file)[^\n]*$"):
        load(run)


@pytest.mark.parametrize(
    "statements",
    [
        ["ALTER TABLE note RENAME TO old", "CREATE VIEW note AS SELECT * FROM old"],
        [
            "DROP TABLE note",
            "CREATE VIEW note AS WITH RECURSIVE n (edit) AS (SELECT 1 UNION ALL SELECT edit + 1 FROM n)"
            " SELECT edit AS id, edit, 'kind' AS kind, 'says' AS says FROM n",
        ],
        ["CREATE TRIGGER t AFTER INSERT ON note BEGIN DELETE FROM edit; END"],
        [
            "DROP TABLE note",
            "CREATE TABLE note (id INTEGER PRIMARY KEY, edit INTEGER, kind TEXT,"
            " says TEXT AS (hex(zeroblob(100000000))))",
            "INSERT INTO note (edit, kind) VALUES (1, 'x')",
        ],
    ],
)
def test_nothing_in_a_file_computes(run: Path, statements: list[str]) -> None:
    change(run, *statements)
    began = time.perf_counter()
    with pytest.raises(RunError, match="is damaged"):
        load(run)
    assert time.perf_counter() - began < 5.0


def test_a_file_of_very_many_rows_of_nothing_is_refused_and_one_of_as_many_that_hold_something_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfile, "_MOST_ROWS", 100)
    again = "INSERT INTO edit SELECT edit + 1000 * ?, {columns} FROM edit WHERE edit BETWEEN 1 AND 4"
    columns = ", ".join(EDIT.columns[1:]) + ", crc"
    change(run, again.format(columns=columns), values=[(number,) for number in range(1, 200)])
    assert len(load(run)) == 800
    change(
        run,
        "INSERT INTO note WITH RECURSIVE n (e) AS (SELECT 1 UNION ALL SELECT e + 1 FROM n WHERE e < 60000)"
        " SELECT 1000 + e, 1, '', '', 0 FROM n",
    )
    for read_it in (load, lambda path: Follower(path).look()):
        with pytest.raises(RunError, match="is damaged: table 'note' holds 60,002 rows"):
            read_it(run)


def test_rows_of_which_each_holds_other_readings_take_no_more_memory_than_files_may(run: Path) -> None:
    width, draw = 2_000, random.Random(0)
    change(run, "INSERT INTO layout VALUES (9, ?, 0)", values=[(json.dumps([["m", str(n), 1] for n in range(width)]),)])
    columns = ", ".join({"layout": "9", "present": "?", "data": "?"}.get(each, each) for each in EDIT.columns[1:])
    masks = [(edit, draw.randbytes(width // 8), bytes(8 * width)) for edit in range(100, 400)]
    change(run, f"INSERT INTO edit SELECT ?, {columns}, crc FROM edit WHERE edit = 1", values=masks)
    load(run)  # what is imported is no part of it
    tracemalloc.start()
    found = load(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * (run / FILE_NAME).stat().st_size
    last = found.edits[-1].row.readings
    bits = np.unpackbits(np.frombuffer(masks[-1][1], dtype=np.uint8)).astype(bool)
    assert list(last) == [("m", str(number)) for number in np.flatnonzero(bits)]
    assert ("m", str(np.flatnonzero(~bits)[0])) not in last


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("ending", ["", "-wal", "-journal", "-shm"])
def test_a_pipe_beside_a_run_is_not_waited_for(run: Path, ending: str) -> None:
    beside = run / f"{FILE_NAME}{ending}"
    beside.unlink(missing_ok=True)
    os.mkfifo(beside)
    code = f"import stabilitylab as sl\ntry: sl.load({str(run)!r})\nexcept sl.errors.RunError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert "expected a run" in done.stdout


def test_thresholds_that_are_nested_deeply_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text(DEEP)
    with pytest.raises(UsageError, match="can't read thresholds"):
        read(tmp_path / "limits.json")


def test_an_error_of_ours_is_one_line_and_no_verdict(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(check, "load", broken)
    monkeypatch.setattr(sys, "argv", ["stabilitylab", "check", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert said.startswith("stabilitylab: internal error: ZeroDivisionError: ours")
    assert said.count("\n") == 1


def test_names_of_folders_steer_no_terminal(tmp_path: Path) -> None:
    make_run(tmp_path / "run\x1b]0;owned\x07\u202e", edits=1, sites=1, dies_at=None)
    command = [sys.executable, "-m", "stabilitylab", "check", str(tmp_path / "runn")]
    said = subprocess.run(command, capture_output=True, timeout=60, check=False).stderr.decode()
    assert "owned" in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)


Write = Callable[[Path], object]


@pytest.mark.parametrize("held", [b'{"name": "mine"}', b"", b"\xff"])
def test_a_report_replaces_no_data_that_is_not_a_reports(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "package.json").write_bytes(held)
    with pytest.raises(RunError, match=r"would replace 'package.json', which no report wrote.*package-report.html"):
        write_pages(tmp_path / "package.html", lambda: ("page", {"format": 1}))
    assert (tmp_path / "package.json").read_bytes() == held
    assert not (tmp_path / "package.html").exists()


@pytest.mark.parametrize("name", ["run.db", "mine.html", "weights.safetensors", "/dev/null"])
def test_a_page_replaces_nothing_that_is_no_page(run: Path, name: str) -> None:
    for mine in ("mine.html", "weights.safetensors"):
        (run / mine).write_text("mine")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(RunError, match="it would replace what is no page"):
        write_report(load(run), run / name)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    assert not Path("/dev/null").is_file()


def test_limits_and_rows_replace_nothing_else(run: Path, tmp_path: Path) -> None:
    before = (run / FILE_NAME).read_bytes()
    with pytest.raises(UsageError, match="limits would replace what is none"):
        write(shipped(), run / FILE_NAME)
    with pytest.raises(UsageError, match="holds something else than rows"):
        expect_writable(run / FILE_NAME)
    assert (run / FILE_NAME).read_bytes() == before
    for _ in range(2):
        write(shipped(), tmp_path / "limits.json")
    assert read(tmp_path / "limits.json") == shipped()


def test_a_report_replaces_its_own_data_and_takes_a_name_that_is_text(tmp_path: Path, run: Path) -> None:
    for number in (1, 2):
        write_pages(f"{tmp_path}/page.html", lambda number=number: ("<!doctype HTML>", {"format": number}))
        data = json.loads((tmp_path / "page.json").read_text())
        assert data == {"written_by": "stabilitylab", "format": number}
    assert write_comparison([load(run)], f"{tmp_path}/several.html") == tmp_path / "several.html"


def test_a_pipe_is_not_waited_for_where_settings_or_records_are_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="it is no file"):
        read(pipe)
    with pytest.raises(RecordError, match="it is no file"):
        load_records(pipe)
    with pytest.raises(UsageError, match="it is no file"):
        read_json(pipe)
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="is no file"):
        open_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scales", []),
        ("scales", {"level": "1"}),
        ("score", True),
        ("score", 1e300),
        ("least", "Infinity"),
        ("alpha", 7),
        ("runs", 1.5),
        ("runs", -1),
        ("source", None),
        ("source", "x" * 100_000),
        ("more", 1),
    ],
)
def test_limits_of_another_kind_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match="here"):
        from_json(shipped().to_json() | {name: value}, "here")


def test_texts_and_lists_that_are_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{"src": "x" * 100_001}]))
    with pytest.raises(RecordError, match="record 0, field 'src': 100,001 characters, expected at most 100,000"):
        load_records(file)
    monkeypatch.setattr(plain_files, "MOST_PARTS", 1_000)
    file.write_text("[" + "0," * 1_000 + "0]")
    with pytest.raises(RecordError, match="more than 1,000 values"):
        load_records(file)
    monkeypatch.setattr(plain_files, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="larger than"):
        plain_files.read_text(file, 100)


def test_the_nearest_name_is_not_looked_for_among_names_of_any_length() -> None:
    assert nearest("ab" * 200_000, ["ba" * 200_000, "ab" * 100]) == ["ab" * 100]  # which would take minutes


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a, *a]\ninner_params: [*b, *b]\n",
        "inner_params: &a [*a]\n",
        "inner_params: " + "[" * 5_000,
        "inner_params: [" + "a, " * 3_000 + "]",
    ],
)
def test_hyperparameters_that_name_what_no_one_could_write_out_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mend.yaml").write_text(text)
    with pytest.raises(UsageError):
        of_hparams(tmp_path / "mend.yaml")


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "moments.npz", **{"mom2.mom2": np.zeros((2_000, 2_000))})
    assert open_archive(tmp_path / "moments.npz").tensors
    monkeypatch.setattr(archives, "_MOST_UNPACKED", 1 << 20)
    with pytest.raises(UsageError, match="unpacks to"):
        open_archive(tmp_path / "moments.npz")


@pytest.mark.parametrize("header", [b"{'descr': '<f8', }} \n", b"\xff\n", b"{'descr': '<f8', 'shape': (\n", b""])
def test_an_archive_with_a_broken_part_is_one_line(tmp_path: Path, header: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "moments.npz", "w") as held:
        held.writestr("mom2.mom2.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UsageError, match=r"can't be read as \.npz|no editor"):
        scan_archive(open_archive(tmp_path / "moments.npz"))


def test_a_pickle_that_was_cut_or_changed_anywhere_is_one_line(tmp_path: Path) -> None:
    file, whole, draw = (
        tmp_path / "editor.pt",
        pickle.dumps({"model": {"u_std": [1.0, 2.0]}}, protocol=2),
        random.Random(0),
    )
    changed = [
        whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :] for at in range(len(whole)) for _ in range(8)
    ]
    for held in [*(whole[:at] for at in range(len(whole))), *changed]:
        file.write_bytes(held)
        with contextlib.suppress(UsageError):
            load_pickle(file)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"a": 1}},
        {"tensors": ["a"]},
        {"sites": "abc"},
        {"bytes": True},
        {"seconds": "long"},
        {"dtypes": {"float32": 2**80}},
        {"model": "x" * 20_000},
        {"anything": 1},
    ],
)
def test_a_scan_of_another_kind_is_none(change: dict[str, Any]) -> None:
    plain = Scan("a model", "folder").to_json()
    assert scan_from_json(plain) == Scan("a model", "folder")
    with pytest.raises(ValueError, match="no scan"):
        scan_from_json(plain | change)
