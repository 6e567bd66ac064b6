"""What the tables of a run file hold. Anyone may have written it: what is read is checked all the way down.

Since schema 4 each record carries a checksum. One that is not as it was written is left out and counted where it is of
one edit, and ends the reading where it is about the whole run. What is raised here is ValueError: the reader says that
the file is damaged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from stabilitylab.record.checked import LONGEST, entry, expect, from_json
from stabilitylab.record.damage import Damage
from stabilitylab.record.operations import Operation, operation_from_json
from stabilitylab.record.packing import Layout
from stabilitylab.record.readings import Alarm, Metric, Note, OutcomeKind
from stabilitylab.record.tables import (
    ALARM,
    CHECKED_SINCE,
    COUNTS_ENTRY,
    LAYOUT,
    MANIFEST,
    METRIC,
    NOTE,
    OPERATION,
    OUTCOME,
    Table,
)

Read = TypeVar("Read")

_ABSENT: Final = {"position": "0", "trace_seconds": "0.0"}
"""Columns that older files lack, and what is read in their place."""


def is_checked(db: sqlite3.Connection) -> bool:
    """Whether the records of this file carry checksums."""
    return bool(db.execute("PRAGMA user_version").fetchone()[0] >= CHECKED_SINCE)


def read_records(
    db: sqlite3.Connection, table: Table, order: str, after: int | None = None
) -> Iterator[tuple[Any, ...] | None]:
    """The records of a table, by the column `order`; None for one that is not as it was written.

    after: only those above it in that column. Of an older file without the table: none.
    """
    checked = is_checked(db)
    held = {name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", (table.name,))}
    if not checked and "crc" in held:
        raise ValueError("the number of its schema is not as it was written")
    if not held and not checked:
        return
    # A column that has no business to be missing is an error of SQLite's.
    columns = [name if name in held or name not in _ABSENT or checked else _ABSENT[name] for name in table.columns]
    where, given = ("", ()) if after is None else (f"WHERE {order} > ?", (after,))
    sums = ", crc" if checked else ""
    records = db.execute(f"SELECT {', '.join(columns)}{sums} FROM {table.name} {where} ORDER BY {order}", given)
    if not checked:
        yield from records
        return
    for record in records:
        yield record[:-1] if table.is_sound(record) else None


def _whole(db: sqlite3.Connection, table: Table, order: str, what: str) -> Iterator[tuple[Any, ...]]:
    """Each record; raises ValueError for one that is not as it was written."""
    for record in read_records(db, table, order):
        if record is None:
            raise ValueError(f"{what} is not as it was written")
        yield record


def read_metrics(db: sqlite3.Connection, damage: Damage) -> tuple[Metric, ...]:
    """The metrics that a run file describes, in the order in which they were added."""
    found = tuple(Metric(*record) for record in _whole(db, METRIC, "rowid", "the description of a metric"))
    for metric in found:
        expect(Metric, metric, "a metric's description")
        if not 1 <= metric.length <= LONGEST:
            raise ValueError(f"metric {metric.name[:60]!r} is said to hold {metric.length} values")
    damage.expect_all(METRIC, len(found))
    return found


def read_manifest(db: sqlite3.Connection) -> tuple[dict[str, Any], Damage]:
    """The manifest of a run file; and what has been found to be damaged so far: nothing."""
    records = _whole(db, MANIFEST, "key", "an entry of the manifest")
    found = dict(entry(key, value) for key, value in records)
    if not is_checked(db):
        return found, Damage({})
    if COUNTS_ENTRY not in found:
        raise ValueError("the manifest lacks an entry that each has")
    damage = Damage(found.pop(COUNTS_ENTRY))
    damage.expect_all(MANIFEST, len(found))
    return found, damage


def read_layouts(db: sqlite3.Connection) -> dict[int, Layout]:
    """The layouts that the rows of a run file refer to, by number; without those that are not as they were written."""
    return {
        record[0]: tuple(_place(*each) for each in expect(list, from_json(record[1]), "a layout"))
        for record in read_records(db, LAYOUT, "id")
        if record is not None
    }


def _place(metric: object, site: object, length: object) -> tuple[str, str, int]:
    """An entry of a layout."""
    if not (isinstance(length, int) and 0 < length < 1 << 31):
        raise ValueError(f"a layout has a reading of {str(length)[:20]} values")
    return expect(str, metric, "a layout's metric"), expect(str, site, "a layout's site"), length


class Said(Generic[Read]):
    """Reads a table of what was said of edits as it grows, each record once."""

    def __init__(self, table: Table, made: Callable[..., Read]) -> None:
        """made: of the values of a record, its number apart. Raises ValueError where they are of another kind."""
        self._table = table
        self._made = made
        self._last = self._found = 0

    def read(self, db: sqlite3.Connection, damage: Damage) -> list[Read]:
        """What came since, in order. Damage is told how much can't be read so far."""
        new = []
        for record in read_records(db, self._table, "id", self._last):
            # A number that does not ascend is of a copy, in place of other records; of an older file none can be.
            if record is not None and record[0] > self._last:
                self._last, self._found = record[0], self._found + 1
                new.append(self._made(*record[1:]))
        if is_checked(db):
            damage.lacks(self._table, self._found, self._last)
        return new


def notes() -> Said[Note]:
    """What was not measured, or not as asked."""
    return Said(NOTE, lambda *values: expect(Note, Note(*values), "a note"))


def alarms() -> Said[Alarm]:
    """The verdicts as they were raised online."""
    return Said(ALARM, lambda *values: expect(Alarm, Alarm(*values), "an alarm"))


def operations() -> Said[Operation]:
    """The operations that tracing has named. Of a file without that table: none."""
    return Said(OPERATION, lambda _, says: expect(Operation, operation_from_json(from_json(says)), "an operation"))


def outcomes() -> Said[tuple[int, OutcomeKind]]:
    """What became of the edits that were looked after, each with its number; of several of one edit, the last holds."""
    return Said(OUTCOME, lambda edit, outcome, _: (edit, expect(OutcomeKind, outcome, "an outcome")))
