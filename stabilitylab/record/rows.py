"""The rows of a run file, read as it grows: each once, and which of them can't be read any more. No torch."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Mapping
from typing import Any, Final, cast

from stabilitylab.record.checked import expect_columns
from stabilitylab.record.damage import Damage, Gap
from stabilitylab.record.packed import Frame
from stabilitylab.record.packing import Layout, Unpacker
from stabilitylab.record.reading import is_checked, read_records
from stabilitylab.record.readings import EditRow, Status
from stabilitylab.record.tables import EDIT, Table

_KINDS: Final = {
    "edit": int,
    "position": int,
    "label": str,
    "status": Status,
    "started": float,
    "seconds": float,
    "probe_seconds": float,
    "canary_seconds": float,
    "trace_seconds": float,
    "error": str | None,
}
"""What a row holds besides its readings, in the order of its columns."""
_LAYOUT: Final = EDIT.columns.index("layout")


class Rows:
    """Those of one table. last: the number of the last edit that was read, −1 before any.

    Since schema 4 the positions of rows tell which are missing between two, and the manifest how many there are.
    """

    def __init__(self, table: Table) -> None:
        self.last = -1
        self._table = table
        self._what = "edit" if table is EDIT else "dry edit"
        self._unpack = Unpacker({})
        self._expect = expect_columns(_KINDS)
        self._position = self._passed = self._unread = 0
        self._gaps: list[Gap] = []

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Those of the rows so far, in order of their first row."""
        return self._unpack.frames

    @property
    def reached(self) -> int:
        """The last edit that was read, or that is known to have been written after it and can't be."""
        return self.last + self._unread

    def read(self, db: sqlite3.Connection, layouts: Mapping[int, Layout], damage: Damage) -> list[EditRow]:
        """The rows that came since, in order. Damage is told of all that can't be read so far."""
        self._unpack.learn(layouts)
        checked, unread, rows = is_checked(db), 0, []
        for record in read_records(db, self._table, "edit", self.last):
            if record is None:
                unread += 1
            elif not checked:
                rows.append(self._row(record))
            elif record[1] > self._position:  # else a copy, in place of another
                self._passed, unread = self._passed + unread, 0
                if self._comes_next(record):
                    rows.append(self._row(record))
        damage.gaps(self._gaps)
        # One that stands where it does not belong may be one of those that are missing.
        unread += self._passed - sum(gap.rows for gap in self._gaps if gap.layout is None)
        self._unread = max(unread, damage.counted(self._table) - self._position, 0)
        if self._unread:
            damage.gaps([Gap(self._what, self.last, None, self._unread)])
        return rows

    def _comes_next(self, record: tuple[Any, ...]) -> bool:
        """Whether the next row, which is as it was written, can be read; takes note of what is missing before it."""
        edit, position, layout = record[0], record[1], record[_LAYOUT]
        missing = position - self._position - 1
        if missing:
            self._gaps.append(Gap(self._what, self.last, edit, missing))
        known = self._unpack.knows(layout)
        if not known:
            begun = self._gaps.pop() if self._gaps and self._gaps[-1].layout == layout else None
            after, rows = (begun.after, begun.rows + 1) if begun else (edit - 1, 1)
            self._gaps.append(Gap(self._what, after, edit + 1, rows, layout))
        self.last, self._position = edit, position
        return known

    def _row(self, record: tuple[Any, ...]) -> EditRow:
        self._expect(record)
        edit, _, label, status, started, seconds, probing, canary, tracing, error, layout, present, data = record
        readings = self._unpack(layout, present, data)
        self.last = edit
        kind = cast(Status, sys.intern(status))  # each row's own would be a sixth of what it takes
        return EditRow(edit, label, kind, started, seconds, probing, canary, error, readings, tracing)
