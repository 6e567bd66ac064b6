"""Network: nothing is fetched and nobody is called. Sockets are forbidden but to this machine, in all processes.

In the short form a tour through every verb; in the long one the whole test suite. The guard is Python's own audit
(`offline/sitecustomize.py`), which sees what Python code opens: native code that opens a socket of its own is seen
where the system can take the network away (``unshare``), as errors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.reliability.promise import Effort, Result, counted
from tests import folders

_HERE: Final = Path(__file__).resolve().parent
_ROOT: Final = _HERE.parents[1]
_TOUR: Final = (
    ("lab", "compare", "--editors", "mend,grace", "--edits", "2", "--runs", "{out}/lab"),
    ("scan", "{out}/model", "-o", "{out}/scan.html"),
    ("check", "{run}", "--json"),
    ("report", "{run}", "-o", "{out}/report.html"),
    ("compare", "{run}", "{run}"),
    ("tail", "{run}", "--once"),
    ("probes",),
)
_PROGRAM: Final = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import stabilitylab as sl
from stabilitylab.reports.tensorboard_plugin.plugin import StabilityPlugin
run = sl.load(sys.argv[1])
run.plot.heatmap("update.norm").to_json()
run.to_frame()
shelf = StabilityPlugin(SimpleNamespace(logdir=str(run.path.parent)))._shelf
shelf.look()
shelf.read(run.path.name)
"""


def _offline(log: Path) -> dict[str, str]:
    paths = [str(_HERE / "offline"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    known = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "STABILITYLAB_CONNECTIONS": str(log)}
    return os.environ | known | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def _cut_off() -> list[str]:
    """The words before a command that has no network at all; none where the system can't."""
    words = ["unshare", "--net", "--map-root-user"]
    possible = (
        shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    )
    return words if possible else []


def _done(command: Sequence[str], log: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, env=_offline(log), check=False)
    usual = (0, 1, 3, 5)  # what `check` says of a run
    return "" if done.returncode in usual else f"{' '.join(command[-4:])}: exit {done.returncode}: {done.stderr[-200:]}"


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: no connection."""
    folder, before = effort.folder("network"), _cut_off()
    log = folder / "connections"
    log.touch()
    folders.write(folder / "model", folders.weights())
    run, breaks = folder / "lab" / "mend-0", []
    tour = [[sys.executable, "-m", "stabilitylab", *words] for words in _TOUR]
    tour.append([sys.executable, "-c", _PROGRAM, "{run}"])
    for number, words in enumerate(tour):
        effort.tell(f"offline: {words[3] if number < len(_TOUR) else 'tab and charts'}", number / len(tour))
        runs = sorted(folder.glob("lab/*/run.db"))
        run = runs[0].parent if runs else run
        command = [word.format(out=folder, run=run) if "{" in word and "\n" not in word else word for word in words]
        said = _done([*before, *command], log)
        breaks += [said] if said else []
    breaks += log.read_text().splitlines()
    how = "sockets forbidden" + (", no network at all" if before else "")
    yield counted(f"every verb, charts and tab, {how}", "connections, or errors without them", len(tour), breaks)
    if effort.long:
        effort.tell("the test suite, offline", 0.0)
        yield _suite(log)


def _suite(log: Path) -> Result:
    log.write_text("")
    words = ["-q", "-p", "no:cacheprovider", "--numprocesses", "2", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, env=_offline(log), check=False)
    connections, lines = log.read_text().splitlines(), done.stdout.strip().splitlines()
    return counted("the test suite, sockets forbidden", "connections", 1, connections, lines[-1] if lines else "")
