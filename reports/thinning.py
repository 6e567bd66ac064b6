"""Which edits are shown where there is no room for all of them: those that are flagged always are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.record.run import Run

MOST_FAILED: Final = 500
"""Failed edits that are flagged, of many spread evenly: a loop may fail at every edit."""


def flagged_edits(run: Run) -> frozenset[int]:
    """The edits that nothing may leave out: the run's ends, failed ones, those of findings, and around the marks.

    The marks are onset, alarm, first bad edit and first NaN; the edits before and after each are there too.
    """
    if not run.edits:
        return frozenset()
    diagnosis = run.diagnosis()
    flagged = {run.edits[0].edit, run.edits[-1].edit}
    flagged |= {finding.edit for finding in diagnosis.findings} | {finding.start for finding in diagnosis.findings}
    failed = np.array([edit.edit for edit in run.edits if edit.status == "failed"], dtype=np.intp)
    flagged |= set(failed[_spread(failed.size, MOST_FAILED)].tolist())
    for edit in (diagnosis.onset_edit, diagnosis.alarm_edit, diagnosis.first_bad_edit, diagnosis.first_nonfinite_edit):
        if edit is not None:
            flagged |= {edit - 1, edit, edit + 1}
    return frozenset(flagged)


def extreme_edits(run: Run) -> frozenset[int]:
    """The edits at which what is read at one site is furthest out: the largest and the smallest value of each scalar,
    and where it begins and ends to be no finite number.
    """
    found: set[int] = set()
    for metric in run.metrics:
        if metric.length > 1 or len(run.sites_of(metric.name)) != 1:
            continue
        values, there = run.series(metric.name), run.present(metric.name)
        finite, bad = np.flatnonzero(np.isfinite(values)), np.flatnonzero(there & ~np.isfinite(values))
        places = [*bad[:1], *bad[-1:]]
        if finite.size and values[finite].min() < values[finite].max():
            places += [finite[values[finite].argmin()], finite[values[finite].argmax()]]
        found |= {run.edits[place].edit for place in places}
    return frozenset(found)


def thinned(run: Run, most: int, keep: Collection[int], also: Collection[int] = ()) -> list[int]:
    """Places in ``run.edits``, ascending: those of the edits in `keep`, and in `also` as far as there is room, evenly;
    filled up evenly to about `most`.
    """
    numbers = run.edit_numbers
    if numbers.size <= most:
        return list(range(numbers.size))
    kept = np.isin(numbers, list(keep))
    more = np.flatnonzero(np.isin(numbers, list(also)) & ~kept)
    kept[more[_spread(more.size, max(0, most - int(kept.sum())))]] = True
    kept[_spread(numbers.size, max(2, most - int(kept.sum())))] = True
    return [int(place) for place in np.flatnonzero(kept)]


def _spread(size: int, most: int) -> NDArray[np.intp]:
    """Places in a list of `size` things: all, or `most` of them, the first and the last among them."""
    return np.round(np.linspace(0, size - 1, min(size, most))).astype(np.intp)
