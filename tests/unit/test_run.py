"""Reading a run: what is no run gets one clear line."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.errors import RunError, UsageError
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import load
from stabilitylab.record.store import FILE_NAME, SCHEMA_VERSION, RunWriter

NORM = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")


def make(folder: Path, sites: tuple[str, ...] = ("fc1", "fc2"), edits: int = 3) -> Path:
    run = RunWriter(folder, {"sites": list(sites)}, [NORM])
    for edit in range(edits + 1):
        values = {("update.norm", site): np.array([float(edit)]) for site in sites}
        run.append(EditRow(edit, "<b>", "applied" if edit else "start", 0.0, 2.0, 0.5, 0.25, None, values))
    run.close()
    return folder


def test_a_missing_run_names_those_beside_it(tmp_path: Path) -> None:
    make(tmp_path / "mend-vqa")
    with pytest.raises(RunError, match=r"does not exist; expected a run folder; runs beside it: '.*mend-vqa'"):
        load(tmp_path / "mend-vaq")


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    make(tmp_path / "one")
    with pytest.raises(RunError, match=r"is a folder of runs; expected one of them: .*one"):
        load(tmp_path)


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"holds no {FILE_NAME}"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
def test_a_file_that_is_no_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RunError, match="not a run file"):
        load(tmp_path)


def test_another_database_is_no_run(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db, db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(RunError, match="a database but not a run file"):
        load(tmp_path)


def test_a_truncated_run_is_called_damaged(tmp_path: Path) -> None:
    make(tmp_path / "run", edits=200)
    file = tmp_path / "run" / FILE_NAME
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RunError, match=r"damaged|not a run file"):
        load(tmp_path / "run")


@pytest.mark.parametrize("path", ["x" * 5_000, "a\0b"])
def test_a_path_that_can_not_be_is_no_run(path: str) -> None:
    with pytest.raises(RunError):
        load(path)


def test_a_damaged_run_is_read_or_called_damaged_and_nothing_else(tmp_path: Path) -> None:
    good = (make(tmp_path / "run", edits=12) / FILE_NAME).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    (tmp_path / "bad").mkdir()
    for _ in range(150):
        bad = bytearray(good)
        for place in random.integers(100, len(bad), size=40):
            bad[place] = random.integers(256)
        (tmp_path / "bad" / FILE_NAME).write_bytes(bad)
        try:
            load(tmp_path / "bad")
        except RunError:
            refused += 1
    assert refused > 50


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    make(tmp_path / "run")
    with closing(sqlite3.connect(tmp_path / "run" / FILE_NAME)) as db, db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(RunError, match=f"run schema {SCHEMA_VERSION + 1}, this stabilitylab reads up to"):
        load(tmp_path / "run")


def test_a_wrong_metric_or_site_names_the_nearest(tmp_path: Path) -> None:
    run = load(make(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"no metric 'update.nrom' in this run; did you mean 'update.norm'"):
        run.series("update.nrom")
    with pytest.raises(UsageError, match=r"no site 'fc3'; did you mean 'fc\d'"):
        run.series("update.norm", "fc3")
    with pytest.raises(UsageError, match="has 2 sites; expected one of fc1, fc2"):
        run.series("update.norm")


def test_series_and_shares(tmp_path: Path) -> None:
    run = load(make(tmp_path / "run"))
    assert run.sites == ("fc1", "fc2")
    assert run.series("update.norm", "fc2").dtype == np.float64
    np.testing.assert_array_equal(run.series("update.norm", "fc2"), [0, 1, 2, 3])
    np.testing.assert_array_equal(run.edit_numbers, [0, 1, 2, 3])
    assert run.probe_time_share == pytest.approx(0.25)
    assert run.canary_time_share == pytest.approx(0.125)
    assert len(run) == 3
    assert str(tmp_path) in repr(run)


def test_reading_a_run_needs_no_torch(tmp_path: Path) -> None:
    make(tmp_path / "run")
    code = (
        "import sys, stabilitylab as sl\n"
        f"run = sl.load({str(tmp_path / 'run')!r})\n"
        "run.diagnosis()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "print(len(run))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
