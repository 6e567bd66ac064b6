"""Our tracer in one loop: gone through under a monitor, and what the run's diagnosis then names."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import wild, zoo
from benchmarks.tracing.scoring import LOOPS, Heard, judged, named_by
from benchmarks.tracing.truths import SEED
from stabilitylab.acting.schedule import Trace
from stabilitylab.record.operations import Operation
from stabilitylab.record.run import Run, load


@dataclass(frozen=True)
class Mode:
    """How a loop is traced. canary: whether the monitor has one."""

    trace: Trace
    canary: bool = True


MODES: Final[dict[str, Mode]] = {
    "on": Mode(True),
    "auto": Mode("auto"),
    "armed": Mode("armed"),
    "on, no canary": Mode(True, canary=False),
}
"""By the name of its row."""


def hear(job: tuple[str, str, Path]) -> Heard:
    """(loop, mode, where runs go): what is named in one loop. Its run is deleted afterwards."""
    loop, name, runs = job
    mode, folder = MODES[name], runs / f"{loop.replace('/', '-')}-{name.replace(', ', '-').replace(' ', '-')}"
    began = time.perf_counter()
    try:
        run = made(loop, folder, mode)
        seconds = time.perf_counter() - began
        named = named_by(run.diagnosis().operation)
        off = "; ".join(note.says for note in run.notes if note.kind == "trace-off")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answer, points = judged(loop, named, canary=mode.canary)
    return Heard(loop, LOOPS[loop], name, answer, points, named, recorded(run.operations), seconds, off)


def made(loop: str, folder: Path, mode: Mode) -> Run:
    """The run of a loop, the zoo's with `SEED`."""
    corpus, _, name = loop.partition("/")
    if corpus == "wild":
        return wild.run(wild.by_name(name), folder, canary=mode.canary, trace=mode.trace)[0]
    zoo.run(zoo.by_name(name), SEED, folder, canary=mode.canary, trace=mode.trace)
    return load(folder)


def recorded(operations: tuple[Operation, ...]) -> tuple[str, ...]:
    """Everything that the tracer wrote down, in words."""
    return tuple(named.says for operation in operations if (named := named_by(operation)) is not None)
