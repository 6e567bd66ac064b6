"""A run's folder and file are made whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import stabilitylab as sl
from stabilitylab.errors import RunError, UsageError
from stabilitylab.record import store
from stabilitylab.record.run import load
from stabilitylab.record.store import FILE_NAME, RunWriter

LOOP: dict[int, object] = {}
LOOP[0] = LOOP


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"config": {"rates": [0.1, {"lr": math.nan}]}}, r"config\['rates'\]\[1\]\['lr'\] is nan"),
        ({"config": {"edit": {"layer": nn.Identity()}}}, r"config\['edit'\]\['layer'\] is a Identity"),
        ({"config": {"at": {(1, 2): 3}}}, r"config\['at'\] is a dict with a key of type tuple"),
        ({"config": {"self": LOOP}}, "too deep, or holds itself"),
        ({"config": [1]}, "config is a list; expected a dict"),
        ({"run": 5}, "run is a int; expected the path"),
        ({"sinks": [print]}, "sinks holds a builtin_function_or_method"),
    ],
)
def test_what_can_not_be_recorded_is_named_and_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        sl.attach(nn.Sequential(nn.Linear(2, 2)), "0", **{"run": tmp_path / "new" / "run", **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30), "nul\0"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path: Path, name: str, resume: bool) -> None:
    with pytest.raises(RunError, match=r"can't (make a run|write a run file) in") as raised:
        sl.attach(nn.Sequential(nn.Linear(2, 2)), "0", run=f"{tmp_path}/new/{name}", resume=resume)
    assert len(str(raised.value)) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["filling", "opening"])
def test_a_disk_without_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(RunWriter, "_add_metrics" if step == "filling" else "set_manifest", full)
    with pytest.raises(RunError, match=r"can't write a run file in .*run': database or disk is full"):
        RunWriter(tmp_path / "run", {}, [])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store, "wal_works", refused)
    with pytest.raises(RunError, match="Read-only file system"):
        RunWriter(tmp_path / "new" / "run", {}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dies_in", "there"), [("os.mkdir", False), ("sqlite3.connect", False), ("os.link", False), ("os.unlink", True)]
)
def test_a_kill_while_it_is_made_leaves_a_folder_that_is_free_or_a_run(
    tmp_path: Path, dies_in: str, there: bool
) -> None:
    module, _, name = dies_in.partition(".")
    code = (
        f"import os, pathlib, sqlite3\n"
        f"from stabilitylab.record import store\n"
        f"store.wal_works = lambda folder: True\n"
        f"real = {dies_in}\n"
        f"def dying(*a, **k):\n"
        f"    if {name!r} in ('mkdir', 'connect'): real(*a, **k)\n"
        f"    os._exit(9)\n"
        f"{module}.{name} = dying\n"
        f"store.RunWriter(pathlib.Path({str(tmp_path / 'run')!r}), {{}}, [])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 9
    if there:
        assert not load(tmp_path / "run").complete
    else:
        RunWriter(tmp_path / "run", {}, []).close()
        assert load(tmp_path / "run").edits == ()


def test_of_two_that_make_one_run_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.wal_works

    def overtaken(folder: Path) -> bool:
        monkeypatch.setattr(store, "wal_works", real)
        RunWriter(tmp_path / "run", {"whose": "theirs"}, []).close()
        return True

    monkeypatch.setattr(store, "wal_works", overtaken)
    with pytest.raises(RunError, match="was taken by another process"):
        RunWriter(tmp_path / "run", {"whose": "mine"}, [])
    assert load(tmp_path / "run").manifest["whose"] == "theirs"
    assert os.listdir(tmp_path / "run") == [FILE_NAME]
