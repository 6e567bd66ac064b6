"""The command line: what it prints, and how it exits."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import stabilitylab as sl
from stabilitylab.store import FILE_NAME, RunWriter
from tests.loops import dying_run, healthy_run


def run_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stabilitylab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return healthy_run(tmp_path_factory.mktemp("runs") / "healthy")


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dying_run(tmp_path_factory.mktemp("runs") / "dying")


def test_check_json_of_a_dying_run(dying: Path) -> None:
    done = run_cli("check", dying, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    wanted = {
        *("run", "edits", "verdict", "onset_edit", "first_bad_edit", "first_bad_site", "first_bad_metric", "cause"),
        *("findings", "probe_time_share"),
    }
    assert wanted <= set(found)
    assert found["verdict"] == "non-finite"
    assert found["edits"] == 14
    assert found["onset_edit"] <= found["first_nonfinite_edit"]
    for finding in found["findings"]:
        assert {"metric", "site", "edit", "value", "threshold", "says"} <= set(finding)
    assert found["verdict"] == sl.load(dying).diagnosis().verdict


def test_check_of_a_healthy_run(healthy: Path) -> None:
    assert run_cli("check", healthy).returncode == 0
    assert json.loads(run_cli("check", healthy, "--json").stdout)["verdict"] == "stable"


@pytest.mark.parametrize(
    ("fail_on", "code"), [("drifting", 1), ("diverging", 1), ("collapsed", 1), ("non-finite", 1), ("sideways", 2)]
)
def test_fail_on(dying: Path, fail_on: str, code: int) -> None:
    assert run_cli("check", dying, "--fail-on", fail_on).returncode == code


def test_a_run_without_edits_is_incomplete(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {}, []).close()
    done = run_cli("check", tmp_path / "run")
    assert done.returncode == 3
    assert "no measured edit yet" in done.stderr


def test_output_fits_eighty_columns_and_has_no_colour_when_piped(dying: Path) -> None:
    done = run_cli("check", dying)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def newer(folder: Path) -> Path:
    with sqlite3.connect(folder / FILE_NAME) as db:
        db.execute("PRAGMA user_version=99")
    return folder


@pytest.mark.parametrize("command", ["check", "report"])
def test_every_error_is_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "text.db").write_text("hello")
    (tmp_path / "empty").mkdir()
    RunWriter(tmp_path / "newer", {}, []).close()
    newer(tmp_path / "newer")
    for target, says in [
        ("nowhere", "does not exist; expected a run folder"),
        ("empty", "holds no run.db"),
        ("text.db", "is not a run file"),
        ("newer", "has run schema 99"),
        (".", "is a folder of runs"),
    ]:
        done = run_cli(command, tmp_path / target)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.startswith("stabilitylab: ")
        assert done.stderr.count("\n") == 1


def test_report_writes_the_page_where_it_is_told(healthy: Path, tmp_path: Path) -> None:
    done = run_cli("report", healthy, "-o", tmp_path / "sub" / "page.html")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "sub" / "page.html")), done.stderr
    assert "<html" in (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")


def test_version_and_usage() -> None:
    assert run_cli("--version").stdout.strip() == f"stabilitylab {sl.__version__}"
    assert run_cli("chekc", "x").returncode == 2
    assert run_cli("check").returncode == 2
