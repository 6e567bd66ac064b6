"""What writes a run: rows, notes, outcomes and alarms into its record; each row to the analyzer and the sinks too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.findings import Diagnosis, Finding, severity
from stabilitylab.record.note_kinds import LOST_ENTRY, LOST_ROWS
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import Alarm, EditRow, Note, OutcomeKind
from stabilitylab.record.waiting import Waiting, lost_says
from stabilitylab.reports.sinks import Sink
from stabilitylab.watching.guard import Guard
from stabilitylab.watching.one_hook import logger
from stabilitylab.watching.redaction import Kept, Redaction

PATIENCE_SECONDS: Final = 5.0
"""How long, at the end, what could not be written yet is tried again while someone reads the file."""


class Record(Protocol):
    """Where a run is written to: a `stabilitylab.record.store.RunWriter`, whose methods these are."""

    path: Path

    def together(self) -> AbstractContextManager[None]:
        """What is written inside is written all or not at all."""

    def append(self, row: EditRow) -> None:
        """One edit's row."""

    def append_dry(self, rows: Sequence[EditRow]) -> int:
        """The rows of all dry edits at once; returns how many."""

    def note(self, note: Note) -> None:
        """What was not measured, or not as asked."""

    def operation(self, operation: Operation) -> None:
        """An operation that tracing has named."""

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Entries of the manifest."""

    def outcome(self, edit: int, outcome: OutcomeKind) -> None:
        """What became of an edit."""

    def alarm(self, alarm: Alarm) -> None:
        """A verdict as it is raised."""

    def close(self) -> None:
        """Nothing more comes."""


class Recorder:
    """Writes one run. What fails here is said in the run and stops nothing."""

    def __init__(
        self, record: Record, analyzer: Analyzer, sinks: Sequence[Sink], redaction: Redaction | None = None
    ) -> None:
        """redaction: what is taken out of all that comes, before anyone is shown it."""
        self.edits = 0
        """How many edits have ended."""
        self.guard = Guard(self.note)
        self._record = record
        self._analyzer = analyzer
        self._sinks = tuple(sinks)
        self._redaction = redaction or Kept()
        self._waiting = Waiting(record.together)
        self._lost_before = 0
        self._about: int | None = None
        self._raised = 0

    @property
    def path(self) -> Path:
        """The run file."""
        return self._record.path

    @contextmanager
    def about(self, edit: int) -> Iterator[None]:
        """Notes that are taken inside are of this edit; else they are of the last that ended."""
        self._about = edit
        try:
            yield
        finally:
            self._about = None

    def note(self, kind: str, says: str) -> None:
        """Record something that was not measured, or not as asked."""
        note = self._redaction.note(Note(self.edits if self._about is None else self._about, kind, says))
        self.guard("the run file", lambda: self._waiting.put(lambda: self._record.note(note)))
        self.guard("the analyzer", lambda: self._analyzer.observe_note(note))

    def operation(self, operation: Operation) -> None:
        """Record an operation that tracing has named, before the row of its edit."""
        operation = self._redaction.operation(operation)
        self._write(lambda: self._record.operation(operation))
        self.guard("the analyzer", lambda: self._analyzer.observe_operation(operation))

    def manifest(self, entries: Mapping[str, Any]) -> None:
        """Write or replace entries of the manifest."""
        told = self._redaction.manifest(entries)
        self._write(lambda: self._record.set_manifest(told))

    def _write(self, do: Callable[[], object], rows: Sequence[EditRow] = ()) -> bool:
        """Returns whether all was written by now."""
        return bool(self.guard("the run file", lambda: self._waiting.put(do, rows)))

    def row(self, row: EditRow) -> None:
        """Write an edit's row, then tell the analyzer and the sinks of it."""
        row = self._redaction.row(row)
        if self._write(lambda: self._record.append(row), [row]):
            self._say_lost()
        self.guard("the analyzer", lambda: self._analyze(row))

    def _say_lost(self) -> None:
        """Leave word in the run of the rows that are not in it."""
        lost = self._waiting.lost
        if len(lost) > self._lost_before:
            new = dict(list(lost.items())[self._lost_before :])
            self._lost_before = len(lost)
            self._write(lambda: self._record.set_manifest({LOST_ENTRY: len(lost)}))
            for says in lost_says(new):
                self.note(LOST_ROWS, says)

    def _analyze(self, row: EditRow) -> None:
        self._analyzer.observe(row)
        if severity(self._analyzer.verdict) > self._raised:
            diagnosis = self._analyzer.diagnosis()
            self._raised = severity(diagnosis.verdict)
            worst = max(diagnosis.findings, key=lambda finding: severity(finding.verdict))
            alarm = Alarm(row.edit, diagnosis.verdict, worst.metric, worst.site, worst.says)
            self._write(lambda: self._record.alarm(alarm))
        for sink in self._sinks:
            if self._analyzer.alarm_edit is not None or not getattr(sink, "waits_for_alarm", False):
                self.guard(type(sink).__name__, functools.partial(_tell, sink, row, self._analyzer.diagnosis()))

    def dry(self, rows: Sequence[EditRow], seconds: float) -> None:
        """Write the rows of all dry edits, which took so long, and tell the analyzer of them."""
        rows = [self._redaction.row(row) for row in rows]
        self._write(lambda: self._record.append_dry(rows))
        for row in rows:
            self.guard("the analyzer", functools.partial(self._analyzer.observe_dry, row))
        self.note("calibrated", f"{len(rows)} dry edits in {seconds:.1f} s, each rolled back bit for bit")

    def outcome(self, edit: int, outcome: OutcomeKind) -> None:
        """Write what became of an edit."""
        self._write(lambda: self._record.outcome(edit, outcome))

    def diagnosis(self) -> Diagnosis:
        """What the analyzer says after the rows so far."""
        return self._analyzer.diagnosis()

    def found_at(self, edit: int) -> list[Finding]:
        """What it has found of one edit."""
        return self._analyzer.found_at(edit)

    def close(self) -> None:
        """End the sinks and the record."""
        for sink in self._sinks:
            self.guard(f"{type(sink).__name__}.close", functools.partial(_end, sink))
        self._write(lambda: self._record.set_manifest({"closed": True}))
        self._waiting.finish(PATIENCE_SECONDS)
        unsaid = dict(list(self._waiting.lost.items())[self._lost_before :])
        self._say_lost()
        for says in lost_says(unsaid):
            logger.warning("stabilitylab: '%s': %s", self.path, says)
        self.guard("the run file", self._record.close)


def _tell(sink: Sink, row: EditRow, diagnosis: Diagnosis) -> None:
    # Looked up here, under the guard: a sink may lack it.
    sink.on_row(row, diagnosis)


def _end(sink: Sink) -> None:
    sink.close()
