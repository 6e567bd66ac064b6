"""What the tables of a run file hold. Anyone may have written it: what is read is checked all the way down.

What is raised here is ValueError: the reader says that the file is damaged.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from typing import Any, Final, Literal

from stabilitylab.record.checked import LONGEST, entry, expect, from_json
from stabilitylab.record.operations import Operation, operation_from_json
from stabilitylab.record.packing import Layout, Unpacker
from stabilitylab.record.readings import Alarm, EditRow, Metric, Note, OutcomeKind, Status

_COLUMNS: Final = {
    "edit": int,
    "label": str,
    "status": Status,
    "started": float,
    "seconds": float,
    "probe_seconds": float,
    "canary_seconds": float,
    "trace_seconds": float,
    "error": str | None,
}
"""What a row holds besides its readings."""


def read_metrics(db: sqlite3.Connection) -> tuple[Metric, ...]:
    """The metrics that a run file describes, in the order in which they were added."""
    columns = "name, unit, scale, phase, meaning, formula, source, length"
    found = tuple(Metric(*row) for row in db.execute(f"SELECT {columns} FROM metric ORDER BY rowid"))
    for metric in found:
        expect(Metric, metric, "a metric's description")
        if not 1 <= metric.length <= LONGEST:
            raise ValueError(f"metric {metric.name[:60]!r} is said to hold {metric.length} values")
    return found


def read_manifest(db: sqlite3.Connection) -> dict[str, Any]:
    """The manifest of a run file."""
    return dict(entry(key, value) for key, value in db.execute("SELECT key, value FROM manifest"))


def read_layouts(db: sqlite3.Connection) -> dict[int, Layout]:
    """The layouts that the rows of a run file refer to, by number."""
    return {
        number: tuple(_place(*each) for each in expect(list, from_json(entries), "a layout"))
        for number, entries in db.execute("SELECT id, entries FROM layout")
    }


def _place(metric: object, site: object, length: object) -> tuple[str, str, int]:
    """An entry of a layout."""
    if not (isinstance(length, int) and 0 < length < 1 << 31):
        raise ValueError(f"a layout has a reading of {str(length)[:20]} values")
    return expect(str, metric, "a layout's metric"), expect(str, site, "a layout's site"), length


def read_rows(
    db: sqlite3.Connection, table: Literal["edit", "dry"], unpack: Unpacker, after: int = -1
) -> Iterator[EditRow]:
    """The rows of edits with a number above `after`, in order. Of a file without the table `dry`: none."""
    if table == "dry" and not _has_table(db, table):
        return  # schema 1
    cursor = db.execute(f"SELECT * FROM {table} WHERE edit > ? ORDER BY edit", (after,))
    names = [column[0] for column in cursor.description]
    for values in cursor:
        columns = dict(zip(names, values, strict=True))
        readings = unpack(columns.pop("layout"), columns.pop("present"), columns.pop("data"))
        for name, kind in _COLUMNS.items():
            if name in columns:  # older schemata lack some
                expect(kind, columns[name], f"column {name!r} of a row")
        columns["status"] = sys.intern(columns["status"])  # each row's own would be a sixth of what it takes
        yield EditRow(**columns, readings=readings)


def _has_table(db: sqlite3.Connection, name: str) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0])


def read_operations(db: sqlite3.Connection) -> tuple[Operation, ...]:
    """The operations that tracing has named. Of a file without that table: none."""
    if not _has_table(db, "operation"):
        return ()  # schema 2
    return tuple(
        expect(Operation, operation_from_json(from_json(says)), "an operation")
        for (says,) in db.execute("SELECT says FROM operation ORDER BY id")
    )


def read_alarms(db: sqlite3.Connection) -> tuple[Alarm, ...]:
    """The verdicts as they were raised online."""
    rows = db.execute("SELECT edit, verdict, metric, site, says FROM alarm ORDER BY id")
    return tuple(expect(Alarm, Alarm(*row), "an alarm") for row in rows)


def read_notes(db: sqlite3.Connection) -> tuple[Note, ...]:
    """What was not measured, or not as asked."""
    rows = db.execute("SELECT edit, kind, says FROM note ORDER BY id")
    return tuple(expect(Note, Note(*row), "a note") for row in rows)


def read_outcomes(db: sqlite3.Connection) -> dict[int, OutcomeKind]:
    """What became of each edit that was looked after, by its number; of several records, the last."""
    rows = db.execute("SELECT edit, outcome FROM outcome ORDER BY id")
    return {edit: expect(OutcomeKind, outcome, "an outcome") for edit, outcome in rows}
