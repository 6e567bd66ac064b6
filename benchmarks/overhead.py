"""What watching costs: CPU time of a watched edit as a ratio to the same edit unwatched, for our tiers and for others.

    python -m benchmarks.overhead [--workload gpt2 …] [--variants default,a_a] [--json FILE] [--markdown]

Everything runs on one thread in one process. Plain edits and watched ones alternate, P V P V P …, and each watched edit
is compared with the mean of the two plain ones beside it. The noise of a shared machine is correlated over neighbours
(0.4 to 0.8 from one plain edit to the next, measured here) and comes in bursts: close neighbours cancel the first, and
the median over pairs ignores the second. Comparing with all plain edits of a round spread by a third more. The order of
the variants is shuffled anew in each round, so none always follows the same one. Each variant edits a model of its own
(the weights that nobody edits are shared); so does ``a_a``, plain to plain, which shows what noise alone makes of it.
The plain edits take turns on as many models as there are variants: one model edited every second time would stay in the
caches (1.4% on the demo's small one).

A workload is done when the 95% intervals of the medians of ``a_a`` and ``whole`` are both narrower than 0.01, or when
its time is over (`Workload.seconds`, times ``--time-factor``), but not before 6 rounds, the fewest that give an
interval, nor after ``--pairs`` rounds. The rule looks at widths, never at where the medians lie.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import quantile_test
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import stabilitylab as sl
from benchmarks.easyedit_loop import EASYEDIT
from benchmarks.loops import LOOPS
from benchmarks.memory import COPIES, extra_mb
from benchmarks.variants import VARIANTS, Action, Variant
from benchmarks.workloads import TRACED, WORKLOADS, Subject, Workload

LEAST_ROUNDS = 6
WISHED_WIDTH = 0.01
DECIDING = ("a_a", "whole")
ADDED = {
    "armed and quiet": ("bare_armed", "bare"),
    "traced, no probes": ("bare_traced", "bare"),
    "traced in full, no probes": ("bare_ranges", "bare"),
    "traced, default probes": ("traced", "whole"),
}
"""What the tracer adds to the same monitor without it: pairs of variants."""
HEADER = ("CPU time to plain", "median", "95%", "min", "max", "pairs", "inside", "MB")
LEGEND = (
    "95%: interval of the median, from order statistics; – below 6 pairs. inside: share of the edits' wall time inside "
    "probes (canary: in its forwards; tracer, bare and traced: in the tracer, which no other row has). MB: peak memory "
    "beyond two copies of the edited weights (light: beyond none, it keeps none)."
)


@dataclass
class Measured:
    """Of one variant: CPU seconds of each watched edit, and the mean of its two plain neighbours."""

    watched: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def ratios(self, cycle: int) -> list[float]:
        """One ratio for each whole cycle of edits."""
        starts = range(0, len(self.watched) - cycle + 1, cycle)
        return [sum(self.watched[at : at + cycle]) / sum(self.plain[at : at + cycle]) for at in starts]


def summary(ratios: Sequence[float]) -> dict[str, float | int | None]:
    """Median, extremes and the median's 95% interval from order statistics: None below 6 ratios, and all of 0."""
    if not ratios:
        return {"median": None, "min": None, "max": None, "low": None, "high": None, "pairs": 0}
    interval = quantile_test(ratios, q=0, p=0.5).confidence_interval(0.95)
    low, high = (None if math.isnan(end) else float(end) for end in interval)
    median = statistics.median(ratios)
    return {
        "median": median,
        "min": min(ratios),
        "max": max(ratios),
        "low": low,
        "high": high,
        "pairs": len(ratios),
    }


def cpu_seconds(action: Action) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def resolved(measured: Mapping[str, Measured], deciding: Iterable[str] = DECIDING) -> bool:
    """Whether the deciding intervals are as narrow as wished."""
    for name in deciding:
        if name in measured:
            found = summary(measured[name].ratios(1))
            low, high = found["low"], found["high"]
            if low is None or high is None or high - low >= WISHED_WIDTH:
                return False
    return True


def measure_pairs(
    plains: Iterator[Action],
    actions: Mapping[str, Action],
    seconds: float,
    pairs: int,
    chance: random.Random,
    tick: Callable[[float], None],
    deciding: Iterable[str] = DECIDING,
) -> tuple[dict[str, Measured], str]:
    """Rounds of pairs, and why they ended: ``"resolved"``, ``"time"`` or ``"pairs"``. tick: is told the share done."""
    measured = {name: Measured() for name in actions}
    limits = {name: min(VARIANTS[name].rounds, pairs) for name in actions}
    started = time.monotonic()
    before = cpu_seconds(next(plains))
    over = False
    for number in range(max(limits.values())):
        # When time is over, what is measured by cycles of edits goes on to the end of its first.
        here = [name for name in actions if number < limits[name] and (not over or number < VARIANTS[name].cycle)]
        if not here:
            break
        chance.shuffle(here)
        for name in here:
            watched, after = cpu_seconds(actions[name]), cpu_seconds(next(plains))
            measured[name].watched.append(watched)
            measured[name].plain.append((before + after) / 2)
            before = after
            tick(min(1.0, (time.monotonic() - started) / seconds))
        if number + 1 >= LEAST_ROUNDS and not over:
            over = time.monotonic() - started > seconds
            others_done = all(number + 1 >= limit for name, limit in limits.items() if limit < pairs)
            if not over and others_done and resolved(measured, deciding):
                return measured, "resolved"
    return measured, "time" if over else "pairs"


def prepare(
    names: Iterable[str],
    make: Callable[[], Subject],
    folder: Path,
    stack: ExitStack,
    skip: Callable[[str, str], None],
) -> dict[str, Action]:
    """The watched edits, each run once to warm up. A peer that can't be had, or fails, is skipped with the reason."""
    actions: dict[str, Action] = {}
    for name in names:
        try:
            action = VARIANTS[name].make(make(), folder / name, stack)
            action()
        except ImportError as error:
            if VARIANTS[name].ours:
                raise
            skip(name, f"not installed ({error})")
        except Exception as error:
            if VARIANTS[name].ours:
                raise
            skip(name, f"{type(error).__name__}: {error}")
        else:
            actions[name] = action
    return actions


def own_account(names: Iterable[str], folder: Path) -> dict[str, Any]:
    """What our runs say themselves: time shares. Raises RuntimeError when a probe or the tracer broke: it would look
    cheap.
    """
    shares: dict[str, Any] = {"probe_time_share": {}, "trace_time_share": {}}
    for name in names:
        if not (folder / name / "run.db").exists() or name not in (*COPIES, *TRACED, "whole", "canary", "tracer"):
            continue
        run = sl.load(folder / name)
        broken = [note.says for note in run.notes if note.kind in ("probe-off", "trace-off")]
        if broken:
            raise RuntimeError(f"{name}: {'; '.join(broken)}")
        shares["trace_time_share"][name] = run.trace_time_share
        if name == "canary":
            shares["canary_time_share"] = run.canary_time_share
        else:
            shares["probe_time_share"][name] = run.probe_time_share
    return shares


def added(measured: Mapping[str, Measured], name: str, without: str) -> list[float]:
    """What a variant takes beyond another one, round by round: the quotient of their ratios."""
    pairs = zip(measured[name].ratios(1), measured[without].ratios(1), strict=False)
    return [ratio / beside for ratio, beside in pairs]


def measure(
    workload: Workload,
    names: Sequence[str],
    options: argparse.Namespace,
    skip: Callable[[str, str], None],
    tick: Callable[[float], None],
    deciding: Sequence[str] = DECIDING,
) -> dict[str, Any]:
    """Everything about one workload, as it goes into the JSON file. deciding: whose intervals end it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make = workload.start(options.seed)
        with ExitStack() as stack:
            actions = prepare(names, make, folder, stack, skip)
            if not actions:
                raise RuntimeError("none of the variants asked for can run here")
            plains = itertools.cycle([make().round for _ in actions])
            gc.collect()
            gc.freeze()  # a full collection in the midst would walk through all that was imported
            try:
                seconds = workload.seconds * options.time_factor
                chance = random.Random(options.seed)
                measured, why = measure_pairs(plains, actions, seconds, options.pairs, chance, tick, deciding)
            finally:
                gc.unfreeze()
        found: dict[str, Any] = {name: summary(seen.ratios(VARIANTS[name].cycle)) for name, seen in measured.items()}
        found |= own_account(names, folder)
        if {*COPIES} & {*names}:
            found["extra_memory_mb"] = extra_mb(make, folder / "memory")
        found["added"] = {
            what: summary(added(measured, *pair)) for what, pair in ADDED.items() if {*pair} <= {*measured}
        }
        neighbours = [value for seen in measured.values() for value in seen.plain]
        found["about"] = {"says": workload.says, "ended_by": why, "plain_cpu_seconds": statistics.median(neighbours)}
    return found


def cells(variant: Variant, found: Mapping[str, Any]) -> list[str]:
    """One row of the table."""
    ratio = found[variant.name]

    def number(key: str, digits: int = 3) -> str:
        return "–" if ratio[key] is None else f"{ratio[key]:.{digits}f}"

    interval = "–" if ratio["low"] is None else f"{number('low')}–{number('high')}"
    share = found["probe_time_share"].get(variant.name)
    if variant.name == "canary":
        share = found.get("canary_time_share")
    if variant.name in (*TRACED, "tracer"):
        share = found["trace_time_share"].get(variant.name)
    memory = found.get("extra_memory_mb", {}).get(variant.name)
    return [
        variant.label or variant.name,
        number("median"),
        interval,
        number("min", 2),
        number("max", 2),
        str(ratio["pairs"]),
        "" if share is None else f"{share:.1%}",
        "" if memory is None else f"{memory:.1f}",
    ]


def show(workload: Workload, found: Mapping[str, Any], console: Console, markdown: bool) -> None:
    about = found["about"]
    says = f"{workload.says}. Plain edit: {about['plain_cpu_seconds']:.3g} CPU s. Ended by: {about['ended_by']}."
    rows = [cells(variant, found) for name, variant in VARIANTS.items() if name in found]
    if markdown:
        lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *rows]
        print(f"### {workload.name}\n\n{says}\n")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n", flush=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.title, table.title_style = f"{workload.name}: {says}", ""
    for title in HEADER:
        table.add_column(title, justify="left" if title == HEADER[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def _tell(progress: Progress, task: TaskID, share: float) -> None:
    progress.update(task, completed=share)


def machine() -> dict[str, Any]:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def variant_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no variant {unknown[0]!r}; expected some of {','.join(VARIANTS)}")
    return names


def arguments() -> argparse.Namespace:
    known = {workload.name: workload for workload in (*WORKLOADS, *LOOPS, EASYEDIT)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", action="append", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument(
        "--variants", type=variant_names, metavar="A,B", help="only these, also where they aren't measured by default"
    )
    parser.add_argument("--pairs", type=int, default=150, metavar="N", help="the most rounds (default: %(default)s)")
    parser.add_argument("--time-factor", type=float, default=1.0, help="of each workload's own time (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables, for the docs")
    options = parser.parse_args()
    if options.pairs < 1 or not options.time_factor > 0:
        parser.error("expected --pairs of 1 or more and a --time-factor above 0")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    options.workload = [known[name] for name in options.workload or known]
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    console, errors = Console(), Console(stderr=True)
    document: dict[str, Any] = {"workloads": {}, "machine": machine(), "skipped": {}, "failed": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        threadpool_limits(1),  # NumPy's and SciPy's own threads, which torch's setting doesn't reach
        Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress,
    ):
        for workload in options.workload:
            names = [
                name
                for name in VARIANTS
                if name in workload.possible and name in (options.variants or workload.variants)
            ]
            if not names:
                document["skipped"][workload.name] = "none of the variants asked for is possible there"
                continue
            task = progress.add_task(workload.name, total=1.0)
            try:
                found = measure(
                    workload,
                    names,
                    options,
                    document["skipped"].setdefault,
                    partial(_tell, progress, task),
                )
            except ImportError as error:
                document["skipped"][workload.name] = f"not installed ({error})"
            except Exception as error:
                document["failed"][workload.name] = f"{type(error).__name__}: {error}"
                errors.print(f"{workload.name} failed: {type(error).__name__}: {error}", markup=False)
            else:
                document["workloads"][workload.name] = found
                show(workload, found, console, options.markdown)
            progress.remove_task(task)
            if options.json:
                write(options.json, document)
    notes = [LEGEND, *(f"Skipped: {name}, {reason}." for name, reason in document["skipped"].items())]
    for note in notes:
        print(f"{note}\n") if options.markdown else console.print(note, markup=False, highlight=False)
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
