"""Concurrent: while one process writes, eight read the same run, and nobody sees a torn row or is held up by us.

How long an edit was held is the time around the user's own part of it, less the time for which the writer waited for a
core: nine processes share what the machine has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.reliability.forks import Forks
from benchmarks.reliability.promise import Effort, Result, counted

READERS: Final = ("report", "report", "tail", "tail", "tail", "tab", "tab", "tab")
LAST_LOOK: Final = 600.0
"""Seconds that a reader may take to end the look that it is in: on a busy machine a report takes minutes."""
MOST_HELD: Final = 0.1
"""Seconds."""
_ROOT: Final = Path(__file__).resolve().parents[2]


def _reader(kind: str, run: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.reliability.concurrent_loops", kind, str(run), str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=environment,
    )


def together(forks: Forks, run: Path, seconds: float, wal: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the writer says, what each reader says)."""
    readers = [_reader(kind, run, seconds) for kind in READERS]
    try:
        for reader in readers:  # whose imports are no part of the time
            assert reader.stdout is not None
            reader.stdout.readline()
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("go\n")
            reader.stdin.flush()
        task = "benchmarks.reliability.concurrent_loops:write"
        ended = forks.run(task, {"run": str(run), "seconds": seconds, "wal": wal}, most_silent=60.0)
        said = [reader.communicate(timeout=LAST_LOOK) for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    if ended.error or not ended.said:
        raise RuntimeError(f"the writer failed: {ended.error or ended.by}")
    heard = [json.loads(out) if out else {"broken": 1, "breaks": [error[-300:]], "looks": 0} for out, error in said]
    return json.loads(ended.said[-1]), heard


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: no torn row, no failed look, no edit held for longer than `MOST_HELD`."""
    folder, seconds = effort.folder("concurrent"), float(effort.pick(8, 300))
    with Forks() as forks:
        forks.run("benchmarks.reliability.concurrent_loops:awake", {})
        for wal in (True, False):
            how = "with a log (WAL)" if wal else "without a log"
            effort.tell(f"1 writer, 8 readers, {how}", 0.0 if wal else 0.5)
            writer, readers = together(forks, folder / f"run-{wal}", seconds, wal)
            held = np.array(writer["held"])
            breaks = [f"{reader.get('kind')}: {said}" for reader in readers for said in reader["breaks"]]
            if not writer["complete"] or writer["rows"] != len(held) + 1:
                breaks.append(f"{writer['rows']} rows of {len(held) + 1}, complete: {writer['complete']}")
            looks = sum(reader["looks"] for reader in readers)
            test = f"1 writer, 8 readers (report, tail, tab), {seconds:.0f} s, {how}"
            yield counted(test, "torn or failed looks, rows lost", looks, breaks, f"{len(held):,} edits")
            worst = float(held.max())
            measured = f"{worst * 1e3:.0f} ms at most, 99% within {np.quantile(held, 0.99) * 1e3:.1f} ms"
            goal = f"no edit held over {MOST_HELD * 1e3:.0f} ms by us"
            test = f"the writer's edits meanwhile, {how}"
            yield Result(test, goal, measured, worst <= MOST_HELD, len(held), clock=True)
