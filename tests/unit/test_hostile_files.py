"""A run file that anyone wrote: it is read, or called damaged in one line; it computes nothing, and nobody waits."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from stabilitylab.analysis.thresholds import read
from stabilitylab.commands import check, cli
from stabilitylab.errors import RunError, UsageError
from stabilitylab.record.following import Follower
from stabilitylab.record.run import load
from stabilitylab.record.store import FILE_NAME
from stabilitylab.reports.comparison import write_comparison
from stabilitylab.reports.html import write_pages
from tests.synthetic import make_run

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", edits=4, sites=1, dies_at=None)


def change(run: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    with closing(sqlite3.connect(run / FILE_NAME)) as db, db:
        for statement in statements:
            db.execute(statement, values)


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE metric SET phase = ?", "sideways"),
        ("UPDATE metric SET length = ?", 100_000_000),
        ("UPDATE metric SET length = ?", 0),
        ("UPDATE metric SET unit = ?", b"\xff"),
        ("INSERT OR REPLACE INTO manifest VALUES ('config', ?)", "[1]"),
        ("INSERT OR REPLACE INTO manifest VALUES ('sites', ?)", "5"),
        ("INSERT OR REPLACE INTO manifest VALUES ('sites', ?)", "[5]"),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?)", DEEP),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?)", '{"rate": NaN}'),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?)", "1e999"),
        ("INSERT OR REPLACE INTO manifest VALUES ('x', ?)", "9" * 4_000),
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
        ("INSERT INTO outcome (edit, outcome, observed_at) VALUES (1, ?, 0)", "evaporated"),
        ("INSERT INTO note (edit, kind, says) VALUES (1, 'x', ?)", b"\0"),
        ("INSERT INTO alarm (edit, verdict, metric, site, says) VALUES (1, 'x', ?, '', '')", b"\0"),
        ("INSERT INTO operation (edit, says) VALUES (1, ?)", '{"edit": 1}'),
        ("INSERT INTO operation (edit, says) VALUES (1, ?)", DEEP),
    ],
)
def test_what_is_of_another_kind_is_called_damaged(run: Path, statement: str, value: object) -> None:
    change(run, statement, values=(value,))
    with pytest.raises(RunError, match="is damaged") as raised:
        load(run)
    assert len(str(raised.value)) < 400
    with pytest.raises(RunError, match="is damaged"):
        Follower(run, keeps_rows=True).look()


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


def test_a_report_replaces_its_own_data_and_takes_a_name_that_is_text(tmp_path: Path, run: Path) -> None:
    for number in (1, 2):
        write_pages(f"{tmp_path}/page.html", lambda number=number: ("page", {"format": number}))
        data = json.loads((tmp_path / "page.json").read_text())
        assert data == {"written_by": "stabilitylab", "format": number}
    assert write_comparison([load(run)], f"{tmp_path}/several.html") == tmp_path / "several.html"
