"""Which edits are shown where there is no room for all of them: those that are flagged always are."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from stabilitylab.record.run import Run


def flagged_edits(run: Run) -> frozenset[int]:
    """The edits that nothing may leave out: the run's ends, failed ones, those of findings, and around the marks.

    The marks are onset, alarm, first bad edit and first NaN; the edits before and after each are there too.
    """
    if not run.edits:
        return frozenset()
    diagnosis = run.diagnosis()
    flagged = {run.edits[0].edit, run.edits[-1].edit}
    flagged |= {finding.edit for finding in diagnosis.findings} | {finding.start for finding in diagnosis.findings}
    flagged |= {edit.edit for edit in run.edits if edit.status == "failed"}
    for edit in (diagnosis.onset_edit, diagnosis.alarm_edit, diagnosis.first_bad_edit, diagnosis.first_nonfinite_edit):
        if edit is not None:
            flagged |= {edit - 1, edit, edit + 1}
    return frozenset(flagged)


def thinned(run: Run, most: int, keep: Collection[int]) -> list[int]:
    """Places in ``run.edits``, ascending: those of the edits in `keep`, filled up evenly to about `most`."""
    if len(run.edits) <= most:
        return list(range(len(run.edits)))
    places = {place for place, edit in enumerate(run.edits) if edit.edit in keep}
    spread = np.linspace(0, len(run.edits) - 1, max(2, most - len(places)))
    return sorted(places | {round(place) for place in spread})
