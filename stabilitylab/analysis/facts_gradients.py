"""Hard facts of the gradients inside the edits: none at all, one that nobody cleared, one that moves next to nothing.

- ``STILL``: three edits in a row whose loss sends a gradient of exactly 0 to every watched layer.
- ``RIGHT``: below a loss of 0.01 the gradient may round to zero rightly, since bfloat16 holds 1 − p only above 0.004.
- ``KEPT``: three edits in a row whose optimizer steps with a gradient that it has stepped with before, and that was
  only added to since. One may be on purpose: a step that is made up of two.
- ``ROUNDED``: three edits in a row that step with a gradient and leave nine in ten of its entries where they were, in a
  weight of 16 bits. An optimizer's step moves each entry that has a gradient, unless it is rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Flat
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE

STILL: Final = 3
KEPT: Final = 3
RIGHT: Final = 0.01
ROUNDED: Final = 3
FEW: Final = 0.1
OWN: Final = (1.0, 2.0)
"""Codes of `gradient.source`: what the loop itself steps with."""


class GradientFacts:
    """Checks what reached the watched layers, and whether what was used was cleared."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._dead = 0
        self._dead_since = 0
        self._reached = False
        self._kept = 0
        self._rounded: dict[int, int] = {}

    def check(self, row: Flat) -> Iterator[Hit]:
        """The hits of one row."""
        yield from self._zero(row)
        yield from self._carried(row)
        yield from self._rounded_away(row)

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

    def _rounded_away(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at("update.moved_share")
        if not row.applied:
            return
        for position in at:
            place, site = int(row.places[position]), self._lookup.key(row, position)[1]
            asked = self._asked(row, site)
            # What moves nothing at all has other reasons too, see `landing`.
            low = 0 < float(row.values[position]) <= FEW * asked
            self._rounded[place] = self._rounded.get(place, 0) + 1 if low else 0
            if self._rounded[place] < ROUNDED:
                continue
            same = 1.0 - float(row.values[position]) / asked
            since = row.edit - ROUNDED + 1
            for _, _, metric, _ in self._lookup.new("update-swallowed", row, np.array([position])):
                says = (
                    f"Since edit {since} the dtype of {site} rounds the edits away: {same:.0%} of the entries that have"
                    " a gradient are the same as before."
                )
                yield Hit("update-swallowed", metric, place, same, 1.0 - FEW, "stable", says, since)

    def _asked(self, row: Flat, site: str) -> float:
        """The share of a weight's entries that the loop's own gradient is about; 0 where that is not known."""
        source, zeros, norm = (
            self._lookup.value(row, f"gradient.{name}", site) for name in ("source", "zero_share", "norm")
        )
        if source not in OWN or zeros is None or norm is None or not 0 < norm < math.inf:
            return 0.0
        return 1.0 - zeros
