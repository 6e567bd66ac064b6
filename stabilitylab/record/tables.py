"""The tables of a run file, and the checksum that each of their records carries: what has changed since is seen.

The last column of each, ``crc``, is the CRC-32 of the table's name and of all that the record holds, its number among
it: a flipped bit, a cell of another record and a record of another table all give another sum. It tells accidents;
whoever changes a file on purpose can work it out again.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final
from zlib import crc32

CHECKED_SINCE: Final = 4
"""The first schema whose records carry checksums."""

COUNTS_ENTRY: Final = "records"
"""The manifest's entry of how many records each table holds at least; of metrics and of its own, exactly."""

_NOTHING: Final = "\1"
"""Stands for a text that is missing."""


class Table:
    """One of them. columns: without the checksum, in the order of a record. number: the column that counts records in
    the order in which they are written; none of them is ever taken out again. Empty where records are replaced.
    """

    def __init__(self, name: str, columns: Mapping[str, str], number: str = "", ending: str = "") -> None:
        """columns: what SQLite is told of each, its type first. ending: what it is told of the table."""
        self.name = name
        self.columns = tuple(columns)
        self.number = number
        declared = ", ".join(f"{column} {says}" for column, says in columns.items())
        self.schema = f"CREATE TABLE {name} ({declared}, crc INTEGER NOT NULL){ending}"
        values = f"INTO {name} VALUES ({', '.join('?' * (len(columns) + 1))})"
        self.insert, self.replace = f"INSERT {values}", f"INSERT OR REPLACE {values}"
        kinds = [says.partition(" ")[0] for says in columns.values()]
        self._numbers = _those(place for place, kind in enumerate(kinds) if kind in ("INTEGER", "REAL"))
        self._texts = _those(place for place, kind in enumerate(kinds) if kind == "TEXT")
        self._blobs = _those(place for place, kind in enumerate(kinds) if kind == "BLOB")
        packed = [{"INTEGER": "q", "REAL": "d"}.get(kind, "") for kind in kinds]
        self._pack = struct.Struct(f"<{''.join(packed)}{'q' * kinds.count('BLOB')}").pack
        self._begun = crc32(name.encode())

    def checksum(self, record: Sequence[Any]) -> int | None:
        """Of the values in the order of the columns; what comes after them is not looked at.

        The CRC-32 of: the table's name; numbers as little-endian int64 (INTEGER) or float64 (REAL), then the length of
        each BLOB as int64; the texts as UTF-8, with a zero byte between two, byte 1 for a NULL; the BLOBs. None where
        a value is of another kind than its column.
        """
        blobs = self._blobs(record)
        try:
            found = crc32(self._pack(*self._numbers(record), *map(len, blobs)), self._begun)
            texts = "\0".join([_NOTHING if text is None else text for text in self._texts(record)])
            found = crc32(texts.encode(), found)
            for blob in blobs:
                found = crc32(blob, found)
        except (struct.error, TypeError, OverflowError, UnicodeEncodeError):
            return None
        return found

    def is_sound(self, record: Sequence[Any]) -> bool:
        """Whether a record, its checksum the last, is as it was written."""
        found = self.checksum(record)
        return found is not None and found == record[-1]

    def signed(self, record: Sequence[Any]) -> tuple[Any, ...]:
        """The record with its checksum, as it is inserted. Raises sqlite3.IntegrityError for one of other kinds."""
        found = self.checksum(record)
        if found is None:
            raise sqlite3.IntegrityError(f"table {self.name!r} can't hold {str(record)[:200]}")
        return *record, found


def _those(places: Iterable[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes the values at these places."""
    taken = tuple(places)
    if len(taken) > 1:
        return itemgetter(*taken)
    return itemgetter(slice(taken[0], taken[0] + 1) if taken else slice(0))


_ROW: Final = {
    "edit": "INTEGER PRIMARY KEY",
    "position": "INTEGER NOT NULL",
    "label": "TEXT NOT NULL",
    "status": "TEXT NOT NULL",
    "started": "REAL NOT NULL",
    "seconds": "REAL NOT NULL",
    "probe_seconds": "REAL NOT NULL",
    "canary_seconds": "REAL NOT NULL",
    "trace_seconds": "REAL NOT NULL",
    "error": "TEXT",
    "layout": "INTEGER NOT NULL REFERENCES layout (id)",
    "present": "BLOB NOT NULL",
    "data": "BLOB NOT NULL",
}
"""position: 1 for the row that was written first, and so on: where edits were not recorded, no place is left out."""
_NUMBERED: Final = {"id": "INTEGER PRIMARY KEY", "edit": "INTEGER NOT NULL"}

MANIFEST: Final = Table("manifest", {"key": "TEXT PRIMARY KEY", "value": "TEXT NOT NULL"}, ending=" WITHOUT ROWID")
METRIC: Final = Table(
    "metric",
    {
        "name": "TEXT PRIMARY KEY",
        **dict.fromkeys(("unit", "scale", "phase", "meaning", "formula", "source"), "TEXT NOT NULL"),
        "length": "INTEGER NOT NULL",
    },
)
LAYOUT: Final = Table("layout", {"id": "INTEGER PRIMARY KEY", "entries": "TEXT NOT NULL"}, "id")
EDIT: Final = Table("edit", _ROW, "position")
DRY: Final = Table("dry", _ROW, "position")
OUTCOME: Final = Table("outcome", {**_NUMBERED, "outcome": "TEXT NOT NULL", "observed_at": "REAL NOT NULL"}, "id")
ALARM: Final = Table(
    "alarm", {**_NUMBERED, **dict.fromkeys(("verdict", "metric", "site", "says"), "TEXT NOT NULL")}, "id"
)
OPERATION: Final = Table("operation", {**_NUMBERED, "says": "TEXT NOT NULL"}, "id")
NOTE: Final = Table("note", {**_NUMBERED, "kind": "TEXT NOT NULL", "says": "TEXT NOT NULL"}, "id")

TABLES: Final = (MANIFEST, METRIC, LAYOUT, EDIT, DRY, OUTCOME, ALARM, OPERATION, NOTE)
