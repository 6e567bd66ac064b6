"""How much memory watching takes at its worst moment, beyond the copies of the edited weights that a tier keeps."""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import stabilitylab as sl
from benchmarks.workloads import Subject
from stabilitylab.probes.base import DEEP_EVERY, Tier

COPIES: dict[Tier, int] = {"light": 0, "default": 2, "deep": 2}
"""Copies of the edited weights that a tier keeps by design: W₀ and the weights before this edit."""


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


def extra_mb(make: Callable[[], Subject], folder: Path) -> dict[str, float]:
    """Per tier the MB (10⁶ bytes) by which attach and edits raise an edit's peak, less the tier's `COPIES`.

    Nine empty edits bring the run to the tenth, at which deep probes are due too, and which is a real one.
    """
    plain = peak_bytes(make().edit)
    found: dict[str, float] = {}
    for tier, copies in COPIES.items():
        subject = make()

        def watched(subject: Subject = subject, tier: Tier = tier) -> None:
            options = {"probes": tier, "editor": subject.editor, "budget": None}
            with sl.attach(subject.model, subject.sites, folder / tier, **options) as monitor:  # type: ignore[arg-type]
                for _ in range(DEEP_EVERY - 1):
                    with monitor.edit():
                        pass
                with monitor.edit():
                    subject.edit()

        kept = copies * sum(weight.nbytes for weight in subject.weights.values())
        found[tier] = (peak_bytes(watched) - plain - kept) / 1e6
    return found
