"""Following a run that goes on, from another process: each look reads only what is new since the last. No torch."""

from __future__ import annotations

import sqlite3
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from stabilitylab.analysis import Diagnosis
from stabilitylab.errors import RunError
from stabilitylab.readings import Alarm, EditRow, Metric
from stabilitylab.run import analyzer_of, thresholds_of
from stabilitylab.runfile import connect, find_file
from stabilitylab.store import read_alarms, read_manifest, read_metrics, read_rows, unpacker_of

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

    A run that was begun anew in its folder is followed from its start.
    """

    def __init__(self, path: Path) -> None:
        """path: a run folder, or its run file; it need not be there yet."""
        self.path = path
        self.alarms: tuple[Alarm, ...] = ()
        self.manifest: dict[str, Any] = {}
        self.edits = 0
        """How many edits were tried so far, edit 0 apart."""
        self.failed = 0
        """How many of them failed."""
        self._metrics: tuple[Metric, ...] = ()
        self._told = -1
        self._begin(())

    def _begin(self, metrics: tuple[Metric, ...]) -> None:
        self._metrics = metrics
        self._analyzer = analyzer_of(metrics, self.manifest, thresholds_of(self.manifest, self.path))
        self._last = self._last_dry = -1
        self.edits = self.failed = 0
        self._started: deque[float] = deque(maxlen=PACE_EDITS + 1)

    @property
    def complete(self) -> bool:
        """Whether the monitor had closed the run at the last look."""
        return bool(self.manifest.get("closed", False))

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

    def diagnosis(self) -> Diagnosis:
        """What is known after the rows so far."""
        return self._analyzer.diagnosis()

    def look(self, keep: int | None = None) -> list[Seen]:
        """Take in what is new; returns those rows, each once and in order, at most the last `keep` of them.

        Raises RunError when there is no run (yet), or what is there can't be read.
        """
        file = find_file(self.path)
        with connect(file) as db:
            try:
                return self._read(db, keep)
            except (sqlite3.DatabaseError, ValueError, TypeError, KeyError) as error:
                raise RunError(f"'{file}' is damaged: {error}") from error

    def _read(self, db: sqlite3.Connection, keep: int | None) -> list[Seen]:
        before, self.manifest, metrics = self.manifest, read_manifest(db), read_metrics(db)
        (last,) = db.execute("SELECT max(edit) FROM edit").fetchone()
        another = before.get("created") != self.manifest.get("created") or (last is not None and last < self._last)
        if another or metrics != self._metrics:
            self._begin(metrics)
            self._told = -1 if another else self._told
        self.alarms = read_alarms(db)
        unpack = unpacker_of(db)
        rows = list(read_rows(db, "edit", unpack, self._last))
        dry = list(read_rows(db, "dry", unpack, self._last_dry)) if self._last < 1 else []
        shown = {row.edit for row in rows if row.edit > self._told}
        shown = shown if keep is None else set(sorted(shown)[-keep:])
        seen = []
        for row in rows:
            if row.edit > 0:
                for dry_row in dry:
                    self._analyzer.observe_dry(dry_row)
                    self._last_dry = dry_row.edit
                dry = []
            self._analyzer.observe(row)
            self._last = row.edit
            if row.edit > 0:
                self.edits += 1
                self.failed += row.status == "failed"
                self._started.append(row.started)
            if row.edit in shown:
                seen.append(Seen(row, self._analyzer.diagnosis(), self.failed))
        self._told = max(self._told, self._last)
        return seen
