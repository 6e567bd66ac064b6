"""A log that is shorter than what was acknowledged is said to be, and one that is whole is not."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.commands.options import EXIT_UNWATCHED
from stabilitylab.record.acknowledged import ENDING, acknowledged
from stabilitylab.record.following import Follower
from stabilitylab.record.note_kinds import LOST_ROWS
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import load
from stabilitylab.record.store import FILE_NAME, RunWriter
from tests.command_line import run_cli

METRIC = Metric("mine.size", "1", "log", "after", "Something.", "x", "—")
EDITS = 40
WRITE = """
import os, sys
from pathlib import Path
from tests.unit.test_acknowledged import writer, row, EDITS
held = writer(Path(sys.argv[1]))
for edit in range(EDITS + 1):
    held.append(row(edit))
os._exit(1)
"""


def writer(folder: Path) -> RunWriter:
    return RunWriter(folder, {"closed": False}, [METRIC])


def row(edit: int) -> EditRow:
    return EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings={("mine.size", "fc"): np.array([1.0])})


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "killed"
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=False, timeout=120)
    assert (folder / f"{FILE_NAME}-wal").exists()
    return folder


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_a_run_whose_writer_was_killed_lacks_nothing(run: Path) -> None:
    assert acknowledged(run / FILE_NAME) == EDITS
    found = load(run)
    assert len(found) == EDITS
    assert not found.notes


def test_a_log_that_was_cut_or_damaged_anywhere_is_said_to_lack_what_it_lacks(run: Path) -> None:
    whole, draw = (run / f"{FILE_NAME}-wal").read_bytes(), random.Random(0)
    lacked = set()
    for place in (0, 31, 4_000, *(draw.randrange(len(whole)) for _ in range(20))):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            (run / f"{FILE_NAME}-wal").write_bytes(damaged)
            (run / f"{FILE_NAME}-shm").unlink(missing_ok=True)
            found = load(run)
            last = max((edit.edit for edit in found.edits), default=-1)
            lacked.add(EDITS - last)
            assert found.manifest.get("lost_rows", 0) == EDITS - last
            assert [note.kind for note in found.notes] == [LOST_ROWS] * (last < EDITS)
    assert len(lacked) > 5


def test_it_is_said_by_every_reader_and_is_no_clean_verdict(run: Path) -> None:
    wal = run / f"{FILE_NAME}-wal"
    wal.write_bytes(wal.read_bytes()[: wal.stat().st_size // 2])
    (run / f"{FILE_NAME}-shm").unlink(missing_ok=True)
    found = load(run)
    last = found.edits[-1].edit
    assert f"edits {last + 1} to {EDITS} had been recorded and can't be read any more" in found.notes[-1].says
    assert "had been recorded" in found.diagnosis().says
    follower = Follower(run)
    follower.look()
    assert follower.diagnosis() == found.diagnosis()
    assert follower.manifest["lost_rows"] == EDITS - last
    done = run_cli("check", run)
    assert done.returncode == EXIT_UNWATCHED
    assert "had been recorded" in " ".join(done.stdout.split())


def test_a_run_that_goes_on_is_never_said_to_lack_anything(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    follower = Follower(tmp_path / "run")
    for edit in range(8):
        held.append(row(edit))
        assert not load(tmp_path / "run").notes
        follower.look()
        assert "lost_rows" not in follower.manifest
    held.close()
    assert [file.name for file in (tmp_path / "run").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "held", [b"", b"5", b"9" * 30, b"-0000000000000000001\n", b"99999999999999999999\n", b"\xff" * 21]
)
def test_what_is_no_number_says_nothing(run: Path, held: bytes) -> None:
    (run / f"{FILE_NAME}{ENDING}").write_bytes(held)
    assert acknowledged(run / FILE_NAME) == -1
    assert not load(run).notes


def test_a_pipe_in_its_place_is_not_waited_for(run: Path) -> None:
    (run / f"{FILE_NAME}{ENDING}").unlink()
    os.mkfifo(run / f"{FILE_NAME}{ENDING}")
    assert acknowledged(run / FILE_NAME) == -1


def test_a_folder_that_takes_no_further_file_takes_the_edit(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    (tmp_path / "run" / f"{FILE_NAME}{ENDING}").mkdir()
    held.append(row(0))
    held.close()
    assert len(load(tmp_path / "run").edits) == 1
