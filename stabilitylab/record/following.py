"""Following a run that goes on, from another process: each look reads only what is new since the last. No torch."""

from __future__ import annotations

import sqlite3
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.errors import RunError
from stabilitylab.record.acknowledged import acknowledged
from stabilitylab.record.growing import Growing, New
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import Alarm, EditRow, Note, OutcomeKind
from stabilitylab.record.run import (
    DAMAGE,
    Contents,
    Run,
    analyzer_of,
    fed,
    in_order,
    is_complete,
    keys_of,
    thresholds_of,
)
from stabilitylab.record.runfile import connect, damaged, find_file

PACE_EDITS: Final = 20
"""How many edits the pace is taken from."""


@dataclass(frozen=True)
class Seen:
    """A row with the diagnosis after it. failed: how many edits had failed by then."""

    row: EditRow
    diagnosis: Diagnosis
    failed: int

    def largest(self, metric: str) -> float | None:
        """The largest first value of a metric over all sites; NaN where one is NaN, None where none was taken."""
        values = [read[0] for (name, _), read in self.row.readings.items() if name == metric and read.size]
        return float(np.max(values)) if values else None


class Follower:
    """Reads a run as it grows. The same rows in the same order as `Run` reads them, so the same diagnosis.

    A run that was begun anew in its folder, or is judged by other limits than before, is followed from its start.
    """

    def __init__(self, path: Path, *, keeps_rows: bool = False) -> None:
        """path: a run folder, or its run file; it need not be there yet. keeps_rows: so that `run` can be asked for."""
        self.path = path
        self.alarms: tuple[Alarm, ...] = ()
        self.manifest: dict[str, Any] = {}
        self.edits = 0
        """How many edits were tried so far, edit 0 apart."""
        self.failed = 0
        """How many of them failed."""
        self.last_edit = 0
        """The last edit in the file at the last look: `edits` goes up to it as they are looked at."""
        self._keeps_rows = keeps_rows
        self._run: Run | None = None
        self._told = -1
        self._begin(Growing(), ())

    def _begin(self, file: Growing, lacks: tuple[Note, ...]) -> None:
        """lacks: what can't be read of the file any more: the analyzer is told of it at the start."""
        self._file, self._lacks, self._began = file, lacks, False
        self._metrics = file.metrics
        self._analyzer = analyzer_of(file.metrics, file.manifest, thresholds_of(file.manifest, self.path))
        self._rows: list[EditRow] = []
        self._dry: list[EditRow] = []
        self._notes: list[Note] = []
        self._operations: list[Operation] = []
        self._outcomes: dict[int, OutcomeKind] = {}
        self.alarms = ()
        self.edits = self.failed = 0
        self._started: deque[float] = deque(maxlen=PACE_EDITS + 1)

    @property
    def complete(self) -> bool:
        """Whether it was closed, and nothing of it was lost on the way or is damaged."""
        return is_complete(self.manifest)

    @property
    def closed(self) -> bool:
        """Whether the monitor had closed the run at the last look."""
        return bool(self.manifest.get("closed", False))

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that has a reading so far, as `Run.sites`."""
        return in_order(keys_of(self._file.frames), self.manifest)

    @property
    def last_started(self) -> float | None:
        """When the last edit began, in seconds since the epoch; None before the first."""
        return self._started[-1] if self._started else None

    @property
    def edits_per_minute(self) -> float | None:
        """Over the last edits; None while there are fewer than two."""
        if len(self._started) < 2 or self._started[-1] <= self._started[0]:
            return None
        return 60.0 * (len(self._started) - 1) / (self._started[-1] - self._started[0])

    @property
    def run(self) -> Run:
        """The run as it stood at the last look: what `load` would have read then."""
        if self._run is None:
            raise RunError(f"'{self.path}' was not looked at by a follower that keeps rows")
        return self._run

    def diagnosis(self) -> Diagnosis:
        """What is known after the rows so far."""
        return self._analyzer.diagnosis()

    def look(self, keep: int | None = None) -> list[Seen]:
        """Take in what is new; returns those rows, each once and in order, at most the last `keep` of them.

        Raises RunError when there is no run (yet), or what is there can't be read: what the follower knows is then of
        no use any more.
        """
        file = find_file(self.path)
        known = acknowledged(file)
        with connect(file) as db:
            try:
                return self._read(db, file, keep, known)
            except DAMAGE as error:
                raise damaged(file, error) from error

    def _read(self, db: sqlite3.Connection, file: Path, keep: int | None, known: int) -> list[Seen]:
        before, metrics = self.manifest, self._metrics
        self._file.open(db)
        self.manifest = self._file.manifest
        (last,) = db.execute("SELECT max(edit) FROM edit").fetchone()
        self.last_edit = 0 if last is None else int(last)
        another = before.get("created") != self.manifest.get("created") or (last is not None and last < self._file.last)
        if another or self._file.metrics != metrics or before.get("thresholds") != self.manifest.get("thresholds"):
            self._begin_anew(db, ())
            self._told = -1 if another else self._told
        new = self._file.read(db, known)
        if self._file.lacks != self._lacks:
            self._begin_anew(db, self._file.lacks)
            new = self._file.read(db, known)
        self.manifest = self._file.manifest
        seen = self._take(new, keep)
        if self._keeps_rows:
            self._run = Run(file.parent, self._contents())
        return seen

    def _begin_anew(self, db: sqlite3.Connection, lacks: tuple[Note, ...]) -> None:
        file = Growing()
        file.open(db)
        self._begin(file, lacks)

    def _take(self, new: New, keep: int | None) -> list[Seen]:
        """Tell the analyzer what is new."""
        shown = [row.edit for row in new.rows if row.edit > self._told]
        shown = shown if keep is None else shown[max(0, len(shown) - keep) :]
        said = [*new.notes, *(() if self._began else self._lacks)]
        seen = []
        for row in fed(self._analyzer, new.rows, new.dry, said, new.operations):
            if row.edit > 0:
                self.edits += 1
                self.failed += row.status == "failed"
                self._started.append(row.started)
            if row.edit in shown:
                seen.append(Seen(row, self._analyzer.diagnosis(), self.failed))
        self._began = True
        self._told = max(self._told, self._file.last)
        self.alarms += tuple(new.alarms)
        self._notes += new.notes
        self._operations += new.operations
        if self._keeps_rows:
            self._rows += new.rows
            self._dry += new.dry
            self._outcomes.update(new.outcomes)
        return seen

    def _contents(self) -> Contents:
        return Contents(
            manifest=self.manifest,
            metrics=self._metrics,
            keys=keys_of(self._file.frames),
            rows=tuple(self._rows),
            dry=tuple(self._dry),
            outcomes=dict(self._outcomes),
            alarms=self.alarms,
            notes=(*self._notes, *self._lacks),
            operations=tuple(self._operations),
        )
