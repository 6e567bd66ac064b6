"""Whether the tracer names the right operation, what others name, and what tracing costs.

    python -m benchmarks.tracing [--only accuracy|peers|cost] [--loop NAME …] [--processes N] [--json FILE]

**Accuracy.** Each loop of `truths.py` is gone through once in each mode: on, auto and armed, and on without a canary.
What counts is the operation that the run's diagnosis names. How it is scored is in `scoring.py`; runs of one corpus
are few and not drawn by chance, so the intervals say how little 20 loops can tell, and no more.

**Peers.** The same loops (not those that stay finite) under three others, see `peers.py`.

**Cost.** CPU time in pairs, by `benchmarks.overhead`: there it says how. The tracer is set beside the same monitor
without it, round by round. A goal of "no more" is met where the interval holds 1.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, TaskID
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks import overhead
from benchmarks.detection.table import console
from benchmarks.tracing import ours, peers, table
from benchmarks.tracing.scoring import LOOPS, Heard, document_of
from benchmarks.workloads import TRACED, WORKLOADS, Workload
from benchmarks.zoo.runs import spread
from stabilitylab.analysis.findings import json_safe

Part = Literal["accuracy", "peers", "cost"]
Job = TypeVar("Job")
COST_WORKLOADS: Final = ("gpt2", "llama135m", "gpt2_ft25", "demo260k")
COST_VARIANTS: Final = ("a_a", "whole", *TRACED)
PROMISED: Final = ("gpt2", "llama135m", "gpt2_ft25")
"""Where the goals hold: on the demo's tiny model nothing that sees each operation can be cheap."""
DECIDING: Final = ("a_a", "bare_traced")
PEER_GROUPS: Final = ("truth", "arrived", "optional", "no-claim")


def heard_by(
    watches: Sequence[str],
    jobs: Sequence[Job],
    hear: Callable[[Job], Heard],
    says: str,
    processes: int,
    progress: Progress,
) -> dict[str, list[Heard]]:
    """What each watch said, its loops in the order of the truths."""
    order = list(LOOPS)
    found = list(progress.track(spread(hear, jobs, processes), total=len(jobs), description=says))
    found.sort(key=lambda each: order.index(each.loop))
    return {watch: [each for each in found if each.watch == watch] for watch in watches}


def costs(workloads: Sequence[Workload], time_factor: float, progress: Progress, out: Console) -> dict[str, Any]:
    """What tracing takes in each workload, as JSON has it; told as soon as it is known."""
    options = argparse.Namespace(seed=0, time_factor=time_factor, pairs=150)
    document: dict[str, Any] = {}
    with threadpool_limits(1):
        for workload in workloads:
            task = progress.add_task(workload.name, total=1.0)
            tick = partial(_tell, progress, task)
            found = overhead.measure(workload, COST_VARIANTS, options, lambda name, why: None, tick, DECIDING)
            document[workload.name] = found
            promised = workload.name in PROMISED
            out.print(table.cost(f"{workload.name} ({found['about']['says']})", found, promised=promised))
            progress.remove_task(task)
    return document


def _tell(progress: Progress, task: TaskID, share: float) -> None:
    progress.update(task, completed=share)


def show(title: str, watches: dict[str, list[Heard]], out: Console) -> None:
    """The table, and what was not right."""
    out.print(table.accuracy(title, watches))
    out.print(table.misses("Not as the truth has it", [each for heards in watches.values() for each in heards]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=get_args(Part), action="append", help="this part; may be given again")
    parser.add_argument(
        "--loop", choices=LOOPS, action="append", metavar="NAME", help="only this one, as wild/two-keys"
    )
    parser.add_argument("--mode", choices=ours.MODES, action="append", help="only this way of tracing")
    parser.add_argument("--workload", choices=COST_WORKLOADS, action="append", help="cost: only this one")
    parser.add_argument("--time-factor", type=float, default=1.5, help="cost: of each workload's own time")
    parser.add_argument("--processes", type=int, default=2, help="of the loops; costs are measured in one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    return options


def main() -> None:
    options = arguments()
    parts = options.only or get_args(Part)
    loops = [loop for loop in LOOPS if loop in (options.loop or LOOPS)]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    document: dict[str, Any] = {"machine": overhead.machine()}
    out, errors = console(), Console(stderr=True)

    def keep() -> None:
        if options.json is not None:
            overhead.write(options.json, json_safe(document))

    with (
        Progress(console=errors, disable=not errors.is_terminal, transient=True) as progress,
        tempfile.TemporaryDirectory(prefix="tracing-") as scratch,
    ):
        if "accuracy" in parts:
            modes = options.mode or list(ours.MODES)
            traced = [(loop, mode, Path(scratch)) for mode in modes for loop in loops]
            found = heard_by(modes, traced, ours.hear, "traced loops", options.processes, progress)
            document["accuracy"] = {watch: document_of(heards) for watch, heards in found.items()}
            show("The operation that is named", found, out)
            keep()
        if "peers" in parts:
            watched = [(loop, peer) for peer in peers.PEERS for loop in loops if LOOPS[loop] in PEER_GROUPS]
            found = heard_by(list(peers.PEERS), watched, peers.hear, "peers", options.processes, progress)
            document["peers"] = {watch: document_of(heards) for watch, heards in found.items()}
            show("What others name", found, out)
            keep()
        if "cost" in parts:
            asked = options.workload or COST_WORKLOADS
            chosen = [each for each in WORKLOADS if each.name in asked]
            document["cost"] = costs(chosen, options.time_factor, progress, out)
            keep()


if __name__ == "__main__":
    main()
