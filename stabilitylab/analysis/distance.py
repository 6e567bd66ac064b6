"""What needs no baseline: how large an update is beside its weight, and how far the canary is from the original.

The statistics are those of `stabilitylab.analysis.detectors`, their limits are calibrated. One reading is enough, so
that the first edit of a run can raise the alarm. Like drift, and unlike a hard fact, it is a claim about what healthy
runs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from stabilitylab.analysis import detectors
from stabilitylab.analysis.columns import Columns, Flat, Once, PerSchema, Places, Schema
from stabilitylab.analysis.harm import is_still
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.analysis.words import number, place_name
from stabilitylab.record.readings import Array


@dataclass(frozen=True)
class Distance:
    """detector: whose limit counts. statistic: of readings; reading: the opposite. twice: whether two readings in a row
    must say so, since an edit that is taken back leaves one. unless_still: whether the canary's predictions must have
    left where they were too, see `harm.is_still`. says: over ``number``, ``share``, ``site``, ``edit`` and ``since``.
    """

    detector: str
    rule: str
    metric: str
    statistic: Callable[[Array], Array]
    reading: Callable[[float], float]
    says: str
    twice: bool = False
    unless_still: bool = False


STEP: Final = Distance(
    "step",
    "large-step",
    "update.norm",
    lambda ratio: ratio,
    lambda statistic: statistic,
    "Edit {edit} changed the weight of {site} by {number} times the norm that it had before any edit.",
)
CANARY: Final = (
    Distance(
        "canary-kl",
        "canary-far",
        "canary.kl",
        lambda kl: kl / detectors.KL_NATS,
        lambda statistic: statistic * detectors.KL_NATS,
        "The canary's predictions are {number} nats from the original's at edit {edit}.",
    ),
    Distance(
        "canary-agreement",
        "canary-far",
        "canary.agreement",
        lambda agreement: (1.0 - agreement) / detectors.CHANGED,
        lambda statistic: 1.0 - statistic * detectors.CHANGED,
        "At edit {edit} the model agrees with the original on only {share} of the canary; on few since edit {since}.",
        twice=True,
        unless_still=True,
    ),
)


USUAL: Final = 2.0
"""Times the largest step of the dry edits: of n of them, one more is larger than all with probability 1/(n + 1)."""


class DistanceBank:
    """Checks each row of an applied edit. peaks: the largest statistic of each detector so far."""

    def __init__(self, columns: Columns, thresholds: Thresholds) -> None:
        self.peaks: dict[str, float] = {}
        self._columns = columns
        self._limits = {distance.detector: thresholds.limit(distance.detector) for distance in (STEP, *CANARY)}
        self._once = Once()
        self._weights = PerSchema(_weights)
        self._canaries = PerSchema(_canaries)
        self._before: dict[tuple[str, int], tuple[int, float]] = {}

    def observe_dry(self, row: Flat) -> None:
        """Take in a dry edit: a step that this loop makes and takes back is no news when it makes it again."""
        usual = USUAL * float(STEP.statistic(self._steps(row)[1]).max(initial=0.0))
        self._limits[STEP.detector] = max(self._limits[STEP.detector], usual)

    def forget(self, hit: Hit) -> None:
        """What was claimed may be claimed again."""
        self._once.forget(hit.rule, hit.place)

    def observe(self, row: Flat) -> list[Hit]:
        """The hits of one row; a claim that was made at a site before is not made again."""
        if row.edit == 0 or not row.applied:
            return []
        hits = self._check(STEP, row, *self._steps(row))
        for distance in CANARY:
            at = self._canaries.of(row.schema)[distance.metric]
            if not at.size:
                continue
            at = at[row.finite[at]]
            values = row.values[at]
            if distance.unless_still and is_still(row):
                values = np.full_like(values, distance.reading(0.0))
            hits += self._check(distance, row, at, values)
        return hits

    def _steps(self, row: Flat) -> tuple[Places, Array]:
        """(positions of updates, each over the norm of the original weight). ``update.ratio`` is over the norm that the
        update left, and ends at 1.
        """
        weights = self._weights.of(row.schema)
        if not weights.size:
            return weights[:, 0], np.zeros(0)
        update, drift, ratio = row.values[weights].T
        known = row.finite[weights].all(axis=1) & (drift > 0) & (ratio > 0)
        return weights[known, 0], update[known] * ratio[known] / drift[known]

    def _check(self, distance: Distance, row: Flat, at: Places, values: Array) -> list[Hit]:
        if not at.size:
            return []
        statistic, since = distance.statistic(values), np.full(at.size, row.edit)
        if distance.twice:
            statistic, since = self._least_of_two(distance.detector, row, at, statistic)
        self.peaks[distance.detector] = max(self.peaks.get(distance.detector, 0.0), float(statistic.max()))
        high = np.flatnonzero(statistic >= self._limits[distance.detector])
        new = high[self._once.new(distance.rule, row.places[at[high]])]
        return [
            self._hit(distance, row, int(row.places[at[number]]), float(values[number]), int(since[number]))
            for number in new
        ]

    def _least_of_two(self, detector: str, row: Flat, at: Places, statistic: Array) -> tuple[Array, Places]:
        """(the lesser of this reading and the one before, 0 where there is none; the edit of the one before)."""
        keys = [(detector, int(place)) for place in row.places[at]]
        before = [self._before.get(key, (row.edit, 0.0)) for key in keys]
        self._before |= {key: (row.edit, float(value)) for key, value in zip(keys, statistic, strict=True)}
        edits, values = zip(*before, strict=True)
        return np.minimum(statistic, values), np.array(edits, dtype=np.intp)

    def _hit(self, distance: Distance, row: Flat, place: int, value: float, since: int) -> Hit:
        site = place_name(self._columns.keys[place][1])
        says = distance.says.format(number=number(value), share=f"{value:.0%}", site=site, edit=row.edit, since=since)
        threshold = distance.reading(self._limits[distance.detector])
        return Hit(distance.rule, distance.metric, place, value, threshold, "diverging", says, since)


def _canaries(schema: Schema) -> dict[str, Places]:
    """Positions in a row of what is read of the canary."""
    return {
        distance.metric: np.array(
            [position for position, (metric, _) in enumerate(schema.keys) if metric == distance.metric], dtype=np.intp
        )
        for distance in CANARY
    }


def _weights(schema: Schema) -> Places:
    """Positions in a row of each weight's update, drift and relative drift, [weights, 3]."""
    found = [
        [schema.position.get((metric, site), -1) for metric in ("update.norm", "drift.norm", "drift.ratio")]
        for site in dict.fromkeys(site for metric, site in schema.keys if metric == "update.norm")
    ]
    known = np.array(found, dtype=np.intp).reshape(-1, 3)
    return known[(known >= 0).all(axis=1)]
