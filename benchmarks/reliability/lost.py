"""Nothing lost: kills, torn and cut files, full disks and folders that go away cost no acknowledged edit unsaid.

An edit is acknowledged when ``with monitor.edit()`` has ended. It is lost where the run that is found afterwards does
not hold its row with the readings that the same loop has when nothing happens to it; silently, where the run calls
itself complete, or does not name the edit where it could have been written.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

import stabilitylab as sl
from benchmarks.reliability.forks import Ended, Forks
from benchmarks.reliability.lost_loops import EDITS
from benchmarks.reliability.promise import Effort, Result, counted
from stabilitylab.errors import RunError
from stabilitylab.record.making import is_taken
from stabilitylab.record.note_kinds import DAMAGED, DAMAGED_ENTRY
from stabilitylab.record.store import FILE_NAME

LOOPS: Final = "benchmarks.reliability.lost_loops"
LOST: Final = re.compile(r"edits? (\d+)(?: to (\d+))? (?:was|were) not recorded")
UNREAD: Final = re.compile(
    r"(?:edits? (?P<first>\d+)(?: to (?P<last>\d+))?|the last (?:(?P<count>\d+) )?edits?, after edit (?P<after>\d+),)"
    r" can't be read"
)
_ROW: Final = ("edit", "label", "status", "started", "seconds", "probe_seconds", "canary_seconds", "error")
_MOST_SECONDS: Final = 0.25
_HEADER, _FRAME = 32, 24
"""Bytes before SQLite's log, and before each page in it."""
WAYS_TO_GO: Final = ("deleted", "moved", "replaced by a run", "replaced by a file", "replaced by a folder")

Readings = Mapping[tuple[str, str], bytes]


def readings_of(run: sl.Run) -> dict[int, Readings]:
    """Of each edit, as bytes."""
    return {edit.edit: {key: values.tobytes() for key, values in edit.row.readings.items()} for edit in run.edits}


def acknowledged(ended: Ended) -> int:
    """The last edit that the loop was told had ended; 0 where none."""
    return max([0, *(int(line) for line in ended.said if line.isdigit())])


def what_is_wrong(folder: Path, last: int, truth: Mapping[int, Readings]) -> str:
    """Empty where the run holds each edit up to `last` as it should, says so where not, and nothing else is in it."""
    try:
        run = sl.load(folder)
    except RunError as error:
        return "" if last == 0 and not is_taken(folder) else f"can't be read: {error}"
    found = readings_of(run)
    wrong = [edit for edit, readings in found.items() if truth.get(edit) != readings]
    said = {edit for note in run.notes for match in LOST.finditer(note.says) for edit in _stretch(match)}
    missing = ({*range(last + 1)} if last else set()) - {*found} - said
    if wrong:
        return f"edits {wrong[:5]} are not as they were"
    if missing:
        return f"edits {sorted(missing)[:5]} of {last} are missing, unsaid"
    if run.complete and len(found) != EDITS + 1:
        return f"complete, with {len(found)} of {EDITS + 1} rows"
    return ""


def _stretch(match: re.Match[str]) -> range:
    first = int(match[1])
    return range(first, int(match[2] or first) + 1)


def truth_of(forks: Forks, folder: Path) -> tuple[dict[int, Readings], dict[str, int]]:
    """(the readings of a loop that nothing happens to, the lines of the record that each of its stages runs)."""
    lines = {}
    for stage in ("attach", "edits", "close"):
        ended = forks.run(f"{LOOPS}:loop", {"run": str(folder / stage), "stage": stage})
        lines[stage] = int(ended.said[-1].partition(" ")[2])
    return readings_of(sl.load(folder / "close")), lines


def kills(effort: Effort, forks: Forks, truth: Mapping[int, Readings], lines: Mapping[str, int]) -> Iterator[Result]:
    """At lines of the record and at instructions of SQLite's, drawn evenly, and after some time; with a log and
    without.
    """
    folder, chance, each = effort.folder("kills"), effort.chance("kills"), effort.pick(15, 75)
    plans: dict[str, list[tuple[dict[str, object], float | None]]] = {
        f"kill -9 at {where}": []
        for where in ("attach", "a line of a write", "a point inside SQLite or at a time", "close")
    }
    at_attach, in_writes, inside, at_close = plans.values()
    for number in range(each):
        wal = number % 3 > 0
        at_attach.append(({"stage": "attach", "line": chance.randint(1, lines["attach"]), "wal": wal}, None))
        in_writes.append(({"stage": "edits", "line": chance.randint(1, lines["edits"]), "wal": wal}, None))
        at_close.append(({"stage": "close", "line": chance.randint(1, lines["close"]), "wal": wal}, None))
        if number % 2:
            inside.append(({"instruction": chance.randint(1, 1_500), "wal": wal}, None))
        else:
            inside.append(({"wal": wal}, chance.uniform(0.01, _MOST_SECONDS)))
    for test, jobs in plans.items():
        breaks, killed = [], 0
        for number, (arguments, kill_after) in enumerate(jobs):
            effort.tell(test, number / len(jobs))
            run = folder / f"{test} {number}"
            ended = forks.run(f"{LOOPS}:loop", {"run": str(run), **arguments}, kill_after=kill_after)
            killed += ended.by == signal.SIGKILL
            said = ended.error or what_is_wrong(run, acknowledged(ended), truth)
            if said:
                breaks.append(f"{arguments}, {kill_after}: {said}")
            shutil.rmtree(run, ignore_errors=True)
        yield counted(test, "acknowledged edits lost or unsaid", len(jobs), breaks, f"{killed} killed in time")


def damaged_logs(effort: Effort, forks: Forks, truth: Mapping[int, Readings]) -> Iterator[Result]:
    """A power cut: the log ends anywhere, in noise or in zeros; or the file's pages were being overwritten by it."""
    folder, chance, tries = effort.folder("logs"), effort.chance("logs"), effort.pick(60, 1_000)
    forks.run(f"{LOOPS}:written", {"run": str(folder / "run"), "copy": str(folder / "copy"), "before": 10, "seed": 0})
    log = (folder / "copy" / f"{FILE_NAME}-wal").read_bytes()
    file, folded = ((folder / "copy" / name).read_bytes() for name in (FILE_NAME, "checkpointed.db"))
    cut: list[str] = []
    torn: list[str] = []
    for number in range(tries):
        effort.tell("logs cut, pages torn", number / tries)
        at = chance.randrange(len(log))
        tail = {
            "cut": b"",
            "noise": chance.randbytes(min(512, len(log) - at)) + log[at + 512 :],
            "zeros": bytes(len(log) - at),
        }
        how = chance.choice(list(tail))
        said = _as_it_lies(folder / "cut", file, log[:at] + tail[how], truth, 9)
        cut += [f"{how} at byte {at}: {said}"] if said else []
        said = _as_it_lies(folder / "torn", _torn(file, folded, log, chance), log, truth, EDITS)
        torn += [f"try {number}: {said}"] if said else []
    yield counted("log cut, zeroed or overwritten at a random byte", "wrong rows, gaps or unsaid", tries, cut)
    yield counted("pages torn while the log is folded in", "acknowledged edits lost", tries, torn)


def _as_it_lies(folder: Path, file: bytes, log: bytes, truth: Mapping[int, Readings], last: int) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(file)
    (folder / f"{FILE_NAME}-wal").write_bytes(log)
    said = what_is_wrong(folder, last, truth)
    if not said:
        found = [edit.edit for edit in sl.load(folder).edits]
        said = "" if found == list(range(len(found))) else f"holds {found}"
    return said


def _torn(old: bytes, new: bytes, log: bytes, chance: random.Random) -> bytes:
    """`old` with some of the pages that are in the log overwritten by the new ones, some of them half."""
    (size,) = struct.unpack(">I", log[8:12])
    pages = {struct.unpack(">I", log[at : at + 4])[0] for at in range(_HEADER, len(log), _FRAME + size)}
    found = bytearray(old)
    for page in sorted(pages):
        start, share = (page - 1) * size, chance.choice((0.0, chance.random(), 1.0))
        if start + size <= len(new) and share:
            if len(found) < start + size:
                found += bytes(start + size - len(found))
            end = start + int(share * size)
            found[start:end] = new[start:end]
    return bytes(found)


def rotten_files(effort: Effort, forks: Forks, truth: Mapping[int, Readings]) -> Iterator[Result]:
    """A closed file of which some bytes have changed: what it says is right, and what it can no longer say is named."""
    folder, chance, tries = effort.folder("rotten"), effort.chance("rotten"), effort.pick(60, 1_000)
    forks.run(f"{LOOPS}:loop", {"run": str(folder / "run")})
    whole, breaks, ends = (folder / "run" / FILE_NAME).read_bytes(), [], Counter[str]()
    sound = sl.load(folder / "run")
    for number in range(tries):
        effort.tell("rotten files", number / tries)
        data, at = bytearray(whole), chance.randrange(100, len(whole))
        length = chance.choice((1, 16, 512, 4_096))
        piece = chance.choice((bytes(length), chance.randbytes(length), whole[-length:]))
        data[at : at + length] = piece
        (folder / "run" / FILE_NAME).write_bytes(data[: len(whole)])
        try:
            found = sl.load(folder / "run")
        except RunError:
            ends["called damaged"] += 1
            continue
        ends["with named losses" if DAMAGED_ENTRY in found.manifest else "read whole"] += 1
        said = _what_is_rotten(found, sound)
        breaks += [f"{length} bytes at {at}: {said}"] if said else []
    note = ", ".join(f"{ends[how]} {how}" for how in ("called damaged", "with named losses", "read whole"))
    yield counted("bytes of a closed file changed", "wrong values, or losses unsaid", tries, breaks, note)


def _what_is_rotten(found: sl.Run, sound: sl.Run) -> str:
    """Empty where all that a changed run holds is as in the sound one, and it says of what it does not hold."""
    manifest = {key: value for key, value in found.manifest.items() if key != DAMAGED_ENTRY}
    said = [note for note in found.notes if note.kind == DAMAGED]
    parts: dict[str, tuple[list[Any], list[Any]]] = {
        "edits": (_edits(found), _edits(sound)),
        "alarms": (list(found.alarms), list(sound.alarms)),
        "notes": ([note for note in found.notes if note.kind != DAMAGED], list(sound.notes)),
        "operations": (list(found.operations), list(sound.operations)),
    }
    if manifest != sound.manifest or found.metrics != sound.metrics:
        return "says something else of the run as a whole"
    for what, (held, right) in parts.items():
        if [each for each in right if each in held] != held:
            return f"holds other {what}"
    lacks = parts["edits"][0] != parts["edits"][1] or len(found.edits) < len(sound.edits)
    if lacks and (not said or found.complete):
        return "lacks edits, or what became of them, unsaid"
    named = {edit for note in said for match in UNREAD.finditer(note.says) for edit in _unread(match)}
    missing = {edit.edit for edit in sound.edits} - {edit.edit for edit in found.edits} - named
    return f"does not name edits {sorted(missing)[:5]}" if missing else ""


def _edits(run: sl.Run) -> list[tuple[object, ...]]:
    """Of each edit: what its row holds, its readings as bytes; and of each that has one, its outcome."""
    rows = [
        (*(getattr(edit.row, name) for name in _ROW), *sorted(readings.items()))
        for edit, readings in zip(run.edits, readings_of(run).values(), strict=True)
    ]
    return [*rows, *((edit.edit, edit.outcome) for edit in run.edits if edit.outcome is not None)]


def _unread(match: re.Match[str]) -> range:
    if match["after"] is not None:
        return range(int(match["after"]) + 1, int(match["after"]) + 1 + int(match["count"] or 1))
    return range(int(match["first"]), int(match["last"] or match["first"]) + 1)


def full_disks(effort: Effort, forks: Forks, truth: Mapping[int, Readings]) -> Iterator[Result]:
    """At attach, at each edit for some edits, and to the end."""
    folder, chance = effort.folder("full"), effort.chance("full")
    plans = [(0, EDITS + 1, chance.randrange(60_000)) for _ in range(effort.pick(8, 60))]
    for at in range(1, EDITS + 1, effort.pick(2, 1)):
        plans += [(at, at + chance.randint(1, EDITS), chance.choice((0, 300, chance.randrange(30_000))))]
    breaks = []
    for number, (at, until, spare) in enumerate(plans):
        effort.tell("full disks", number / len(plans))
        run = folder / str(number)
        ended = forks.run(f"{LOOPS}:full_disk", {"run": str(run), "at": at, "until": until, "spare": spare})
        refused = any(line.startswith("refused") for line in ended.said)
        last = acknowledged(ended)
        if ended.error or not (refused or "closed" in ended.said):
            said = ended.error or f"ended by {ended.by}"
        elif refused:
            said = "left something behind" if is_taken(run) else ""
        elif until > EDITS:  # never room again: it can't say so inside, and is not closed
            said = _is_open(run)
        else:
            said = what_is_wrong(run, last, truth)
        breaks += [f"full from edit {at} to {until}, {spare} bytes spare: {said}"] if said else []
    yield counted("disk full at attach and at each edit", "edits lost unsaid", len(plans), breaks)


def _is_open(run: Path) -> str:
    try:
        found = sl.load(run)
    except RunError as error:
        return f"can't be read: {error}"
    return "complete" if found.complete and len(found.edits) <= EDITS else ""


def folders_gone(effort: Effort, forks: Forks, truth: Mapping[int, Readings]) -> Iterator[Result]:
    """At a random edit, in each way."""
    folder, chance, breaks = effort.folder("gone"), effort.chance("gone"), []
    plans = [(how, chance.randint(1, EDITS)) for how in WAYS_TO_GO for _ in range(effort.pick(2, 10))]
    for number, (how, at) in enumerate(plans):
        effort.tell("folders gone", number / len(plans))
        run = folder / str(number) / "run"
        run.parent.mkdir()
        ended = forks.run(f"{LOOPS}:folder_gone", {"run": str(run), "at": at, "how": how})
        places = [line[3:] for line in ended.said if line.startswith("at ")]
        said = ended.error or "not closed"
        if places:
            kept = sorted(run.parent.glob("run*/run.db"), key=lambda file: _rows(file.parent))
            said = what_is_wrong(kept[-1].parent, EDITS, truth) if kept else "no run left"
            if how == "replaced by a run" and len(sl.load(run).edits) != 2:
                said = "the other run was written to"
            if how == "replaced by a file" and run.read_text() != "mine":
                said = "the file was written to"
        breaks += [f"{how} before edit {at}: {said}"] if said else []
    yield counted(
        "folder deleted, moved, replaced",
        "edits lost unsaid, foreign files touched",
        len(plans),
        breaks,
    )


def _rows(run: Path) -> int:
    try:
        return len(sl.load(run).edits)
    except RunError:
        return -1


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: none lost, none silently missing."""
    with Forks() as forks:
        truth, lines = truth_of(forks, effort.folder("truth"))
        assert np.isfinite(np.frombuffer(truth[EDITS]["update.norm", "0"])).all()
        yield from kills(effort, forks, truth, lines)
        yield from damaged_logs(effort, forks, truth)
        yield from rotten_files(effort, forks, truth)
        yield from full_disks(effort, forks, truth)
        yield from folders_gone(effort, forks, truth)
