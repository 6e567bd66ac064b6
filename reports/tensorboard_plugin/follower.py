"""The diagnosis of a run that grows: each row is looked at once, however often the file is read."""

from __future__ import annotations

from typing import Any

from stabilitylab.analysis import Analyzer, Diagnosis
from stabilitylab.run import Run


class Follower:
    """Says of one run what `Run.diagnosis` says, each time for the price of what is new."""

    def __init__(self) -> None:
        self._analyzer: Analyzer | None = None
        self._began: tuple[Any, ...] = ()
        self._rows = 0

    def diagnosis(self, run: Run) -> Diagnosis:
        """run: the same run as before, read again. Another one, or one that was begun anew, is looked at as a whole."""
        began = _beginning(run, self._rows)
        analyzer, self._analyzer = self._analyzer, None  # of no use if what follows fails
        if analyzer is None or began != self._began:
            analyzer = run.analyzed(run.thresholds)
        else:
            for edit in run.edits[self._rows :]:
                analyzer.observe(edit.row)
        diagnosis = analyzer.diagnosis()
        self._rows = len(run.edits)
        self._began = _beginning(run, self._rows)
        self._analyzer = analyzer
        return diagnosis


def _beginning(run: Run, rows: int) -> tuple[Any, ...]:
    """By what the first `rows` rows are known for those that were looked at, and judged in the same way."""
    ends = [(edit.edit, edit.row.started) for edit in run.edits[:rows]][-1:]
    return (run.metrics, run.manifest.get("thresholds"), run.manifest.get("created"), len(run.dry_edits), rows, ends)
