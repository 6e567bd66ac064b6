"""Hard facts of the gradients inside the edits: none at all, one that nobody cleared.

- ``STILL``: three edits in a row whose loss sends a gradient of exactly 0 to every watched layer.
- ``RIGHT``: below a loss of 0.01 the gradient may round to zero rightly, since bfloat16 holds 1 − p only above 0.004.
- ``KEPT``: three edits in a row whose optimizer steps with a gradient that it has stepped with before, and that was
  only added to since. One may be on purpose: a step that is made up of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from stabilitylab.analysis.columns import Flat
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE

STILL: Final = 3
KEPT: Final = 3
RIGHT: Final = 0.01


class GradientFacts:
    """Checks what reached the watched layers, and whether what was used was cleared."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._dead = 0
        self._dead_since = 0
        self._reached = False
        self._kept = 0

    def check(self, row: Flat) -> Iterator[Hit]:
        """The hits of one row."""
        yield from self._zero(row)
        yield from self._carried(row)

    def _zero(self, row: Flat) -> Iterator[Hit]:
        """Gradients of exactly 0 at every watched layer, while there is a loss to reduce."""
        at, loss = self._lookup.at("gradient.norm"), self._lookup.value(row, "logits.loss", MODEL_SITE)
        if not row.applied or not at.size or loss is None or not RIGHT < loss < math.inf:
            return
        if (row.values[at] != 0).any():
            self._reached, self._dead = True, 0
            return
        self._dead_since = self._dead_since if self._dead else row.edit
        self._dead += 1
        if self._dead < STILL:
            return
        for place, value, metric, _ in self._lookup.new("zero-gradient", row, at[:1]):
            before = "though it did before" if self._reached else "nor has it ever"
            says = (
                f"Since edit {self._dead_since} the loss ({number(loss)} at edit {row.edit}) sends no gradient to any"
                f" watched layer, {before}."
            )
            # Where it never did, the layers may lie off the loss's path, which harms nothing.
            verdict: Verdict = "drifting" if self._reached else "stable"
            yield Hit("zero-gradient", metric, place, value, 0.0, verdict, says, self._dead_since)

    def _carried(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at("gradient.carried")
        if not row.applied or not at.size:
            return
        carried = at[row.values[at] > 0]
        self._kept = self._kept + 1 if carried.size else 0
        if self._kept < KEPT:
            return
        since = row.edit - KEPT + 1
        for place, value, metric, site in self._lookup.new("gradients-carried", row, carried[:1]):
            says = (
                f"Since edit {since} the optimizer steps at {site} with gradients that it has stepped with before:"
                " nothing clears .grad, and each backward adds to it."
            )
            yield Hit("gradients-carried", metric, place, value, 0.0, "stable", says, since)
