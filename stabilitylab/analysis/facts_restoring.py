"""The hard fact about restoring: one layer is not put back between edits while another is.

That is a fault of the loop, whatever the model says of it by then: what that layer gets adds up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stabilitylab.analysis.columns import Flat, PerSchema, Places, Schema
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.restoring import LONG, Restoring


class RestoringFacts:
    """Follows all applied edits that leave finite weights; `restoring` is what it saw."""

    def __init__(self) -> None:
        self.restoring = Restoring()
        self._weights = PerSchema(weights)

    def check(self, row: Flat) -> Iterator[Hit]:
        """The hit of one row, at the edit that established it."""
        at = self._weights.of(row.schema)
        if not row.applied or not at.size or not np.isfinite(row.values[at]).all():
            return
        updates, drifts = row.values[at].T
        known = self.restoring.forgotten
        sites = [row.schema.keys[position][1] for position in at[:, 0]]
        self.restoring.follow(row.edit, sites, updates, drifts)
        found = self.restoring.forgotten
        if found is None or known is not None:
            return
        position = at[sites.index(found.site), 1]
        says = (
            f"The weight of {found.site} is not put back between edits while another one is: at {LONG} edits in a row,"
            f" since edit {found.since}."
        )
        value = float(row.values[position])
        yield Hit("not-put-back", "drift.norm", int(row.places[position]), value, 0.0, "diverging", says, found.since)


def weights(schema: Schema) -> Places:
    """Positions of (update.norm, drift.norm) of each weight that has both: [weights, 2]."""
    position = schema.position
    found = [
        (at, position["drift.norm", site])
        for (metric, site), at in position.items()
        if metric == "update.norm" and ("drift.norm", site) in position
    ]
    return np.array(found, dtype=np.intp).reshape(-1, 2)
