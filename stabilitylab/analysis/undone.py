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

from stabilitylab.analysis.columns import Flat, PerSchema, Places, Schema
from stabilitylab.analysis.facts_restoring import weights

EXACTLY: Final = 1e-12
"""Share of ‖W_t − W_0‖ within which ‖W_t − W_{t−1}‖ is the same number. An edit that is a thousand times the one before
it differs by 1e-6 only: what is near is not enough to withdraw an alarm.
"""


@dataclass(frozen=True)
class Undo:
    """What one row shows of the edits before it. broken: those that left a weight which is finite again. begins_anew:
    whether its edit began at the original weights, wherever it moved one.
    """

    broken: frozenset[int] = frozenset()
    begins_anew: bool = False


class Undone:
    """Follows every row."""

    def __init__(self) -> None:
        self._counts = PerSchema(_counts)
        self._weights = PerSchema(weights)
        self._broken: list[int] = []

    def observe(self, row: Flat) -> Undo:
        """Take in a row."""
        counts = row.values[self._counts.of(row.schema)]
        if not row.applied or not counts.size:
            return Undo()
        if (counts > 0).any():
            self._broken.append(row.edit)
            return Undo()
        broken, self._broken = frozenset(self._broken), []
        return Undo(broken, row.edit > 1 and self._begins_anew(row))

    def _begins_anew(self, row: Flat) -> bool:
        update, drift = row.values[self._weights.of(row.schema)].T
        moved = update > 0
        with np.errstate(invalid="ignore"):
            return bool(moved.any() and (np.abs(drift - update) <= EXACTLY * drift)[moved].all())


def _counts(schema: Schema) -> Places:
    found = [position for position, (metric, _) in enumerate(schema.keys) if metric == "weight.nonfinite"]
    return np.array(found, dtype=np.intp)
