"""The analyzer: rows in, diagnosis out. Fed by the monitor after each edit or from a file, it says the same."""

from __future__ import annotations

from collections.abc import Sequence

from stabilitylab.analysis.causes import find_cause
from stabilitylab.analysis.columns import Columns
from stabilitylab.analysis.diagnosis import diagnose
from stabilitylab.analysis.drift import DriftBank
from stabilitylab.analysis.facts import FactRules
from stabilitylab.analysis.findings import Diagnosis, severity
from stabilitylab.analysis.forecast import Forecaster
from stabilitylab.analysis.leadin import LeadIn
from stabilitylab.analysis.ledger import Ledger
from stabilitylab.readings import EditRow, Metric


class Analyzer:
    """Looks at each edit's row once, and remembers a bounded window of it.

    Its state depends on the rows alone, so that a run diagnosed while it goes on and the same run read from its file
    agree at every edit.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        """metrics: descriptions of what the rows hold. A row may hold others: they count as taken after the edit."""
        self._columns = Columns(metrics)
        self._facts = FactRules(self._columns)
        self._drift = DriftBank(self._columns)
        self._lead_in = LeadIn(self._columns)
        self._ledger = Ledger(self._columns)
        self._forecaster = Forecaster(self._columns)
        self._edits = 0
        self._rows = 0
        self._alarm: int | None = None
        self._diagnosis: Diagnosis | None = None

    def observe(self, row: EditRow) -> None:
        """Take in the next edit's row. Costs nothing that grows with the number of edits before it."""
        self._diagnosis = None
        self._rows += 1
        self._edits += row.edit > 0
        flat = self._columns.flatten(row)
        self._ledger.add(row.edit, self._facts.check(flat) + self._drift.observe(flat))
        worst = self._ledger.worst
        if self._alarm is None and severity(worst) >= severity("diverging"):
            self._alarm = row.edit
        alarmed = self._alarm is not None
        lost = alarmed and self._ledger.has_hard_fact()
        self._lead_in.observe(flat, alarmed=alarmed, lost=lost, nonfinite=worst == "non-finite")
        self._forecaster.observe(flat)

    def diagnosis(self) -> Diagnosis:
        """What is known after the rows so far."""
        if self._diagnosis is None:
            worst, first_bad = self._ledger.worst, self._ledger.first_bad()
            findings = self._ledger.findings()
            cause = find_cause(self._lead_in.evidence(worst, findings, first_bad))
            self._diagnosis = diagnose(
                self._ledger.worst,
                rows=self._rows,
                edits=self._edits,
                baseline=self._drift.ready > 0,
                alarm=self._alarm,
                first_bad=first_bad,
                findings=findings,
                cause=cause,
                forecast=None if severity(worst) >= severity("collapsed") else self._forecaster.forecast(),
            )
        return self._diagnosis
