"""Old files: a run of each schema, as the version of its day wrote it, is read as it was.

The runs lie in ``tests/old_runs``, beside what they hold: the number of edits, and a digest of every reading's bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import stabilitylab as sl
from benchmarks.reliability.promise import Effort, Result, counted
from stabilitylab.record.following import Follower
from stabilitylab.record.run import Run
from stabilitylab.record.store import SCHEMA_VERSION
from stabilitylab.reports.comparison import write_comparison
from stabilitylab.reports.html import write_report

RUNS: Final = Path(__file__).resolve().parents[2] / "tests" / "old_runs"


def held(run: Run) -> dict[str, Any]:
    """What a run holds, whoever reads it."""
    readings = hashlib.blake2b(digest_size=16)
    for row in [*run.dry_edits, *(edit.row for edit in run.edits)]:
        for (metric, site), values in sorted(row.readings.items()):
            readings.update(f"{row.edit} {metric} {site} {len(values)}".encode() + values.tobytes())
    return {
        "edits": len(run.edits),
        "dry_edits": len(run.dry_edits),
        "labels": [edit.label for edit in run.edits],
        "outcomes": [edit.outcome for edit in run.edits],
        "operations": len(run.operations),
        "alarms": len(run.alarms),
        "readings": readings.hexdigest(),
    }


def what_is_wrong(folder: Path, scratch: Path) -> str:
    """Empty where a run is read, followed and judged, and holds what it held."""
    expected = json.loads((folder / "holds.json").read_text())
    copy = scratch / folder.name
    shutil.copytree(folder, copy)
    run = sl.load(copy)
    found = held(run)
    if found != expected:
        return f"holds other {', '.join(name for name in expected if found.get(name) != expected[name])}"
    follower = Follower(copy, keeps_rows=True)
    follower.look()
    if held(follower.run) != expected or follower.diagnosis() != run.diagnosis():
        return "is another one when it is followed"
    if run.diagnosis().verdict != "non-finite":  # its last states are NaN
        return f"is {run.diagnosis().verdict}"
    return ""


def show(folder: Path, scratch: Path) -> None:
    """Its pages."""
    run = sl.load(scratch / folder.name)
    write_report(run, scratch / f"{folder.name}.html")
    write_comparison([run, run], scratch / f"{folder.name}-twice.html")


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: all readable, each bit as it was."""
    scratch, breaks = effort.folder("old files"), []
    for version in range(1, SCHEMA_VERSION + 1):
        effort.tell(f"schema {version}", version / SCHEMA_VERSION)
        folder = RUNS / f"schema-{version}"
        said = what_is_wrong(folder, scratch) if folder.is_dir() else "has no run to try"
        breaks += [f"schema {version}: {said}"] if said else []
        if not said:
            show(folder, scratch)
    yield counted(f"a run of each schema, 1 to {SCHEMA_VERSION}", "not read as they were", SCHEMA_VERSION, breaks)
