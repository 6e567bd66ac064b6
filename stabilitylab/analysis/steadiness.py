"""Whether an editor's statistics hold still while edits are made, at each place: frozen, running, or not known yet."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.columns import First, Once, Places
from stabilitylab.record.readings import Array

FROZEN: Final = 0.01
"""A change of the least std by more than a cast to another dtype makes means that the statistics are not frozen."""

State = Literal["", "frozen", "running"]


class Steadiness:
    """Follows the least std of each place, and the rows that it was made from. Once running, always running."""

    def __init__(self) -> None:
        self._std, self._rows = First(), First()
        self._once = Once()

    def observe(self, places: Places, stds: Array, rows: Array) -> tuple[NDArray[np.bool_], Array, Array]:
        """(which of these places run, for the first time that it shows; the first std there, and the first rows).

        stds: finite, [places]. rows: that they were made from, NaN where they are not counted, [places].
        """
        first_std, first_rows = self._std.of(places, stds), self._rows.of(places, rows)
        counted = ~np.isnan(rows) & ~np.isnan(first_rows)
        runs = (np.abs(stds - first_std) > FROZEN * np.abs(first_std)) | (counted & (rows != first_rows))
        self._once.new("held", places[self._once.said("read", places) & ~runs])
        self._once.new("read", places)
        runs[runs] = self._once.new("running", places[runs])
        return runs, first_std, first_rows

    def of(self, place: int) -> State:
        """What is known there: frozen from the second reading on that agrees with the first."""
        at = np.array([place], dtype=np.intp)
        if self._once.said("running", at)[0]:
            return "running"
        return "frozen" if self._once.said("held", at)[0] else ""
