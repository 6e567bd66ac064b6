"""Edits that were put back: what they left behind was passing, and is no verdict about the model.

- A weight that was not finite and is finite again was put back, by whoever looks after the loop: whatever was claimed
  of those edits counts as drift at most, and may be claimed anew.
- A step that was large, and was followed by an edit that began at the original weights, was undone: size is then no
  harm, whether a canary watches or not. It is what this loop's steps are like, and is not claimed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Before, Flat, PerSchema, Places, Schema
from stabilitylab.analysis.facts_restoring import weights

EXACTLY: Final = 1e-12
"""Share of ‖W_t − W_0‖ within which ‖W_t − W_{t−1}‖ is the same number: what is near is not enough to withdraw an
alarm."""
TELLING: Final = 1e-3
"""Share of ‖W_t − W_0‖ that ‖W_{t−1} − W_0‖ must have for that to say anything: beside an edit that dwarfs all before
it, they are nothing, whether they were put back or not."""


@dataclass(frozen=True)
class Undo:
    """What one row shows of the edits before it. broken: those that left a weight which is finite again. begins_anew:
    whether its edit began at the original weights, wherever it moved one.
    """

    broken: frozenset[int] = frozenset()
    begins_anew: bool = False


NOTHING: Final = Undo()


class Undone:
    """Follows every row."""

    def __init__(self) -> None:
        self._counts = PerSchema(_counts)
        self._weights = PerSchema(weights)
        self._broken: list[int] = []
        self._away = Before()

    def observe(self, row: Flat) -> Undo:
        """Take in a row."""
        at = self._counts.of(row.schema)
        begins_anew = self._begins_anew(row)
        if not row.applied or not at.size:
            return NOTHING
        if (row.values[at] > 0).any():
            self._broken.append(row.edit)
            return NOTHING
        if not self._broken and not begins_anew:
            return NOTHING
        broken, self._broken = frozenset(self._broken), []
        return Undo(broken, begins_anew)

    def _begins_anew(self, row: Flat) -> bool:
        at = self._weights.of(row.schema)
        if not at.size:
            self._away.forget()
            return False
        update, drift = row.values[at].T
        read, away = self._away.swap(row.places[at[:, 1]], drift)
        with np.errstate(invalid="ignore", over="ignore"):
            moved = read & (update > 0)
            same = (np.abs(drift - update) <= EXACTLY * drift) & (away >= TELLING * drift)
        return bool(moved.any() and same[moved].all())


def _counts(schema: Schema) -> Places:
    found = [position for position, (metric, _) in enumerate(schema.keys) if metric == "weight.nonfinite"]
    return np.array(found, dtype=np.intp)
