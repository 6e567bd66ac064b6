"""Reads mutants, in a process of its own that may hang or crash, and tells how that went; see `hostile_files`."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import stabilitylab as sl
from benchmarks.reliability import mutants
from benchmarks.reliability.forks import Say, waited_for_a_core
from benchmarks.reliability.promise import digest
from stabilitylab.errors import StabilityLabError

_BASE_MB, _FILE_FACTOR = 200.0, 4.0
_FORBIDDEN: Final = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "ctypes.dlopen",
)
"""Audited events that reading a file has no business to raise."""


def _read_run(path: Path, chance: random.Random, out: Path) -> None:
    from stabilitylab.record.following import Follower
    from stabilitylab.reports.comparison import write_comparison
    from stabilitylab.reports.html import write_report

    run = sl.load(path)
    str(run.diagnosis())
    how = chance.random()
    if how < 0.15:
        Follower(path, keeps_rows=True).look()
    elif how < 0.2:
        write_report(run, out / "report.html")
    elif how < 0.22:
        write_comparison([run, run], out / "several.html")


def _read_thresholds(path: Path, chance: random.Random, out: Path) -> None:
    from stabilitylab.analysis.thresholds import read

    read(path)


def _read_records(path: Path, chance: random.Random, out: Path) -> None:
    from stabilitylab.testbed.records import load_records

    load_records(path)


def _read_model(path: Path, chance: random.Random, out: Path) -> None:
    sl.scan(path, pickles=chance.random() < 0.5)


def _read_editor(path: Path, chance: random.Random, out: Path) -> None:
    from stabilitylab.acting.scanning.archives import open_archive
    from stabilitylab.acting.scanning.editors import scan_archive

    scan_archive(open_archive(path, pickles=chance.random() < 0.5))


KINDS: Final[dict[str, tuple[mutants.Maker, Callable[[Path, random.Random, Path], None]]]] = {
    "run files": (mutants.run_file, _read_run),
    "thresholds": (mutants.thresholds_file, _read_thresholds),
    "records": (mutants.records_file, _read_records),
    "model folders": (mutants.model_folder, _read_model),
    "editor states": (mutants.editor_state, _read_editor),
}


def _peak_mb(begin: bool) -> float:
    """The most memory held since it was last begun; 0 where the system does not say."""
    try:
        if begin:
            Path("/proc/self/clear_refs").write_text("5")
        text = Path("/proc/self/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        return 0.0


def _imported(read: Callable[[Path, random.Random, Path], None], sound: Path, out: Path) -> None:
    """What the first of its kind imports is no part of a mutant's time and memory."""
    if read is _read_run:
        from stabilitylab.reports.html import write_report

        write_report(sl.load(next(sound.iterdir())), out / "report.html")


def _contents(folder: Path) -> dict[str, str]:
    return {str(file): digest(file.read_bytes()) for file in sorted(folder.rglob("*")) if file.is_file()}


def try_out(say: Say, kind: str, sound: str, scratch: str, seed: int, first: int, last: int) -> None:
    """The mutants first to last of a kind, each told before and after it is read."""
    make, read = KINDS[kind]
    seen: list[str] = []
    reading = [False]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if reading[0] and event in _FORBIDDEN:
            seen.append(event)

    sys.addaudithook(audit)
    beside, mark, out = Path(scratch) / "beside", Path(scratch) / "it ran", Path(scratch) / "out"
    for folder in (beside, out):
        folder.mkdir(exist_ok=True)
    (beside / "package.json").write_text('{"name": "mine"}')
    _imported(read, Path(sound), out)
    for number in range(first, last):
        chance = random.Random(f"{seed} {kind} {number}")
        folder = Path(scratch) / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = make(folder, Path(sound), chance, mark)
        files = _contents(folder) | _contents(beside)
        size_mb = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
        say(f"> {number}")
        before, error = _peak_mb(begin=True), ""
        queued, began = waited_for_a_core(), time.monotonic()
        reading[0] = True
        try:
            read(path, chance, out)
            said = "read"
        except (StabilityLabError, OSError) as refused:
            said = "refused" if "\n" not in str(refused).strip() else "refused in several lines"
        except BaseException as raised:
            last_frame = traceback.extract_tb(raised.__traceback__)[-1]
            said = "traceback"
            error = (
                f"{type(raised).__name__}: {str(raised)[:80]!r} at {Path(last_frame.filename).name}:{last_frame.lineno}"
            )
        reading[0] = False
        seconds = time.monotonic() - began - (waited_for_a_core() - queued)
        grown = _peak_mb(begin=False) - before
        if grown > _FILE_FACTOR * size_mb + _BASE_MB:
            said, error = "memory", f"{grown:.0f} MB for {size_mb:.1f}"
        if mark.exists() or seen:
            said, error = "code ran", ", ".join(seen) or "payload"
            shutil.rmtree(mark, ignore_errors=True)
            seen.clear()
        now = _contents(folder) | _contents(beside)
        touched = [name for name in {*files, *now} if files.get(name) != now.get(name) and not name.endswith("-shm")]
        if touched:
            said, error = "touched files", ", ".join(Path(name).name for name in touched[:3])
        say("< " + json.dumps([number, said, error, seconds]))
