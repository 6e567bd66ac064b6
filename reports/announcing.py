"""The alarm as it is raised: one line on stderr, once a run, for whoever watches the loop and nothing else.

stabilitylab: edit 12: diverging at 1.fc2: outputs 11 times usual (cause: …). Look: stabilitylab check runs/x
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, severity
from stabilitylab.analysis.grouping import Group, grouped
from stabilitylab.record.readings import EditRow
from stabilitylab.reports.events import place_words, short_places
from stabilitylab.reports.text import clean

WIDEST: Final = 160
"""Columns of the line, unless the run's path alone is longer."""
LEAST: Final = 40
"""Columns that are left for what was found, however long the path is."""


class AlarmSink:
    """Says on stderr that the run is diverging or worse, once: after the first edit whose diagnosis says so."""

    waits_for_alarm: Final = True
    """It says nothing before."""

    def __init__(self, run: Path) -> None:
        """run: the run's folder, as the user may type it."""
        self._run = run
        self._said = False

    def on_row(self, row: EditRow, diagnosis: Diagnosis | None) -> None:
        """Look whether this row raised the alarm."""
        if self._said or diagnosis is None or diagnosis.alarm_edit is None:
            return
        self._said = True
        line = announcement(diagnosis, row.edit, (site for _, site in row.readings), self._run)
        if sys.stderr is not None:  # None under pythonw
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Nothing is held."""


def announcement(diagnosis: Diagnosis, edit: int, sites: Iterable[str], run: Path) -> str:
    """The line. sites: the names of all that was read, which says how short each can be."""
    event = _event(diagnosis)
    head = f"stabilitylab: edit {edit}: {diagnosis.verdict} at {place_words(event, short_places(sites))}: "
    cause = "" if diagnosis.cause == UNKNOWN_CAUSE else f" (cause: {clean(diagnosis.cause, 40)})"
    tail = f"{cause}. Look: stabilitylab check {clean(run, 400)}"
    room = max(LEAST, WIDEST - len(head) - len(tail))
    return f"{head}{clean(event.short, room)}{tail}"


def _event(diagnosis: Diagnosis) -> Group:
    """That of finding 1, unless that only says where: then the first that raised the alarm."""
    events = grouped(diagnosis.findings)
    return next((event for event in events if severity(event.verdict) >= severity("diverging")), events[0])
