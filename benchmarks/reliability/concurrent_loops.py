"""One writer and its readers, each a process of its own; see `concurrent`. Knows no goal.

python -m benchmarks.reliability.concurrent_loops report|tail|tab RUN SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import stabilitylab as sl
from benchmarks.reliability.forks import Say, waited_for_a_core
from stabilitylab.errors import RunError
from stabilitylab.record.readings import EditRow
from stabilitylab.record.run import Run

START, STEP = 0.5, 1.0 / 128.0
"""The weight's entries are START + edit · STEP, without any rounding."""
PAUSE_SECONDS: Final = 0.01
"""What the user's part of an edit takes, at least."""
LOOK_SECONDS: Final = 0.2


def awake(say: Say) -> None:
    """For who waits until processes can be forked."""
    say("awake")


def write(say: Say, run: str, seconds: float, wal: bool) -> None:
    """Edit for so long; tells of each edit for how long the monitor held it, in seconds."""
    import torch
    from torch import nn

    from stabilitylab.probes import Update, WeightRange
    from stabilitylab.probes.base import Probe
    from stabilitylab.record import store

    if not wal:
        setattr(store, "wal_works", lambda folder: False)  # noqa: B010 - imported there, not of it
    model = nn.Sequential(nn.Linear(4, 4))
    weight = next(model.parameters())
    torch.nn.init.constant_(weight, START)
    probes: list[Probe[Any]] = [Update(every=1), WeightRange(every=1)]
    until = time.monotonic() + seconds
    held: list[float] = []
    with sl.attach(model, "0", run=run, probes=probes, announce=False, trace=False) as monitor:
        number = 0
        while not held or time.monotonic() < until:
            number += 1
            queued, began = waited_for_a_core(), time.perf_counter()
            with monitor.edit(f"edit {number}"), torch.no_grad():
                inside = time.perf_counter()
                weight.add_(STEP)
                time.sleep(PAUSE_SECONDS)
                users = time.perf_counter() - inside
            took = time.perf_counter() - began - users
            held.append(took - min(took, waited_for_a_core() - queued))
            if number % 50 == 0:
                say(str(number))
    say(json.dumps({"held": held, "complete": sl.load(run).complete, "rows": len(sl.load(run).edits)}))


def torn(rows: Sequence[EditRow], first: int) -> str:
    """What is wrong with rows from edit `first` on; empty where they are as they were written."""
    for edit, row in enumerate(rows, start=first):
        largest = row.readings.get(("weight.max_abs", "0"))
        wrong = largest is not None and largest[0] != START + edit * STEP
        if row.edit != edit or wrong or row.label != (f"edit {edit}" if edit else ""):
            return f"row {edit} is of edit {row.edit}, {row.label!r}, {largest}"
    return ""


def _reporting(run: Path) -> Callable[[], int]:
    from stabilitylab.reports.html import render

    looks = [0]

    def look() -> int:
        found = sl.load(run)
        found.diagnosis()
        if looks[0] % 10 == 0:
            render(found)
        looks[0] += 1
        return _checked(found)

    return look


def _checked(found: Run) -> int:
    said = torn([edit.row for edit in found.edits], 0)
    if said:
        raise ValueError(said)
    return len(found.edits)


def _tailing(run: Path) -> Callable[[], int]:
    from stabilitylab.record.following import Follower

    follower, seen = Follower(run), [0]

    def look() -> int:
        rows = [each.row for each in follower.look()]
        if said := torn(rows, seen[0]):
            raise ValueError(said)
        seen[0] += len(rows)
        return seen[0]

    return look


def _tab(run: Path) -> Callable[[], int]:
    from stabilitylab.reports.tensorboard_plugin.shelf import Shelf

    shelf = Shelf(run.parent)

    def look() -> int:
        shelf.look()
        copy = shelf.read(run.name)
        if copy.run is None:
            raise ValueError(copy.reason)
        return _checked(copy.run)

    return look


READERS: Final[dict[str, Callable[[Path], Callable[[], int]]]] = {"report": _reporting, "tail": _tailing, "tab": _tab}


def read(kind: str, run: Path, seconds: float) -> dict[str, Any]:
    """Once told to, look again and again; what went wrong, and how often it was looked."""
    look, looks, most = READERS[kind](run), 0, 0
    breaks: list[str] = []
    print("ready", flush=True)
    sys.stdin.readline()
    while not (run / "run.db").exists():
        time.sleep(0.05)
    until = time.monotonic() + seconds
    while not looks or time.monotonic() < until:
        try:
            rows = look()
            if rows < most:
                breaks.append(f"{rows} rows after {most}")
            most = max(most, rows)
        except RunError as error:
            breaks.append(str(error))
        except ValueError as error:
            breaks.append(f"torn: {error}")
        looks += 1
        time.sleep(LOOK_SECONDS)
    return {"kind": kind, "looks": looks, "rows": most, "breaks": breaks[:5], "broken": len(breaks)}


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))))
