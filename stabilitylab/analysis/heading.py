"""Where the canary is heading: how far it will be from the original if it goes on as it has begun.

Whatever harms a model edit by edit shows in its answers first, and early: the divergence of the canary's predictions
grows by a factor per edit while it is still far from harmful. It is extrapolated by as many edits as the last readings
span, at a rate that nearly all pairs of them exceed. What is put back between edits heads nowhere, so readings before
such an edit are forgotten; where no weights are compared that can't be told, and nothing is claimed.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import numpy as np

from stabilitylab.analysis import detectors
from stabilitylab.analysis.columns import Columns, Flat, Once, PerSchema, Places
from stabilitylab.analysis.facts_restoring import weights
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.restoring import SAME
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE, Array, Key

METRIC: Final = "canary.kl"
RULE: Final = "canary-heading"
DETECTOR: Final = "canary-heading"
_NEAR: Final = math.e
"""A factor within which divergences are alike."""
_KL: Final[Key] = (METRIC, MODEL_SITE)


class HeadingBank:
    """Follows the canary's divergence. peaks: the largest statistic so far, by detector."""

    def __init__(self, columns: Columns, thresholds: Thresholds) -> None:
        self.peaks: dict[str, float] = {}
        self._columns = columns
        self._limit = thresholds.limit(DETECTOR)
        self._readings: deque[tuple[int, float]] = deque(maxlen=detectors.HEADING_READINGS)
        self._once = Once()
        self._weights = PerSchema(weights)

    def forget(self, hit: Hit) -> None:
        """What was claimed may be claimed again."""
        self._once.forget(hit.rule, hit.place)

    def observe(self, row: Flat) -> list[Hit]:
        """The hit of one row, if it is the first. Edit 0 counts as where the canary starts from."""
        position = row.schema.position.get(_KL)
        weights = self._weights.of(row.schema)
        if position is None or not weights.size or not row.finite[position]:
            return []
        if row.edit > 1 and self._began_anew(row, weights):
            self._readings.clear()
        self._readings.append((row.edit, float(row.values[position])))
        if not row.applied or row.edit == 0:
            return []
        edits, readings = np.array(self._readings).T
        ahead = detectors.heading(edits, readings)
        self.peaks[DETECTOR] = max(self.peaks.get(DETECTOR, 0.0), ahead / detectors.KL_NATS)
        at = row.places[[position]]
        if ahead < self._limit * detectors.KL_NATS or not self._once.new(RULE, at).any():
            return []
        span, limit = int(edits[-1] - edits[0]), self._limit * detectors.KL_NATS
        value, since = float(readings[-1]), _since(edits, readings)
        says = f"The canary's predictions are {number(value)} nats from the original's at edit {row.edit}"
        if value >= limit:  # it is there already: nothing is forecast
            return [Hit(RULE, METRIC, int(at[0]), value, limit, "diverging", f"{says} (limit {number(limit)}).", since)]
        says = f"{says}, forecast to reach {number(ahead)} within {span} more edits (limit {number(limit)})."
        return [Hit(RULE, METRIC, int(at[0]), value, limit, "diverging", says, since, forecast=ahead)]

    def _began_anew(self, row: Flat, weights: Places) -> bool:
        """Whether the edit began at the original weights, wherever it moved one."""
        update, drift = row.values[weights].T
        moved = update > 0
        with np.errstate(invalid="ignore", over="ignore"):  # what is infinite began nowhere
            return bool(moved.any() and (np.abs(drift - update) <= SAME * drift)[moved].all())


def _since(edits: Array, readings: Array) -> int:
    """The first edit after the last reading that was still near the least of them."""
    near = np.maximum(readings, detectors.HEADING_LEAST) <= _NEAR * max(float(readings.min()), detectors.HEADING_LEAST)
    after = edits[int(np.flatnonzero(near)[-1]) + 1 :]
    return int(after[0] if after.size else edits[-1])
