"""How much memory watching takes at its worst moment, beyond the copies of the edited weights that a tier keeps.

    python -m benchmarks.memory [--workload gpt2 …] [--json FILE]

A loop of three real edits, from before it is attached until it is closed, is run unwatched and under each tier: the
same edits with the same warming up. Each time the peak is taken of what lay allocated at once beyond what lay there
before. The difference is by how much watching raises the loop's peak; of that the copies are taken off. Below 0 it is
where weights never move: then there is but one copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final

import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import stabilitylab as sl
from benchmarks.easyedit_loop import EASYEDIT
from benchmarks.loops import LOOPS
from benchmarks.variants import watching
from benchmarks.workloads import WORKLOADS, Subject
from stabilitylab.probes.base import DEEP_EVERY, Tier

COPIES: Final[dict[Tier, int]] = {"light": 0, "default": 2, "deep": 2}
"""Copies of the edited weights that a tier keeps by design: W₀ and the weights before this edit."""
EDITS: Final = 3
"""Real edits of the loop. Once one has moved a weight there are two copies of it, and an optimizer has its state."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what C++ code writes to stderr: the profiler announces each start and stop there."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that `action` held at once of what it allocated: torch's CPU allocator plus Python's with NumPy.

    The two peaks are added, as if they came together. The allocator's own events are exact; the resident set of a
    process is blurred by tens of MB of pages that malloc keeps.
    """
    gc.collect()
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tracemalloc.start()
        try:
            action()
            python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    highest: int = max(accumulate((change for _, change in changes), initial=0))
    return highest + python


def _loop(subject: Subject) -> None:
    for _ in range(EDITS):
        subject.round()


def _watched_loop(subject: Subject, tier: Tier, folder: Path) -> None:
    """Empty edits bring the run to the tenth, at which deep probes are due too, and which is the last real one."""
    with watching(subject, folder, probes=tier, budget=None) as (monitor, edit):
        for number in range(EDITS):
            for _ in range(DEEP_EVERY - EDITS if number == EDITS - 1 else 0):
                with monitor.edit():
                    pass
            edit()


def _warm_up(folder: Path) -> None:
    """What is imported when it is first needed is no memory of a loop's."""
    layer = nn.Linear(4, 4)
    with sl.attach(layer, "*", folder, probes="deep", announce=False) as monitor:
        for _ in range(DEEP_EVERY):
            with monitor.edit():
                layer(torch.ones(3, 4)).sum().backward()


def extra_mb(make: Callable[[], Subject], folder: Path) -> dict[str, float]:
    """Per tier the MB (10⁶ bytes) by which it raises the loop's peak beyond the tier's `COPIES`.

    With a budget no edit takes more than without one, and the first eight take as much.
    """
    _warm_up(folder / "warm")
    plain = peak_bytes(partial(_loop, make()))
    found: dict[str, float] = {}
    for tier, copies in COPIES.items():
        subject = make()
        peak = peak_bytes(partial(_watched_loop, subject, tier, folder / tier))
        kept = copies * sum(weight.nbytes for weight in subject.weights.values())
        found[tier] = (peak - plain - kept) / 1e6
    return found


def main() -> None:
    """See the module."""
    known = {workload.name: workload for workload in (*WORKLOADS, *LOOPS, EASYEDIT)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", action="append", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    found = {}
    print(f"| extra peak, MB | {' | '.join(COPIES)} |\n| --- |{' ---: |' * len(COPIES)}", flush=True)
    for name in options.workload or known:
        try:
            make = known[name].start(0)
        except ImportError as error:
            print(f"| {name} | left out: {error} |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = extra_mb(make, Path(scratch))
        print(f"| {name} | {' | '.join(f'{found[name][tier]:.1f}' for tier in COPIES)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
