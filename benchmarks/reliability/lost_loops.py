"""The loops that are killed or lose their disk, run in processes of their own; see `lost`. Knows no goal."""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

import stabilitylab as sl
from benchmarks.reliability.forks import Say
from stabilitylab.errors import StabilityLabError
from stabilitylab.probes import Update, WeightRange
from stabilitylab.probes.base import Probe
from stabilitylab.record import store
from stabilitylab.watching.monitor import Monitor

EDITS: Final = 24
SITE: Final = "0"
_RECORD: Final = f"{os.sep}record{os.sep}"
_VM_STEP: Final = 10
"""Instructions of SQLite's between two chances to be killed."""


def attach(run: str) -> tuple[nn.Sequential, Monitor]:
    """A loop of one small layer, whose readings are the same each time."""
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    probes: list[Probe[Any]] = [Update(every=1), WeightRange(every=1)]
    return model, sl.attach(model, SITE, run=run, probes=probes, announce=False, trace=False)


def edit(model: nn.Sequential, monitor: Monitor, number: int) -> None:
    with monitor.edit(f"edit {number}"), torch.no_grad():
        next(model.parameters()).add_(0.01 * number)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Lines:
    """Counts the lines of the record that are run, and dies at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        return self.line if _RECORD in frame.f_code.co_filename else None

    def line(self, frame: FrameType, event: str, argument: object) -> Any:
        self.count += event == "line"
        if self.count == self.at:
            die()
        return self.line


def _dies_in_the_database(at: int) -> None:
    """At the so many-th tenth instruction of SQLite's, in whatever connection."""
    connect: Any = sqlite3.connect
    left = [at]

    def step() -> int:
        left[0] -= 1
        if left[0] <= 0:
            die()
        return 0

    def connected(*arguments: Any, **named: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*arguments, **named)
        db.set_progress_handler(step, _VM_STEP)
        return db

    store.sqlite3.connect = connected  # type: ignore[attr-defined]


def loop(
    say: Say, run: str, stage: str = "", wal: bool = True, line: int | None = None, instruction: int | None = None
) -> None:
    """Attach, edit, close; tells each edit that has ended. stage: during which it may be killed at a line ("attach",
    "edits" or "close"); where no line is named, their number is told.
    """
    if not wal:
        setattr(store, "wal_works", lambda folder: False)  # noqa: B010 - imported there, not of it
    if instruction is not None:
        _dies_in_the_database(instruction)
    lines = Lines(line)

    def at_stage(name: str, do: Callable[[], Any]) -> Any:
        sys.settrace(lines.trace if name == stage else None)
        try:
            return do()
        finally:
            sys.settrace(None)

    model, monitor = at_stage("attach", lambda: attach(run))
    say("attached")
    for number in range(1, EDITS + 1):
        at_stage("edits", functools.partial(edit, model, monitor, number))
        say(str(number))
    at_stage("close", monitor.close)
    say("closed")
    say(f"lines {lines.count}")


def full_disk(say: Say, run: str, at: int, until: int, spare: int) -> None:
    """No file may grow by more than `spare` bytes from edit `at` on, to before edit `until`; at 0: already at attach.

    Files grow no further than that, which is an error to who writes, as on a disk that is full.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = unlimited[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, unlimited[1]))

    if at == 0:
        limit(spare)
    try:
        model, monitor = attach(run)
    except StabilityLabError as error:
        say(f"refused {error}")
        return
    say("attached")
    for number in range(1, EDITS + 1):
        if number == at:
            files = [Path(run, f"{store.FILE_NAME}{ending}") for ending in ("", "-wal")]
            limit(max(file.stat().st_size for file in files if file.exists()) + spare)
        if number == until:
            limit(None)
        edit(model, monitor, number)
        say(str(number))
    monitor.close()
    say("closed")


def folder_gone(say: Say, run: str, at: int, how: str) -> None:
    """The run's folder is deleted, moved away, or replaced by another run, a file or an empty folder before edit
    `at`.
    """
    model, monitor = attach(run)
    folder = Path(run)
    for number in range(1, EDITS + 1):
        if number == at:
            if how == "moved":
                folder.rename(folder.with_name(f"{folder.name}-moved"))
            else:
                shutil.rmtree(folder)
            if how == "replaced by a run":
                other, another = attach(run)
                edit(other, another, 1)
                another.close()
            elif how == "replaced by a file":
                folder.write_text("mine")
            elif how == "replaced by a folder":
                folder.mkdir()
                (folder / "notes.txt").write_text("mine")
        edit(model, monitor, number)
        say(str(number))
    monitor.close()
    say(f"at {monitor.path}")
    say("closed")


def written(say: Say, run: str, copy: str, before: int, seed: int) -> None:
    """A run whose last edits are in its log alone, as it lies on the disk then, copied to `copy`; and in
    ``copy/checkpointed.db`` what its file is once the log was folded into it.
    """
    model, monitor = attach(run)
    for number in range(1, EDITS + 1):
        if number == before:
            monitor._recorder._record._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[attr-defined]
        edit(model, monitor, number)
    shutil.copytree(run, copy)
    Path(copy, f"{store.FILE_NAME}-shm").unlink(missing_ok=True)
    monitor._recorder._record._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[attr-defined]
    shutil.copyfile(Path(run, store.FILE_NAME), Path(copy, "checkpointed.db"))
    monitor.close()
    say(str(random.Random(seed).random()))
