"""The analyzer: rows in, diagnosis out. Fed by the monitor after each edit or from a file, it says the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from stabilitylab.analysis.columns import Columns, Flat
from stabilitylab.analysis.diagnosis import Judgement, diagnose, judge
from stabilitylab.analysis.distance import DistanceBank
from stabilitylab.analysis.drift import DriftBank
from stabilitylab.analysis.drift_series import BASELINE
from stabilitylab.analysis.facts import FactRules
from stabilitylab.analysis.findings import Diagnosis, Finding, Verdict, severity
from stabilitylab.analysis.forecast import Forecaster
from stabilitylab.analysis.harm import Harm
from stabilitylab.analysis.heading import HeadingBank
from stabilitylab.analysis.landing import EDITS_LOST
from stabilitylab.analysis.leadin import LeadIn
from stabilitylab.analysis.ledger import SIZE_RULES, Ledger
from stabilitylab.analysis.serving import Serving
from stabilitylab.analysis.story import Story
from stabilitylab.analysis.thresholds import Thresholds, shipped
from stabilitylab.analysis.undone import Undone
from stabilitylab.record.note_kinds import (
    EDITOR_REBUILT,
    MOVED_OUTSIDE,
    NEVER_RUN,
    NOT_PUT_BACK,
    NOTHING_MOVED,
    SEQUENTIAL_EDITS,
    SINGLE_EDITS,
    UNWATCHED,
    WRITTEN_BESIDES,
)
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import EditRow, Metric, Note
from stabilitylab.record.serving import SERVES

MOST_NAMED: Final = 3


class Analyzer:
    """Looks at each edit's row once, and remembers a bounded window of it.

    Its state depends on the rows alone, so that a run diagnosed while it goes on and the same run read from its file
    agree at every edit.
    """

    def __init__(
        self, metrics: Sequence[Metric], thresholds: Thresholds | None = None, *, single_edits: bool = False
    ) -> None:
        """metrics: descriptions of what the rows hold. A row may hold others: they count as taken after the edit.
        thresholds: from which statistics on a run is diverging; by default those of the package. single_edits: whether
        the loop says that it makes each edit on the original model.
        """
        self._thresholds = thresholds or shipped()
        self._columns = Columns(metrics)
        self._facts = FactRules(self._columns)
        self._drift = DriftBank(self._columns, self._thresholds)
        self._distance = DistanceBank(self._columns, self._thresholds)
        self._heading = HeadingBank(self._columns, self._thresholds)
        self._dry_edits = 0
        self._lead_in = LeadIn(self._columns, self._facts.restoring, self._facts.steadiness, single_edits=single_edits)
        self._ledger = Ledger(self._columns)
        self._harm = Harm()
        self._undone = Undone()
        self._story = Story()
        self._forecaster = Forecaster(self._columns)
        self._edits = 0
        self._rows = 0
        self._alarm: int | None = None
        self._diagnosis: Diagnosis | None = None
        self._judged: Judgement | None = None
        self._unwatched: tuple[str, ...] = ()
        self._serving = Serving()
        self._operations: list[Operation] = []
        self._ahead: deque[tuple[EditRow, Flat]] = deque()

    def observe_dry(self, row: EditRow) -> None:
        """Take in an edit that was rolled back, before the first edit that wasn't. It is for baselines alone.

        Raises:
            ValueError: an edit was observed already.
        """
        if self._edits:
            raise ValueError(f"a dry edit after {self._edits} edits; expected all of them before the first edit")
        self._diagnosis = self._judged = None
        self._dry_edits += 1
        flat = self._columns.flatten(row)
        self._drift.observe_dry(flat)
        self._distance.observe_dry(flat)

    def observe_note(self, note: Note) -> None:
        """Take in what the monitor noted, before the row of the same edit. Most notes are for the reader alone."""
        if note.kind == NOTHING_MOVED:
            self._facts.nothing_moved(note.edit)
        elif note.kind == NOT_PUT_BACK:
            self._lead_in.not_put_back(note.edit)
        elif note.kind in (SINGLE_EDITS, SEQUENTIAL_EDITS):
            self._lead_in.single_edits = note.kind == SINGLE_EDITS
        elif note.kind == WRITTEN_BESIDES:
            self._lead_in.besides = True
        elif note.kind == NEVER_RUN:
            self._facts.never_run()
        elif note.kind == EDITOR_REBUILT:
            self._facts.editor_rebuilt()
        elif note.kind == MOVED_OUTSIDE:
            self._facts.moved_outside()
            self._unwatched += (note.says,)
        elif note.kind in UNWATCHED and len(self._unwatched) < MOST_NAMED:
            self._unwatched += (note.says,)
        elif note.kind == SERVES:
            self._serving.learn(note.says)
        else:
            return
        self._diagnosis = self._judged = None

    def observe_operation(self, operation: Operation) -> None:
        """Take in what tracing has named, before the row of the same edit."""
        self._operations.append(operation)
        self._diagnosis = self._judged = None

    @property
    def peaks(self) -> Mapping[str, float]:
        """The largest statistic so far of each detector whose limit is calibrated."""
        return self._drift.peaks | self._distance.peaks | self._heading.peaks

    def look_ahead(self, rows: Sequence[EditRow]) -> None:
        """Rows that will be observed next, in this order, none of them edit 0: many together cost less than each alone.

        It changes no answer, and nothing has to come of it.
        """
        flats = self._columns.flatten_all(rows)
        self._ahead = deque(zip(rows, flats, strict=True))
        for bank in (self._facts, self._drift):
            bank.look_ahead(flats)

    def _flatten(self, row: EditRow) -> Flat:
        if self._ahead and self._ahead[0][0] is row:
            return self._ahead.popleft()[1]
        self._ahead.clear()
        return self._columns.flatten(row)

    def observe(self, row: EditRow) -> None:
        """Take in the next edit's row. Costs nothing that grows with the number of edits before it."""
        self._diagnosis = self._judged = None
        self._rows += 1
        self._edits += row.edit > 0
        flat = self._flatten(row)
        hits = self._facts.check(row, flat) + self._drift.observe(flat)
        hits = self._harm.weigh(flat, hits + self._distance.observe(flat) + self._heading.observe(flat))
        self._put_back(flat)
        self._ledger.add(row.edit, hits)
        if self._facts.landing.only_waited:
            for hit in self._ledger.withdraw(EDITS_LOST):
                self._facts.forget(hit)
        worst = self._ledger.worst
        if self._alarm is None and severity(worst) >= severity("diverging"):
            self._alarm = row.edit
        alarmed = self._alarm is not None
        lost = alarmed and self._ledger.has_hard_fact()
        self._lead_in.observe(flat, alarmed=alarmed, lost=lost, nonfinite=worst == "non-finite")
        self._forecaster.observe(flat)
        if self._alarm is not None and self._story.is_due(row.edit, self._alarm):
            evidence = self._lead_in.evidence(
                self._ledger.worst,
                self._ledger.findings(),
                self._ledger.first_bad(),
                self._facts.landing,
                self._operations,
            )
            self._story.keep(evidence)

    def _put_back(self, row: Flat) -> None:
        """What was undone before this edit has harmed no model; an alarm that it raised is withdrawn."""
        undo = self._undone.observe(row)
        if undo.broken:
            for hit in self._ledger.put_back(undo.broken):
                for bank in (self._facts, self._drift, self._distance, self._heading):
                    bank.forget(hit)
            self._lead_in.go_on()
        if undo.begins_anew:
            self._ledger.put_back(range(row.edit), SIZE_RULES)
        if severity(self._ledger.worst) < severity("diverging"):
            self._alarm = None

    @property
    def verdict(self) -> Verdict:
        """That of `diagnosis`, at no cost."""
        return self._ledger.worst

    @property
    def alarm_edit(self) -> int | None:
        """Likewise."""
        return self._alarm

    def found_at(self, edit: int) -> list[Finding]:
        """The findings of `diagnosis` that are about one edit, in whatever order."""
        # One that is not in the ledger is made only where a bad reading is the whole model's.
        listed = self._ledger.findings() if self._ledger.first_bad() is None else self._judgement().findings
        return [finding for finding in listed if finding.edit == edit]

    def _judgement(self) -> Judgement:
        if self._judged is None:
            worst, first_bad = self._ledger.worst, self._ledger.first_bad()
            findings, landing = self._ledger.findings(), self._facts.landing
            evidence = self._lead_in.evidence(worst, findings, first_bad, landing, self._operations)
            cause, causes = self._story.tell(evidence)
            self._judged = judge(
                worst,
                edits=self._edits,
                first_bad=None if first_bad is None else self._serving.finding(first_bad),
                findings=self._serving.findings(findings),
                cause=self._serving.cause(cause),
                causes=self._serving.links(causes),
                landing=landing,
                operations=self._operations,
            )
        return self._judged

    def diagnosis(self) -> Diagnosis:
        """What is known after the rows so far."""
        if self._diagnosis is None:
            worst = self._ledger.worst
            diagnosis = diagnose(
                self._judgement(),
                rows=self._rows,
                edits=self._edits,
                baseline=self._drift.ready > 0,
                alarm=self._alarm,
                unwatched=self._unwatched,
                forecast=None if severity(worst) >= severity("collapsed") else self._forecaster.forecast(),
            )
            self._diagnosis = replace(diagnosis, baseline=self._baseline(), thresholds=str(self._thresholds))
        return self._diagnosis

    def _baseline(self) -> str:
        """What is compared with, for a reader."""
        if self._dry_edits >= BASELINE:
            return f"{self._dry_edits} dry edits"
        if self._drift.ready:
            return f"each reading's first {BASELINE} edits, with the spread that its kind usually has"
        return "none yet"
