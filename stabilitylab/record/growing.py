"""A run file that is read as it grows: each look gives what came since the last. No torch."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from stabilitylab.record import reading
from stabilitylab.record.acknowledged import missing_says
from stabilitylab.record.damage import Damage
from stabilitylab.record.note_kinds import DAMAGED_ENTRY, LOST_ENTRY, LOST_ROWS
from stabilitylab.record.operations import Operation
from stabilitylab.record.packed import Frame
from stabilitylab.record.readings import Alarm, EditRow, Metric, Note, OutcomeKind
from stabilitylab.record.rows import Rows
from stabilitylab.record.tables import DRY, EDIT


@dataclass(frozen=True)
class New:
    """What came since the last look, each in the order in which it was written."""

    rows: list[EditRow]
    dry: list[EditRow]
    notes: list[Note]
    operations: list[Operation]
    alarms: list[Alarm]
    outcomes: list[tuple[int, OutcomeKind]]


class Growing:
    """Reads one run file. manifest, metrics: as they are now. lacks: what can't be read any more, as notes."""

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}
        self.metrics: tuple[Metric, ...] = ()
        self.lacks: tuple[Note, ...] = ()
        self._damage = Damage({})
        self._any = False
        self._rows, self._dry = Rows(EDIT), Rows(DRY)
        self._notes, self._operations = reading.notes(), reading.operations()
        self._alarms, self._outcomes = reading.alarms(), reading.outcomes()

    @property
    def last(self) -> int:
        """The last edit that was read; −1 before any."""
        return self._rows.last

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Those of the rows so far, dry ones apart, in order of their first row."""
        return self._rows.frames

    def open(self, db: sqlite3.Connection) -> None:
        """Read what is of the run as a whole. Raises ValueError where that is not as it was written."""
        self.manifest, self._damage = reading.read_manifest(db)
        self.metrics = reading.read_metrics(db, self._damage)

    def read(self, db: sqlite3.Connection, known: int) -> New:
        """Read all else, after `open`. known: the last edit that was acknowledged.

        Raises ValueError where that is of other kinds than it should be, and where no edit is left of a damaged file.
        """
        layouts, damage = reading.read_layouts(db), self._damage
        new = New(
            rows=self._rows.read(db, layouts, damage),
            dry=self._dry.read(db, layouts, damage),
            notes=self._notes.read(db, damage),
            operations=self._operations.read(db, damage),
            alarms=self._alarms.read(db, damage),
            outcomes=self._outcomes.read(db, damage),
        )
        self._any = self._any or bool(new.rows)
        if damage.notes and not self._any:
            raise ValueError(damage.notes[0].says)
        self.lacks = damage.notes
        if damage.records:
            self.manifest[DAMAGED_ENTRY] = damage.records
        if known > self._rows.reached:
            self.lacks += (Note(known, LOST_ROWS, missing_says(self.last, known)),)
            self.manifest[LOST_ENTRY] = int(self.manifest.get(LOST_ENTRY, 0)) + known - self.last
        return new
