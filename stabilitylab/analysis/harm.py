"""Size alone is no harm: where a canary watches the function and holds still, a size out of line is drift at most.

A verdict is about what became of the model. A step that is large beside its weight, a jump, a level far above the
baseline: each is a reason to look, and the canary is where to look. Where it holds still the claim is made, as drift;
should the canary leave soon after, it is made again for what it was.

Growth that is faster than edits add up is not size alone: it ends at a hard limit, whatever the canary says by now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from stabilitylab.analysis.columns import Flat
from stabilitylab.analysis.detectors import HEADING_LEAST
from stabilitylab.analysis.findings import severity
from stabilitylab.analysis.ledger import SIZE_RULES, Hit
from stabilitylab.record.readings import MODEL_SITE, Key

STILL_NATS: Final = HEADING_LEAST
"""An edit's own small trace: up to so much the canary holds still."""
STILL_SHARE: Final = 0.9
"""Of the canary's tokens that must still be answered as before."""
SOON: Final = 10
"""Edits within which a canary that leaves gives a size its meaning."""
_KL: Final[Key] = ("canary.kl", MODEL_SITE)
_AGREEMENT: Final[Key] = ("canary.agreement", MODEL_SITE)


def is_still(row: Flat) -> bool:
    """Whether the canary was read and its predictions are within ``STILL_NATS`` of the original's, as a mean KL: what
    else changed there are ties.
    """
    position = row.schema.position.get(_KL)
    return position is not None and bool(row.values[position] <= STILL_NATS)


class Harm:
    """Follows the canary, and weighs what is claimed of sizes by it."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Hit]] = []

    def weigh(self, row: Flat, hits: Sequence[Hit]) -> list[Hit]:
        """The hits of a row as they count. What was held back before comes with them, once the canary has left."""
        still = self._holds_still(row)
        if still is None:
            return list(hits)
        if still:
            sizes = [hit for hit in hits if hit.rule in SIZE_RULES and severity(hit.verdict) >= severity("diverging")]
            self._held += [(row.edit, hit) for hit in sizes]
            return [replace(hit, verdict="drifting") if hit in sizes else hit for hit in hits]
        soon = [(edit, hit) for edit, hit in self._held if row.edit - edit <= SOON]
        self._held.clear()
        # Under a rule of its own: the claim as drift is booked already.
        back = [replace(hit, rule=f"{hit.rule}-harmful", since=hit.since or edit) for edit, hit in soon]
        return [*hits, *back]

    def _holds_still(self, row: Flat) -> bool | None:
        """None where the canary was not read."""
        positions = [row.schema.position.get(key) for key in (_KL, _AGREEMENT)]
        if positions[0] is None or positions[1] is None:
            return None
        kl, agreement = (float(row.values[position]) for position in positions if position is not None)
        return kl <= STILL_NATS and agreement >= STILL_SHARE
