"""Hostile files: whatever a run file, limits, records, a model's folder or an editor's state holds, it is read or
refused in one line, soon, in little memory, and nothing in it runs or touches anything.

Each mutant comes of the seed and its number alone; one that breaks a promise is named by its kind and number.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Final

import torch

from benchmarks.reliability.forks import Forks
from benchmarks.reliability.hostile_readers import KINDS
from benchmarks.reliability.old_files import RUNS
from benchmarks.reliability.promise import Effort, Result, counted
from stabilitylab.testbed import digits
from stabilitylab.testbed.blip2_digits import CHECKPOINTS
from tests import folders
from tests.synthetic import make_run

SHARES: Final = {
    "run files": 0.6,
    "thresholds": 0.1,
    "records": 0.1,
    "model folders": 0.12,
    "editor states": 0.08,
}
MOST_SECONDS: Final = 5.0
"""Of silence, which a busy machine makes longer."""
_ENDLESS_SECONDS: Final = 60.0
"""What is silent for so long is ended, and counts as hanging on any machine."""
_BATCH: Final = 200
_BROKEN: Final = ("traceback", "hang", "crash", "memory", "code ran", "touched files", "refused in several lines")


def make_sound(folder: Path) -> Path:
    """The files that mutants are made of."""
    from dataclasses import asdict

    runs = folder / "runs"
    make_run(runs / "dying", edits=14, sites=2, dies_at=10)
    make_run(runs / "healthy", edits=10, sites=1, dies_at=None)
    for schema in RUNS.glob("schema-*"):
        shutil.copytree(schema, runs / schema.name)
        (runs / schema.name / "holds.json").unlink()
    limits = resources.files("stabilitylab.analysis").joinpath("thresholds.json").read_text()
    (folder / "thresholds.json").write_text(limits)
    records = [asdict(record) for record in digits.edit_stream(0, 5)]
    (folder / "records.json").write_text(json.dumps(records))
    held = {name: tensor for name, tensor in folders.weights().items() if ".0." in name}
    folders.write(folder / "models" / "one", held)
    folders.write_shards(folder / "models" / "two", held)
    editors = folder / "editors"
    editors.mkdir()
    shutil.copy(CHECKPOINTS / "mend.safetensors", editors)
    torch.save({"model": {"u_std": torch.ones(4), "u_mean": torch.zeros(4)}}, editors / "archive")
    return folder


Slowest = tuple[float, str]
"""(seconds of silence, of which mutant)."""


def try_kind(
    effort: Effort, forks: Forks, kind: str, sound: Path, count: int
) -> tuple[Counter[str], list[str], Slowest]:
    """(how often each ending came, the breaks, the slowest of those that ended)."""
    scratch = effort.folder(f"mutants of {kind}")
    ends: Counter[str] = Counter()
    breaks, first, slowest = [], 0, (0.0, "none")
    while first < count:
        effort.tell(f"mutants of {kind}", first / count)
        arguments = {
            "kind": kind,
            "sound": str(sound / "runs" if kind == "run files" else sound),
            "scratch": str(scratch),
            "seed": effort.seed,
            "first": first,
            "last": min(first + _BATCH, count),
        }
        task = "benchmarks.reliability.hostile_readers:try_out"
        ended = forks.run(task, arguments, most_silent=_ENDLESS_SECONDS)
        for line in ended.said:
            if line.startswith("< "):
                number, said, error, seconds = json.loads(line[2:])
                slowest = max(slowest, (seconds, f"{kind} {number}"))
                ends[said] += 1
                first = number + 1
                if said in _BROKEN:
                    breaks.append(f"{kind} {number}: {said} {error}".strip())
        begun = [int(line[2:]) for line in ended.said if line.startswith("> ")]
        if begun and begun[-1] >= first:
            what = "hang" if ended.silent else "crash"
            ends[what] += 1
            breaks.append(f"{kind} {begun[-1]}: {what}")
            first = begun[-1] + 1
        elif ended.error:
            raise RuntimeError(f"making mutants of {kind} failed: {ended.error}")
    return ends, breaks, slowest


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: none."""
    sound, total = make_sound(effort.folder("sound")), effort.pick(600, 20_000)
    slowest = (0.0, "none")
    with Forks() as forks:
        for kind in KINDS:
            count = round(total * SHARES[kind])
            ends, breaks, slow = try_kind(effort, forks, kind, sound, count)
            slowest = max(slowest, slow)
            note = ", ".join(f"{ends[how]:,} {how}" for how in ("read", "refused"))
            yield counted(f"mutants of {kind}", "tracebacks, hangs, code run, files touched", count, breaks, note)
    seconds, which = slowest
    says = f"{seconds:.1f} s ({which})"
    yield Result("the slowest of them", f"under {MOST_SECONDS:.0f} s", says, seconds < MOST_SECONDS, total, clock=True)
