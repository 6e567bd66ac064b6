"""A run of each schema that a version has written, made by that version: all can be read, judged and reported.

Each is the same loop of 12 edits, of which the fifth raises and the last leaves a NaN; from schema 2 on with dry edits.
A new schema gets a file of its own here, and none is ever made anew.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stabilitylab.commands.cli import app
from stabilitylab.record.following import Follower
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import FILE_NAME, SCHEMA_VERSION
from stabilitylab.reports.html import write_report

FIXTURES = Path(__file__).parents[1] / "old_runs"
SCHEMAS = range(1, SCHEMA_VERSION + 1)


@pytest.fixture(params=SCHEMAS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with gzip.open(FIXTURES / f"run-schema-{request.param}.db.gz") as held:
        (tmp_path / FILE_NAME).write_bytes(held.read())
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (request.param,)
    return tmp_path


def test_there_is_a_run_of_each_schema() -> None:
    held = {re.sub(r"\D", "", file.name) for file in FIXTURES.glob("run-schema-*")}
    assert held == {str(schema) for schema in SCHEMAS}


def test_it_is_read_and_judged(folder: Path) -> None:
    run: Run = load(folder)
    assert run.complete
    assert len(run) == 12
    assert [edit.edit for edit in run.edits if edit.status == "failed"] == [5]
    assert run.edits[5].row.error == "ValueError: a fault"
    assert np.isfinite(run.series("update.norm", "2")[1:12]).all()
    assert run.diagnosis().verdict == "non-finite"
    assert run.diagnosis().first_bad_site == "2"


def test_it_is_shown_everywhere(folder: Path) -> None:
    follower = Follower(folder)
    follower.look()
    assert follower.diagnosis() == load(folder).diagnosis()
    page = write_report(load(folder), folder / "report.html")
    assert "non-finite" in page.read_text("utf-8")
    assert json.loads(page.with_suffix(".json").read_text("utf-8"))["run"]["edits"] == 12
    for command in ("check", "compare", "tail --once"):
        done = CliRunner().invoke(app, [*command.split(), str(folder)])
        assert done.exit_code == (1 if command == "check" else 0), done.output


def test_only_what_came_later_is_missing(folder: Path) -> None:
    run = load(folder)
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        (schema,) = db.execute("PRAGMA user_version").fetchone()
    assert len(run.dry_edits) == (0 if schema == 1 else 9)
    assert bool(run.operations) == (schema > 2)
