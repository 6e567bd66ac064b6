"""Hard facts of the editor's own state that need more than one limit; its statistics are in `facts_normaliser`.

- ``INPUT_DRIFTING``, ``INPUT_DIVERGING``: a value standardised with the mean and standard deviation of n rows can't
  exceed (n−1)/√n among those rows (Samuelson's inequality). |z| ≥ 100 would need ten thousand rows and |z| ≥ 1,000 a
  million, so a unit that reaches them is far out of all that its normaliser saw, or was all but constant then.
- ``RESIDUAL``: see `stabilitylab.analysis.limits`. Alone it proves nothing: least squares leave a residual rightly.
- ``PINNED``: at eight edits in a row the search for v* ends on its norm clamp after at least half of its steps, and at
  three quarters of these edits after every step (``FILLED``), the first ones included: the clamp, and not the answer,
  says what is written. Ending there after most steps is usual, and after all of them happens: sound ROME runs on the
  zoo's small models do the one at most edits, the other at up to five in a row, but with searches between that end
  early.
- ``FELL``: the update's denominator at a tenth of its own median, over five edits or more. A note: it says which edit.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from statistics import median
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Flat
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.limits import CONDITION
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE

INPUT_DRIFTING: Final = 100.0
INPUT_DIVERGING: Final = 1_000.0
RESIDUAL: Final = 0.01
FILLED: Final = 0.95
FREE: Final = 0.5
MOSTLY: Final = 0.75
PINNED: Final = 8
FELL: Final = 0.1
USUAL: Final = 5
WINDOW: Final = 30


class EditorFacts:
    """Checks the editor's inputs, and what its updates are divided by and solved from."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._denominators: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._largest = 0.0
        self._pinned: dict[int, tuple[int, int, int]] = {}

    def check(self, row: Flat) -> Iterator[Hit]:
        """The hits of one row."""
        for rule in (
            self._input,
            self._solve,
            self._denominator,
            self._clamp,
        ):
            yield from rule(row)

    def _input(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(f"{EDITOR_SITE}.input_max")
        at = at[row.finite[at]]
        limits: tuple[tuple[str, float, Verdict], ...] = (
            ("input-limit", INPUT_DIVERGING, "diverging"),
            ("input-large", INPUT_DRIFTING, "drifting"),
        )
        for rule, limit, verdict in limits:
            over = at[row.values[at] >= limit]
            if rule == "input-large":  # the higher limit has said it
                over = over[~self._lookup.once.said("input-limit", row.places[over])]
            for place, value, metric, site in self._lookup.new(rule, row, over):
                says = (
                    f"An input to the editor's network at {site} is {number(value)} standard deviations from its mean"
                    f" at edit {row.edit}: statistics of n rows hold nothing beyond √n."
                )
                yield Hit(rule, metric, place, value, limit, verdict, says)

    def _clamp(self, row: Flat) -> Iterator[Hit]:
        at, steps = self._lookup.at(f"{EDITOR_SITE}.clamp_hits"), self._lookup.value(row, "logits.passes", MODEL_SITE)
        if not row.applied or steps is None:
            return
        pinned = row.values[at] > FREE * steps
        if self._pinned:
            for place in row.places[at[~pinned]].tolist():
                self._pinned.pop(place, None)
        for position in at[pinned]:
            place, hits = int(row.places[position]), float(row.values[position])
            since, run, filled = self._pinned.get(place, (row.edit, 0, 0))
            run, filled = run + 1, filled + (hits >= FILLED * steps)
            self._pinned[place] = since, run, filled
            if run < PINNED or filled < MOSTLY * run:
                continue
            for _, value, metric, site in self._lookup.new("clamp-pinned", row, np.array([position])):
                says = (
                    f"At {filled} of {run} edits since edit {since} every step of the search for the value to write at"
                    f" {site} ends on its norm clamp."
                )
                yield Hit("clamp-pinned", metric, place, value, FILLED * steps, "stable", says, since)

    def _solve(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(f"{EDITOR_SITE}.solve_residual")
        for position in at[row.values[at] >= RESIDUAL]:
            site = self._lookup.key(row, position)[1]
            condition = self._lookup.value(row, f"{EDITOR_SITE}.system_condition", site)
            if condition is None or not condition >= CONDITION:
                continue
            for place, value, metric, _ in self._lookup.new("solve-failed", row, at[at == position]):
                says = (
                    f"The editor's solve for {site} at edit {row.edit} leaves {value:.0%} of its right side unanswered,"
                    f" with a system of condition {number(condition)}."
                )
                # The update that was applied is not the one that the method defines.
                yield Hit("solve-failed", metric, place, value, RESIDUAL, "drifting", says)

    def _denominator(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(f"{EDITOR_SITE}.denominator_ratio")
        at = at[row.finite[at]]
        low = row.values[at] <= FELL * self._largest  # no median is above the largest: most need not be found
        self._largest = row.values[at].max(initial=self._largest)
        for position, is_low in zip(at, low.tolist(), strict=True):
            place, value = int(row.places[position]), float(row.values[position])
            before = self._denominators[place]
            usual = median(before) if is_low and len(before) >= USUAL else 0.0
            before.append(value)
            if not is_low or not value <= FELL * usual:
                continue
            for _, _, metric, site in self._lookup.new("denominator-fell", row, np.array([position])):
                says = (
                    f"What the update of {site} is divided by fell to {number(value)} of ‖u‖‖k‖ at edit {row.edit};"
                    f" usual is {number(usual)}."
                )
                yield Hit("denominator-fell", metric, place, value, FELL * usual, "stable", says)
