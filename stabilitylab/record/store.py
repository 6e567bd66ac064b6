"""The run file: SQLite, one float64 BLOB row per edit. Every commit survives the process being killed.

A row's values follow an immutable layout (metric, site, length) with a presence mask of one bit per value, so that
absent is not NaN. Each record carries a checksum, and the manifest says how many there are at least, see `tables`.
``PRAGMA application_id`` marks the file as ours, ``PRAGMA user_version`` is the schema's version.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from stabilitylab.errors import RunError
from stabilitylab.record.acknowledged import ENDING, acknowledge, forget
from stabilitylab.record.making import as_json, free_folder, is_taken, making, wal_works
from stabilitylab.record.operations import Operation
from stabilitylab.record.packed import PerFrame, as_packed
from stabilitylab.record.packing import Layout, Placed
from stabilitylab.record.readings import Alarm, Array, EditRow, Key, Metric, Note, OutcomeKind
from stabilitylab.record.spelling import logger
from stabilitylab.record.tables import (
    ALARM,
    COUNTS_ENTRY,
    DRY,
    EDIT,
    LAYOUT,
    MANIFEST,
    METRIC,
    NOTE,
    OPERATION,
    OUTCOME,
    TABLES,
    Table,
)

FILE_NAME = "run.db"
APPLICATION_ID = 0x57AB1AB0
SCHEMA_VERSION = 4
"""2 added the table `dry`, 3 the table `operation` and the time that tracing took, 4 the position of a row and what is
checked when it is read (`stabilitylab.record.tables`); an older file has none of them."""
LABEL_LIMIT = 4_000
WAIT_SECONDS: Final = 0.02
"""How long a write waits for a reader of a file without a write-ahead log: nobody's edit is held up for longer."""


def _spelled(text: str) -> str:
    """`text` as SQLite can hold it: lone surrogates spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain_text(text: str, limit: int = LABEL_LIMIT) -> str:
    """`text` as SQLite can hold it: lone surrogates spelled out, cut to `limit` characters with a mark."""
    safe = _spelled(text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def _identity(file: Path) -> tuple[int, int] | None:
    """What tells a file from another one in its place; None where there is none."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _places_in(layout: Layout) -> PerFrame[Placed | None]:
    """Where a layout has the values of each row, by its frame."""
    return PerFrame(lambda frame: Placed.in_layout(frame, layout))


def _close_in(process: int, connection: sqlite3.Connection) -> None:
    if os.getpid() == process:
        connection.close()


class RunWriter:
    """Appends to one run file. Each call is one committed transaction."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], metrics: Sequence[Metric]) -> None:
        """Make `folder` and its run file.

        Raises RunError when the folder holds anything already (nothing is overwritten) or can't be made, UsageError
        for a manifest that is not plain JSON. Nothing is left behind then.
        """
        if is_taken(folder):
            raise RunError(f"run folder '{folder}' exists; expected a new one, such as '{free_folder(folder)}'")
        self.path = folder / FILE_NAME
        self._process = os.getpid()
        self._layout: Layout = ()
        self._layout_id: int | None = None
        self._places = _places_in(self._layout)
        self._metrics: dict[str, Metric] = {}
        self._closed = False
        self._together = False
        self._committed = -1
        self._numbers: dict[str, int] = {}
        with making(self.path) as scratch:
            journal = "WAL" if wal_works(scratch.parent) else "TRUNCATE"
            with contextlib.closing(sqlite3.connect(scratch)) as self._connection:
                with self._connection as db:
                    db.executescript(";".join(table.schema for table in TABLES))
                    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                with self._connection as db:
                    self._add_metrics(db, metrics)
                    self._set_manifest(db, manifest)
        self._open(journal)
        try:
            # Once more: its log is there then. A disk without room for that is an error here, not at the first edit.
            self.set_manifest(manifest)
        except sqlite3.Error as error:
            self.discard()
            raise RunError(f"can't write a run file in '{folder}': {error}") from error

    def _open(self, journal: str) -> None:
        self._journal = journal
        self._connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, check_same_thread=False)
        # A writer that is dropped without `close` ends as one that was killed does, and leaves its log beside it.
        # Not at exit, nor in a child that was forked, which would end its parent's.
        self._dropped = weakref.finalize(self, _close_in, self._process, self._connection)
        self._dropped.atexit = False
        self._identity = _identity(self.path)
        self._connection.execute(f"PRAGMA journal_mode={journal}")
        self._connection.execute("PRAGMA synchronous=NORMAL")

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection to the file as it lies in its folder now: once for each transaction."""
        if os.getpid() != self._process:
            raise RunError(
                f"'{self.path}' is written by process {self._process}; a process that was forked from it writes nothing"
            )
        if _identity(self.path) != self._identity:
            self._make_anew()
        return self._connection

    def _make_anew(self) -> None:
        """The file was deleted, moved or replaced, and SQLite would go on writing where nobody finds it: write all of
        it again, into the same folder where that is free. Raises sqlite3.OperationalError.
        """
        gone, old = self.path, self._connection
        try:
            file = free_folder(gone.parent) / FILE_NAME
            with making(file) as scratch, contextlib.closing(sqlite3.connect(scratch)) as copy:
                old.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")
        except (RunError, sqlite3.Error) as error:
            raise sqlite3.OperationalError(f"'{gone}' is gone, and can't be made anew: {error}") from error
        # Never closed: closing removes a log by its name, and what has that name now is another's.
        self._dropped.detach()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(old))
        self.path = file
        self._open(self._journal)
        (last,) = self._connection.execute("SELECT coalesce(max(edit), 0) FROM edit").fetchone()
        what = "was deleted, moved or replaced"
        logger.warning("stabilitylab: '%s' %s after edit %d: it was written again as '%s'", gone, what, last, file)
        # In the run no folder above its own: that may be somebody's home.
        before, now = (f"{each.parent.name}/{each.name}" for each in (gone, file))
        says = f"'{before}' {what} after edit {last}: the whole run was written again as '{now}'"
        self.note(Note(last, "run-file-gone", says))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One of its own, or that of `together`."""
        if self._together:
            yield self._connection
            return
        try:
            with self._db as db:
                yield db
        except BaseException:
            self._numbers.clear()  # whether it was rolled back is asked of the file
            raise

    def _number(self, db: sqlite3.Connection, table: Table) -> int:
        """The number of the next record of a table, from 1."""
        if table.name not in self._numbers:
            last = db.execute(f"SELECT {table.number} FROM {table.name} ORDER BY rowid DESC LIMIT 1").fetchone()
            self._numbers[table.name] = last[0] + 1 if last else 1
        return self._numbers[table.name]

    def _add(self, db: sqlite3.Connection, table: Table, number: int, record: tuple[Any, ...]) -> None:
        """Append a record, with the number that `_number` gave."""
        db.execute(table.insert, table.signed(record))
        self._numbers[table.name] = number + 1

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All that is written inside is one transaction: where much has waited, the disk is waited for once.

        Raises as `append` does; nothing of it is in the file then.
        """
        layout, committed = (self._layout, self._layout_id, self._places), self._committed
        try:
            with self._db:
                self._together = True
                yield
        except BaseException:
            (self._layout, self._layout_id, self._places), self._committed = layout, committed
            self._numbers.clear()
            raise
        finally:
            self._together = False
        if self._committed > committed:
            acknowledge(self.path, self._committed)

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write or replace manifest entries. Raises UsageError for values that are not plain JSON (NaN is none)."""
        with self._transaction() as db:
            self._set_manifest(db, manifest)

    def _set_manifest(self, db: sqlite3.Connection, manifest: Mapping[str, Any]) -> None:
        rows = [MANIFEST.signed((key, as_json(key, value))) for key, value in manifest.items()]
        db.executemany(MANIFEST.replace, rows)
        self._count(db)

    def _count(self, db: sqlite3.Connection) -> None:
        """Write how many records each table holds by now, and how many other entries the manifest."""
        counts = {table.name: self._number(db, table) - 1 for table in TABLES if table.number}
        (counts["metric"],) = db.execute("SELECT count(*) FROM metric").fetchone()
        (counts["manifest"],) = db.execute("SELECT count(*) FROM manifest WHERE key != ?", (COUNTS_ENTRY,)).fetchone()
        db.execute(MANIFEST.replace, MANIFEST.signed((COUNTS_ENTRY, as_json(COUNTS_ENTRY, counts))))

    def add_metrics(self, metrics: Sequence[Metric]) -> None:
        """Describe metrics, so that the file can be read without the probes that wrote it."""
        with self._transaction() as db:
            self._add_metrics(db, metrics)
            self._count(db)

    def _add_metrics(self, db: sqlite3.Connection, metrics: Sequence[Metric]) -> None:
        described = [
            tuple(_spelled(value) if isinstance(value, str) else value for value in asdict(metric).values())
            for metric in metrics
        ]
        db.executemany(METRIC.replace, map(METRIC.signed, described))
        self._metrics.update({metric.name: metric for metric in metrics})

    def _grown(self, readings: Mapping[Key, Array], layout: Layout) -> Layout:
        """`layout` with a place for each of these readings."""
        places = {(metric, site): length for metric, site, length in layout}
        for (metric, site), reading in readings.items():
            described = self._metrics.get(metric)
            declared = described.length if described else 1
            places[(metric, site)] = max(places.get((metric, site), declared), reading.size)
        return tuple((metric, site, length) for (metric, site), length in places.items())

    def append(self, row: EditRow) -> None:
        """Commit one edit's row, whose number is above those of all rows before.

        Raises sqlite3.Error when it can't be written; the file then is as it was, and later rows can still be written.
        """
        self._insert(EDIT, [row])
        self._committed = row.edit
        if not self._together:
            acknowledge(self.path, row.edit)

    def append_dry(self, rows: Sequence[EditRow]) -> int:
        """Commit the rows of all dry edits at once; returns how many. Raises as `append` does, with none written."""
        self._insert(DRY, rows)
        return len(rows)

    def _insert(self, table: Table, rows: Sequence[EditRow]) -> None:
        layout, number, places = self._layout, self._layout_id, self._places
        with self._transaction() as db:
            for row in rows:
                packed = as_packed(row.readings)
                placed = places.of(packed.frame)
                if number is None or placed is None:
                    layout = self._grown(row.readings, layout)
                    places = _places_in(layout)
                    placed = places.of(packed.frame)
                    named = [(_spelled(metric), site, length) for metric, site, length in layout]
                    entries = json.dumps(named, ensure_ascii=True)
                    number = self._number(db, LAYOUT)
                    self._add(db, LAYOUT, number, (number, entries))
                assert placed is not None  # the layout has grown for it
                position = self._number(db, table)
                record = (
                    row.edit,
                    position,
                    plain_text(row.label),
                    row.status,
                    # SQLite keeps no −0.0, and the checksum is of what it keeps.
                    row.started + 0.0,
                    row.seconds + 0.0,
                    row.probe_seconds + 0.0,
                    row.canary_seconds + 0.0,
                    row.trace_seconds + 0.0,
                    None if row.error is None else plain_text(row.error),
                    number,
                    placed.present,
                    placed.data(packed.flat),
                )
                self._add(db, table, position, record)
        # Only now: where the rows were rolled back, their new layouts are not in the file either.
        self._layout, self._layout_id, self._places = layout, number, places

    def _append(self, table: Table, *values: Any) -> None:
        """A record of what was said of an edit: its number, then these."""
        with self._transaction() as db:
            number = self._number(db, table)
            self._add(db, table, number, (number, *values))

    def outcome(self, edit: int, outcome: OutcomeKind) -> None:
        """Append what became of an edit."""
        self._append(OUTCOME, edit, outcome, time.time())

    def alarm(self, alarm: Alarm) -> None:
        """Append a verdict as it was raised online."""
        named = alarm.verdict, _spelled(alarm.metric), _spelled(alarm.site)
        self._append(ALARM, alarm.edit, *named, plain_text(alarm.says))

    def operation(self, operation: Operation) -> None:
        """Append an operation that tracing has named."""
        says = json.dumps(operation.to_json(), allow_nan=False, ensure_ascii=True)
        self._append(OPERATION, operation.edit, says)

    def note(self, note: Note) -> None:
        """Append what was not measured, and why."""
        self._append(NOTE, note.edit, _spelled(note.kind), plain_text(note.says))

    def discard(self) -> None:
        """Close, and remove the file; its folder too, unless something else is in it."""
        with contextlib.suppress(sqlite3.Error):
            self.close()
        with contextlib.suppress(OSError):
            for ending in ("-wal", "-shm", "-journal", ENDING, ""):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            self.path.parent.rmdir()

    def close(self) -> None:
        """Fold the log into the file and leave that one file."""
        if self._closed or os.getpid() != self._process:
            return
        try:
            db = self._db
        except sqlite3.Error:  # gone, and it can't be made anew: leave alone what may lie in its place
            self._dropped.detach()
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            raise
        finally:
            self._closed = True
        # A reader that is open at this moment makes the switch impossible; the log then stays beside the file, whole.
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute("PRAGMA journal_mode=DELETE")
            forget(self.path)
        db.close()
