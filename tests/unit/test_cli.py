"""The command line: what it prints, and how it exits."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import stabilitylab as sl
from stabilitylab.commands import options
from stabilitylab.record.readings import EditRow, Key, Metric, Note
from stabilitylab.record.store import FILE_NAME, RunWriter
from tests.command_line import command, run_cli
from tests.loops import dying_run, healthy_run


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


def rows(folder: Path, readings: list[dict[Key, float]]) -> Path:
    """A run that was never closed: its writer is still there, or was killed."""
    norms = [Metric("weight.nonfinite", "1", "count", "after", "", "", "")]
    run = RunWriter(folder, {"sites": ["fc"]}, norms)
    for edit, found in enumerate(readings):
        arrays = {key: np.array([value]) for key, value in found.items()}
        run.append(EditRow(edit, "", "applied" if edit else "start", 0.0, 1.0, 0.0, 0.0, None, arrays))
    return folder


WHOLE = {("weight.nonfinite", "fc"): 0.0}
BROKEN = {("weight.nonfinite", "fc"): 3.0}


@pytest.mark.parametrize(
    ("readings", "code"),
    [
        pytest.param([WHOLE], 3, id="edit 0 alone says nothing"),
        pytest.param([WHOLE, {}], 3, id="an edit without readings neither"),
        pytest.param([BROKEN], 1, id="a model that is broken before the first edit is"),
        pytest.param([WHOLE, WHOLE], 0, id="a run that goes on is judged"),
        pytest.param([WHOLE, WHOLE, BROKEN], 1, id="and fails"),
    ],
)
def test_exit_code_of_a_run_that_was_not_closed(tmp_path: Path, readings: list[dict[Key, float]], code: int) -> None:
    done = run_cli("check", rows(tmp_path / "run", readings), "--json")
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["complete"] is False


def test_what_was_asked_for_and_could_not_be_watched_has_a_code_of_its_own(tmp_path: Path) -> None:
    writer = RunWriter(
        tmp_path / "run", {"sites": ["fc"]}, [Metric("weight.nonfinite", "1", "count", "after", "", "", "")]
    )
    for edit in range(2):
        readings = {("weight.nonfinite", "fc"): np.array([0.0])}
        writer.append(EditRow(edit, "", "applied" if edit else "start", 0.0, 1.0, 0.0, 0.0, None, readings))
    writer.note(Note(0, "canary-off", "the canary failed"))
    assert run_cli("check", tmp_path / "run").returncode == options.EXIT_UNWATCHED
    broken = {("weight.nonfinite", "fc"): np.array([3.0])}
    writer.append(EditRow(2, "", "applied", 0.0, 1.0, 0.0, 0.0, None, broken))
    assert run_cli("check", tmp_path / "run").returncode == options.EXIT_BAD_VERDICT


def test_the_codes_are_those_of_the_documentation() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "console.md").read_text(encoding="utf-8")
    table = page.partition("| code | means |\n|---|---|\n")[2].partition("\n\n")[0]
    told = [int(line.split("|")[1]) for line in table.splitlines()]
    assert told == sorted({0, *(value for name, value in vars(options).items() if name.startswith("EXIT_"))})


def test_a_run_without_edits_is_incomplete(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {}, []).close()
    done = run_cli("check", tmp_path / "run")
    assert done.returncode == 3
    assert "no measured edit yet" in done.stderr


def test_output_fits_eighty_columns_and_has_no_colour_when_piped(dying: Path) -> None:
    done = run_cli("check", dying)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_metrics_are_listed_as_json() -> None:
    done = run_cli("probes", "--tier", "light", "--json")
    listed = json.loads(done.stdout)
    assert {"tier", "name", "unit", "scale", "meaning", "formula", "source"} <= set(listed[0])
    assert {each["tier"] for each in listed} == {"light"}


def newer(folder: Path) -> Path:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db, db:
        db.execute("PRAGMA user_version=99")
    return folder


def test_a_reader_that_goes_away_does_not_look_like_a_verdict(healthy: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("check", healthy), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_does_not_look_like_a_verdict(dying: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("check", dying), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_terminal_without_unicode_gets_its_verdict(dying: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_cli("check", dying)
    assert done.returncode == 1, done.stderr
    assert "non-finite" in done.stdout


def test_ctrl_c_exits_with_130_and_no_traceback(tmp_path: Path) -> None:
    code = """
        import os, signal, stabilitylab.commands.check as check, stabilitylab.commands.cli as cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
        check.load = lambda run: os.kill(os.getpid(), signal.SIGINT)
        cli.sys.argv = ["stabilitylab", "check", "x"]
        cli.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["check", "report"])
def test_every_error_is_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "text.db").write_text("hello")
    (tmp_path / "empty").mkdir()
    RunWriter(tmp_path / "newer", {}, []).close()
    newer(tmp_path / "newer")
    for target, says in [
        ("nowhere", "does not exist; expected a run folder"),
        ("no\nwhere", "does not exist; expected a run folder"),
        ("x" * 300, "can't look for a run in"),
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
    assert run_cli("report", healthy, "-o", tmp_path).returncode == 2  # a folder
    done = run_cli("report", healthy, "-o", tmp_path / "sub" / "page.html")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "sub" / "page.html")), done.stderr
    assert "<html" in (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    for runs in ([healthy], [healthy, healthy]):
        told = json.loads(run_cli("report", *runs, "-o", tmp_path / "page.html", "--json").stdout)
        assert told == {"page": str(tmp_path / "page.html"), "data": str(tmp_path / "page.json")}
        assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["format"] == 1


def test_version_and_usage() -> None:
    assert run_cli("--version").stdout.strip() == f"stabilitylab {sl.__version__}"
    assert run_cli("chekc", "x").returncode == 2
    assert run_cli("check").returncode == 2


def test_probes_lists_every_metric_of_a_tier() -> None:
    from stabilitylab.probes import probes_of

    for tier in ("light", "deep"):
        done = run_cli("probes", "--tier", tier)
        assert done.returncode == 0, done.stderr
        expected = {metric.name for probe in probes_of(tier) for metric in probe.metrics}
        words = set(done.stdout.split())
        assert expected <= words
        assert tier == "deep" or "weight.condition_number" not in words
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert run_cli("probes", "--tier", "lite").returncode == 2


def test_the_documented_metrics_are_those_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert run_cli("probes", "--markdown").stdout == page.read_text(encoding="utf-8")
