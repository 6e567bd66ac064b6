"""Long loops and the reading of what they leave, in processes of their own; see `long`. Knows no goal."""

from __future__ import annotations

import json
import resource
import statistics
import time
from pathlib import Path
from typing import Final

import stabilitylab as sl
from benchmarks.reliability.forks import Say

PARTS: Final = 10


def resident_mb() -> float:
    """Of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def edit(say: Say, run: str, sites: int, edits: int) -> None:
    """So many edits of so many layers; tells after each tenth the median CPU seconds of its edits and the memory."""
    import gc

    import torch
    from torch import nn

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(sites)))
    weights = [weight for name, weight in model.named_parameters() if name.endswith("weight")]
    with sl.attach(model, "*", run=run, probes="light", announce=False, trace=False) as monitor, torch.no_grad():
        for part in range(PARTS):
            took = []
            for number in range(edits // PARTS):
                began = time.process_time()
                with monitor.edit(f"edit {number}"):
                    weights[number % sites].add_(1e-3 if number % 2 else -1e-3)
                took.append(time.process_time() - began)
            gc.collect()
            say(json.dumps({"part": part, "seconds": statistics.median(took), "mb": resident_mb()}))


def read(say: Say, run: str, out: str) -> None:
    """Open, diagnose and report; tells the CPU seconds."""
    from stabilitylab.reports.html import write_report

    began = time.process_time()
    found = sl.load(run)
    verdict = found.diagnosis().verdict
    write_report(found, out)
    say(json.dumps({"seconds": time.process_time() - began, "edits": len(found), "verdict": verdict}))
