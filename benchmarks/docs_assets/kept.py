"""The runs that the documentation shows: kept compressed in docs/kept, read and judged anew each time."""

from __future__ import annotations

import json
import lzma
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from stabilitylab.record.store import FILE_NAME
from tests.sealing import seal

DOCS: Final = Path(__file__).parents[2] / "docs"
KEPT: Final = DOCS / "kept"
LAB: Final = {"malmen-seed0": "malmen", "grace-seed0": "grace", "mend+ball-seed0": "mend-ball"}
"""Runs of the lab, and the names under which they are kept."""
EDITS: Final = 40


def names() -> list[str]:
    """Of the runs that are kept, the demo's first."""
    return ["demo", *LAB.values()]


def unpack(folder: Path) -> dict[str, Path]:
    """Put the kept runs into runs/ of a folder; their paths by name."""
    paths = {}
    for name in names():
        paths[name] = folder / "runs" / name
        paths[name].mkdir(parents=True)
        (paths[name] / FILE_NAME).write_bytes(lzma.decompress((KEPT / f"{name}.db.xz").read_bytes()))
    return paths


def make() -> None:
    """Make the runs anew, as the documentation says, and keep them: two minutes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _say(folder, ["demo", "--out", "runs/demo"])
        editors = ",".join(name.removesuffix("-seed0") for name in LAB)
        _say(folder, ["lab", "compare", "--editors", editors, "--edits", str(EDITS), "--runs", "runs/lab"])
        KEPT.mkdir(exist_ok=True)
        _keep(folder / "runs" / "demo", "demo")
        for made, name in LAB.items():
            _keep(folder / "runs" / "lab" / made, name)


def _say(folder: Path, command: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "stabilitylab", *command], cwd=folder, check=True)


def _keep(run: Path, name: str) -> None:
    """One file, as small as it gets, which does not say where it was made."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copy(run / FILE_NAME, scratch))
        with closing(sqlite3.connect(copy)) as db:
            with db:
                db.execute("UPDATE manifest SET value = ? WHERE key = 'cwd'", (json.dumps("~/stabilitylab"),))
                here = (f"{DOCS.parent}/", "~/stabilitylab/")
                db.execute("UPDATE manifest SET value = replace(value, ?, ?) WHERE key = 'command'", here)
            db.execute("VACUUM")
        seal(copy)
        (KEPT / f"{name}.db.xz").write_bytes(lzma.compress(copy.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
