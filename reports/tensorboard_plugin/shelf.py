"""The runs under a logdir: looked for by a thread of its own, read when asked for, read again when they have grown.

A run of very many edits takes seconds to judge. That is done in a thread of its own, and whoever asks meanwhile is told
how far it has come; the other runs need not wait for it.

A request names a run by an id, which is looked up among what was found: no path is ever made from a request. Links are
not followed, so that nothing outside the logdir can be reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
import stat
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stabilitylab.errors import StabilityLabError
from stabilitylab.record.following import Follower
from stabilitylab.record.run import Run
from stabilitylab.record.runfile import FILE_NAME
from stabilitylab.record.spelling import spell
from stabilitylab.reports.tensorboard_plugin import payload
from stabilitylab.reports.text import clean

KEPT: Final = 8
"""How many read runs stay in memory, and how many versions of one of them."""
VERSIONS: Final = 2
LOOK_SECONDS: Final = 2.0
"""Between two looks through the logdir, at the least."""
SHORT_SECONDS: Final = 0.2
"""Between two rounds, however often the list is asked for."""
SHARE: Final = 0.1
"""Of a thread's time: to look through the logdir, and to read a growing run anew, at the most."""
WATCHED_SECONDS: Final = 60.0
"""How long after a request for the list runs are still read ahead."""

PATIENCE_SECONDS: Final = 1.0
"""For so long who asks for a run waits until it is judged."""
AT_ONCE: Final = 2
"""Runs that are judged at once because they are in the list; those that are asked for come on top."""

SAYS: Final = 500

_log = logging.getLogger(__name__)
_log.addFilter(spell)
_Stamp = tuple[tuple[int, int, int], ...]


def local_folder(logdir: str | None) -> Path | None:
    """The folder that TensorBoard's ``--logdir`` names, links resolved; None for a remote one, and where none is."""
    if not logdir or "://" in logdir:
        return None
    return Path(os.path.realpath(os.path.expanduser(logdir)))


def search(root: Path) -> dict[str, Path]:
    """Run files under `root` by id: the run folder's path below `root`, percent-encoded. Follows no link."""
    found = {}
    for folder, inside, files in os.walk(root):
        inside.sort()
        if FILE_NAME in files and _is_plain(Path(folder, FILE_NAME)):
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            found[urllib.parse.quote(os.fsencode(below))] = Path(folder, FILE_NAME)
    return found


def _is_plain(file: Path) -> bool:
    """Whether this is a file of its own: no link, no pipe, no device."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False


def _stamp(file: Path) -> _Stamp:
    """What changes whenever the run does."""
    seen = []
    for path in (file, file.with_name(f"{file.name}-wal")):
        try:
            about = path.lstat()
        except OSError:
            seen.append((0, 0, 0))
        else:
            seen.append((about.st_ino, about.st_mtime_ns, about.st_size))
    return tuple(seen)


@dataclass(frozen=True)
class Copy:
    """A run as it was read at one moment, or why it could not be. version: names that moment. about: see `payload`."""

    version: str
    run: Run | None
    about: Mapping[str, Any]
    summary: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class _Line:
    """What stays known of each run. read_at, cost: when it was last read, and for how long, in seconds."""

    stamp: _Stamp
    version: str
    summary: Mapping[str, Any]
    reason: str
    read_at: float
    cost: float

    def fresh(self, stamp: _Stamp) -> bool:
        """Whether it need not be read again: it has not changed, or it grows faster than it should be read."""
        return self.stamp == stamp or time.monotonic() - self.read_at < self.cost / SHARE


class _Judging:
    """A run that is being read. done: once it is; then there is a copy, or what went wrong."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.copy: Copy | None = None
        self.error: Exception | None = None


class Shelf:
    """Finds and reads. Thread-safe. `len`, `listing`, `progress` and `copy` never wait for a disk."""

    def __init__(self, root: Path) -> None:
        """root: as `local_folder` gives it."""
        self._root = root
        self._looked = False
        self._found: Mapping[str, Path] = {}
        self._lines: dict[str, _Line] = {}
        self._copies: OrderedDict[tuple[str, str], Copy] = OrderedDict()
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._followers: dict[str, Follower] = {}
        self._judging: dict[str, _Judging] = {}
        self._wake = threading.Event()
        self._asked = -math.inf

    def start(self) -> None:
        """Begin to look, in a thread that ends with the program."""
        threading.Thread(target=self._work, name="stabilitylab-shelf", daemon=True).start()

    def __len__(self) -> int:
        """How many runs were found at the last look."""
        return len(self._found)

    def look(self) -> None:
        """Look through the logdir now."""
        found = search(self._root)
        with self._lock:
            self._found, self._looked = found, True
            for known in (self._lines, self._followers):
                for gone in known.keys() - found.keys():
                    known.pop(gone)

    def listing(self) -> dict[str, Any]:
        """What is known of each run found. Asks the thread to bring it up to date."""
        self._asked = time.monotonic()
        self._wake.set()
        with self._lock:
            runs = [
                {**_entry(run, self._lines.get(run)), **({} if run in self._lines else self._progress(run))}
                for run in sorted(self._found, key=_by_number)
            ]
            return {"looked": self._looked, "runs": runs}

    def progress(self, run: str) -> dict[str, Any]:
        """How many edits of a run are judged, and of how many; nothing where it is not being judged."""
        with self._lock:
            return self._progress(run)

    def _progress(self, run: str) -> dict[str, Any]:
        follower = self._followers.get(run) if run in self._judging else None
        return {} if follower is None else {"judged": follower.edits, "of": follower.last_edit}

    def ask(self, run: str, patience: float | None) -> Copy | None:
        """As `read`, within `patience` seconds. Where it takes longer it goes on, and this is the copy before, if any.

        Raises KeyError for one that isn't there.
        """
        with self._lock:
            file = self._found[run]
            line = self._lines.get(run)
            before = None if line is None else self._copies.get((run, line.version))
        if line is not None and before is not None and line.fresh(_stamp(file)):
            return before
        with self._lock:
            judging = self._judging.get(run)
            if judging is None:
                judging = self._judging[run] = _Judging()
                threading.Thread(target=self._judge, args=(run, judging), name="stabilitylab-run", daemon=True).start()
        if not judging.done.wait(patience):
            return before
        if judging.error is not None:
            raise judging.error
        return judging.copy

    def _judge(self, run: str, judging: _Judging) -> None:
        try:
            judging.copy = self.read(run)
        except Exception as error:  # for those who wait
            judging.error = error
        finally:
            with self._lock:
                self._judging.pop(run, None)
            judging.done.set()

    def read(self, run: str) -> Copy:
        """The run as it stands, or stood a moment ago where it grows fast. Raises KeyError for one that isn't there."""
        with self._lock:
            file = self._found[run]
            turn = self._turns.setdefault(run, threading.Lock())
        with turn:
            stamp = _stamp(file)
            with self._lock:
                line = self._lines.get(run)
                copy = None if line is None else self._copies.get((run, line.version))
            if line is not None and copy is not None and line.fresh(stamp):
                return copy
            if not _is_plain(file) or file.parent.resolve() != file.parent:
                raise KeyError(run)
            began = time.monotonic()
            copy = _load(stamp, self._followers.setdefault(run, Follower(file, keeps_rows=True)))
            ended = time.monotonic()
            with self._lock:
                if copy.run is None or copy.run.closed:  # damaged, or grows no more
                    self._followers.pop(run, None)
                self._lines[run] = _Line(stamp, copy.version, copy.summary, copy.reason, ended, ended - began)
                self._keep(run, copy)
            return copy

    def _keep(self, run: str, copy: Copy) -> None:
        """Of the same run the version before is kept too: a page may be drawing it."""
        self._copies[run, copy.version] = copy
        self._copies.move_to_end((run, copy.version))
        versions = [key for key in self._copies if key[0] == run]
        for old in versions[:-VERSIONS]:
            del self._copies[old]
        while len(self._copies) > KEPT:
            self._copies.popitem(last=False)

    def copy(self, run: str, version: str) -> Copy | None:
        """A run as it was at `version`, while it is still kept. Raises KeyError for a run that isn't there."""
        with self._lock:
            if run not in self._found:
                raise KeyError(run)
            copy = self._copies.get((run, version))
            if copy is not None:
                self._copies.move_to_end((run, version))
            return copy

    def _work(self) -> None:
        due = 0.0
        while True:
            began = time.monotonic()
            try:
                if began >= due:
                    self.look()
                    due = time.monotonic() + max(LOOK_SECONDS, (time.monotonic() - began) / SHARE)
                if began - self._asked < WATCHED_SECONDS:
                    self.read_ahead(PATIENCE_SECONDS)
            except Exception:  # such as a folder that goes while it is looked at: the next round sees what is there
                _log.exception("stabilitylab: looking for runs under %s failed", self._root)
                due = time.monotonic() + LOOK_SECONDS
            self._wake.wait(max(SHORT_SECONDS, due - time.monotonic()))
            self._wake.clear()
            time.sleep(SHORT_SECONDS)

    def read_ahead(self, patience: float | None = None) -> None:
        """Read the runs that have changed since they were read, the smallest first.

        patience: in seconds, after which the next one is begun, if few are being judged by then. None: each is waited
        for.
        """
        with self._lock:
            found, lines = self._found, dict(self._lines)
        stamps = {run: _stamp(file) for run, file in found.items()}
        for run in sorted(found, key=lambda run: (sum(size for *_, size in stamps[run]), _by_number(run))):
            line = lines.get(run)
            if line is not None and line.fresh(stamps[run]):
                continue
            if patience is not None and (run in self._judging or len(self._judging) >= AT_ONCE):
                continue
            with contextlib.suppress(KeyError):  # gone meanwhile
                self.ask(run, patience)


def _load(stamp: _Stamp, follower: Follower) -> Copy:
    version = hashlib.sha256(repr(stamp).encode("ascii")).hexdigest()[:16]
    try:
        follower.look(keep=0)
        run, diagnosis = follower.run, follower.diagnosis()
        return Copy(version, run, payload.about(run, diagnosis), payload.summary(run, diagnosis), "")
    except StabilityLabError as error:
        reason = str(error)
    except Exception as error:  # anyone may have written the file: whatever it does, the others work
        reason = f"'{follower.path}' can't be read: {type(error).__name__}: {error}"
    return Copy(version, None, {}, {}, clean(reason, SAYS))


def _by_number(run: str) -> list[tuple[int, str]]:
    """Sorts ``run-2`` before ``run-10``."""
    return [(int(part[:18]), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", run)]


def _entry(run: str, line: _Line | None) -> dict[str, Any]:
    known = {"id": run, "name": clean(os.fsdecode(urllib.parse.unquote_to_bytes(run)), 200)}
    if line is None:
        return {**known, "state": "unread"}
    state = "unreadable" if line.reason else "read"
    return {**known, "state": state, "version": line.version, "reason": line.reason, **line.summary}
