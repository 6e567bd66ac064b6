"""Runs of the failure zoo, made once and kept: the edit loops take most of the time, judging them next to none.

A run's folder is ``<scenario>-<seed>``; beside its ``run.db`` lies ``outcome.json`` with the truth and with what plain
torch saw. A folder without it was interrupted, and is made anew. Nobody looks whether a kept run's scenario has changed
since: delete the runs when it has.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.zoo import Outcome, State, Truth, by_name, run
from stabilitylab.analysis.findings import json_safe

Case = tuple[str, int]
"""A scenario's name and a seed."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def folder_of(case: Case, runs: Path) -> Path:
    """Where a case's run lies."""
    return runs / f"{case[0]}-{case[1]}"


def kept(case: Case, runs: Path) -> Outcome:
    """A run that was made before."""
    folder = folder_of(case, runs)
    plain = json.loads((folder / "outcome.json").read_text())
    truth, states = plain["truth"], plain["states"]
    return Outcome(
        by_name(case[0]),
        case[1],
        folder,
        Truth(**{**truth, "also": tuple(truth["also"])}),
        tuple(_state(state) for state in states),
    )


def _state(plain: dict[str, Any]) -> State:
    for name in ("updates", "drift"):
        plain[name] = {site: float(value) for site, value in plain[name].items()}
    for name in ("agreement", "perplexity_ratio"):
        plain[name] = float(plain[name])
    return State(**{**plain, "bad_weights": tuple(plain["bad_weights"]), "bad_outputs": tuple(plain["bad_outputs"])})


def make(case: Case, runs: Path, budget: float | None = None) -> Case:
    """Make a run, unless it is there. budget: as for `stabilitylab.attach`."""
    folder = folder_of(case, runs)
    if (folder / "outcome.json").exists():
        return case
    shutil.rmtree(folder, ignore_errors=True)
    outcome = run(by_name(case[0]), case[1], folder, budget=budget)
    plain = {"truth": asdict(outcome.truth), "states": [asdict(state) for state in outcome.states]}
    part = folder / "outcome.json.part"
    part.write_text(json.dumps(json_safe(plain), allow_nan=False))
    part.replace(folder / "outcome.json")
    return case


def spread(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """`function` of each job, in the order in which they get ready; torch has one thread in each process."""
    if processes == 1 or len(jobs) < 2:
        _one_thread()
        yield from map(function, jobs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pool
    with context.Pool(processes, initializer=_one_thread) as pool:
        yield from pool.imap_unordered(function, jobs)


def _one_thread() -> None:
    torch.set_num_threads(1)
