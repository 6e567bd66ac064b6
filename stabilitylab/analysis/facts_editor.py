"""Hard facts of the editor's own state that need more than one limit.

- ``INPUT_DRIFTING``, ``INPUT_DIVERGING``: a value standardised with the mean and standard deviation of n rows can't
  exceed (n−1)/√n among those rows (Samuelson's inequality). |z| ≥ 100 would need ten thousand rows and |z| ≥ 1,000 a
  million, so a unit that reaches them is far out of all that its normaliser saw, or was all but constant then.
- ``TINY_STD``: MEND divides by std + 1e-7. A layer input's std within ten times that guard means that the guard, not
  the data, sets the scale. Gradients can be that small by nature, so it holds for layer inputs only.
- ``RESIDUAL``: see `stabilitylab.analysis.limits`. Alone it proves nothing: least squares leave a residual rightly.
- ``FROZEN``: statistics are frozen while edits are made; a change of the least std by more than a cast to another
  dtype makes (1%) means that they are not.
- ``RESTARTED``: all of a normaliser's smallest standard deviations, of two sites or more, change by a quarter or more
  in one edit, and were above zero: those of a normaliser that has seen nothing yet begin, they don't begin anew. One
  more batch among many changes them by a few per cent, and hardly all at once; where batches are small and change them
  more, the change must be four times the usual one, in logs.
- ``PINNED``: at eight edits in a row the search for v* ends on its norm clamp after at least half of its steps, and at
  three quarters of these edits after every step (``FILLED``), the first ones included: the clamp, and not the answer,
  says what is written. Ending there after most steps is usual, and after all of them happens: sound ROME runs on the
  zoo's small models do the one at most edits, the other at up to five in a row, but with searches between that end
  early.
- ``FELL``: the update's denominator at a tenth of its own median, over five edits or more. A note: it says which edit.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from statistics import median
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Before, First, Flat
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.limits import CONDITION
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE

INPUT_DRIFTING: Final = 100.0
INPUT_DIVERGING: Final = 1_000.0
TINY_STD: Final = 1e-6
RESIDUAL: Final = 0.01
FROZEN: Final = 0.01
RESTARTED: Final = 1.25
OUT_OF_LINE: Final = 4.0
TOGETHER: Final = 2
FILLED: Final = 0.95
FREE: Final = 0.5
MOSTLY: Final = 0.75
PINNED: Final = 8
FELL: Final = 0.1
USUAL: Final = 5
WINDOW: Final = 30


class EditorFacts:
    """Checks the editor's inputs, its normalisers, and what its updates are divided by and solved from."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._first_std = First()
        self._last_std = Before()
        self._denominators: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._changes: deque[float] = deque(maxlen=WINDOW)
        self._largest = 0.0
        self._pinned: dict[int, tuple[int, int, int]] = {}

    def check(self, row: Flat) -> Iterator[Hit]:
        """The hits of one row."""
        for rule in (
            self._input,
            self._std,
            self._statistics,
            self._restart,
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

    def _std(self, row: Flat) -> Iterator[Hit]:
        zeros, least = self._lookup.at(f"{EDITOR_SITE}.std_zeros"), self._lookup.at("layer-std")
        for place, value, metric, site in self._lookup.new("zero-std", row, zeros[row.values[zeros] > 0]):
            units = "1 unit has" if value == 1 else f"{number(value)} units have"
            says = (
                f"{units} a standard deviation of 0 in the editor's frozen normaliser at {site}: a latent risk, since"
                " such a unit is divided by next to nothing the first time that it is not constant."
            )
            yield Hit("zero-std", metric, place, value, 0.0, "stable", says)
        tiny = least[(row.values[least] > 0) & (row.values[least] <= TINY_STD)]
        for place, value, metric, site in self._lookup.new("tiny-std", row, tiny):
            says = (
                f"The smallest standard deviation in the editor's frozen normaliser at {site} is {number(value)}: a"
                " latent risk, since that unit is divided by it."
            )
            yield Hit("tiny-std", metric, place, value, TINY_STD, "stable", says)

    def _statistics(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(f"{EDITOR_SITE}.std_min")
        at = at[row.finite[at]]
        firsts = self._first_std.of(row.places[at], row.values[at])
        moved = np.abs(row.values[at] - firsts) > FROZEN * np.abs(firsts)
        if moved.any():
            moved &= ~self._lookup.once.said("statistics-moved", row.places[at])
        for position, first in zip(at[moved], firsts[moved].tolist(), strict=True):
            for place, value, metric, site in self._lookup.new("statistics-moved", row, np.array([position])):
                says = (
                    f"The editor's normaliser at {site} is not frozen: its smallest standard deviation was"
                    f" {number(first)} and is {number(value)} at edit {row.edit}."
                )
                yield Hit("statistics-moved", metric, place, value, first, "stable", says)

    def _restart(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(f"{EDITOR_SITE}.std_min")
        read, before = self._last_std.swap(row.places[at], row.values[at])
        at, before, after = at[read], before[read], row.values[at[read]]
        low, high = np.where(after < before, after, before), np.where(after > before, after, before)
        # A std that was 0 had seen nothing, or nothing but a constant: what it sees next is no new beginning.
        telling = (before > 0) | np.isnan(before + after)
        at, before, low, high = at[telling], before[telling], low[telling], high[telling]
        if at.size < TOGETHER:
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            change = float(np.min(np.log(high / low)))
        usual = median(self._changes) if self._changes else 0.0
        self._changes.append(change if change < math.inf else 0.0)
        # Not in the usual course of statistics that go on running.
        if not (high >= RESTARTED * low).all() or change < OUT_OF_LINE * usual:
            return
        was, now = float(before[0]), float(row.values[at[0]])
        for place, value, metric, site in self._lookup.new("statistics-restarted", row, at[:1]):
            says = (
                f"The editor's normaliser began anew at edit {row.edit}: its smallest standard deviations all jumped at"
                f" once, at {site} from {number(was)} to {number(now)}."
            )
            yield Hit("statistics-restarted", metric, place, value, was, "drifting", says)

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
