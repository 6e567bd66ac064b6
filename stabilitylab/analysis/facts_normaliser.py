"""Hard facts of what an editor's inputs are normalised with: its statistics, and the rows that they were made from.

A normaliser that has seen no row yet has no statistics, and none are read: nothing here is said of it.

- ``TINY_STD``: MEND divides by std + 1e-7. A layer input's std within ten times that guard means that the guard, not
  the data, sets the scale. Gradients can be that small by nature, so it holds for layer inputs only; 0 is 0 for both.
- One row has no spread: its std is 0 or NaN at every unit, whatever was in it. Where rows are not counted, that is what
  shows. A batch of one row makes the std of running statistics NaN, for good, however many rows they were made from.
- ``RESTARTED``: all of a normaliser's smallest standard deviations, of two sites or more, change by a quarter or more
  in one edit, and were above zero: those of a normaliser that has seen nothing yet begin, they don't begin anew. One
  more batch among many changes them by a few per cent, and hardly all at once; where batches are small and change them
  more, the change must be four times the usual one, in logs. Where rows are counted, a count that falls says it by
  itself, and one that grows says that more rows made the change. A loop that takes an edit back may take the rows of
  that edit back too: the count must fall below what it was two edits ago.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.columns import Before, Flat, PerSchema, Places, Schema
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.steadiness import Steadiness
from stabilitylab.analysis.words import listed, number
from stabilitylab.record.readings import EDITOR_SITE, Array, EditRow

TINY_STD: Final = 1e-6
RESTARTED: Final = 1.25
OUT_OF_LINE: Final = 4.0
TOGETHER: Final = 2
WINDOW: Final = 30

ROWS: Final = f"{EDITOR_SITE}.seen_rows"
_STD: Final = f"{EDITOR_SITE}.std_min"
_SPREADLESS: Final = f"{EDITOR_SITE}.no_spread"
_ONE_ROW: Final = ("no-row", "one-row", "one-row-update", "spreadless")


class NormaliserFacts:
    """Checks each row. Follows by itself how steady the statistics are."""

    def __init__(self, lookup: Lookup) -> None:
        self.steadiness = Steadiness()
        self._lookup = lookup
        self._last_std = Before()
        self._last_rows = Before()
        self._rows_before = Before()
        self._changes: deque[float] = deque(maxlen=WINDOW)
        self._beside = PerSchema(_rows_beside)
        self._rebuilt = False

    def rebuilt(self) -> None:
        """The host builds the editor anew between edits, and its statistics with it."""
        self._rebuilt = True

    def check(self, edit: EditRow, row: Flat) -> Iterator[Hit]:
        """The hits of one row. edit: the same, as it came: a list of units is more than its first value."""
        yield from self._one_row(row)
        yield from self._zeros(edit, row)
        yield from self._tiny(row)
        yield from self._moved(row)
        yield from self._restart(row)

    # -- what they were made from ---------------------------------------------------------------------------------

    def _one_row(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(_SPREADLESS)
        for position in at[row.values[at] == 1]:
            site = self._lookup.key(row, position)[1]
            rows, bad = (self._lookup.value(row, name, site) for name in (ROWS, f"{EDITOR_SITE}.nonfinite"))
            spoilt = bad is not None and bad > 0
            rule, says = _few(site, row.edit, rows, "NaN" if spoilt else "0", spoilt=spoilt)
            for place, value, metric, _ in self._lookup.new(rule, row, np.array([position])) if rule else ():
                yield Hit(rule, metric, place, value, 1.0, "stable", says)

    def _explained(self, row: Flat) -> set[str]:
        """Sites of which it was said that one row, or none, is all that they were made from."""
        at = self._lookup.at(_SPREADLESS)
        said = [self._lookup.once.said(rule, row.places[at]) for rule in _ONE_ROW]
        return {self._lookup.key(row, position)[1] for position in at[np.logical_or.reduce(said)]}

    # -- spreads of 0, or next to it ------------------------------------------------------------------------------

    def _zeros(self, edit: EditRow, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(f"{EDITOR_SITE}.std_zeros")
        at = at[row.values[at] > 0]
        if not at.size:
            return
        explained = self._explained(row)
        at = at[[self._lookup.key(row, position)[1] not in explained for position in at]]
        for place, value, metric, site in self._lookup.new("zero-std", row, at):
            units = "1 unit has" if value == 1 else f"{number(value)} units have"
            known = edit.readings.get((f"{EDITOR_SITE}.zero_units", site))
            which = "" if known is None else f", {listed('unit', known.tolist(), int(value))}"
            says = (
                f"{units} a standard deviation of 0 in the editor's normaliser at {site}{which}: a latent risk, since"
                " such a unit is divided by next to nothing the first time that it is not constant."
            )
            yield Hit("zero-std", metric, place, value, 0.0, "stable", says)

    def _tiny(self, row: Flat) -> Iterator[Hit]:
        least = self._lookup.at("layer-std")
        tiny = least[(row.values[least] > 0) & (row.values[least] <= TINY_STD)]
        for place, value, metric, site in self._lookup.new("tiny-std", row, tiny):
            says = (
                f"The smallest standard deviation in the editor's normaliser at {site} is {number(value)}: a latent"
                " risk, since that unit is divided by it."
            )
            yield Hit("tiny-std", metric, place, value, TINY_STD, "stable", says)

    # -- statistics that do not hold still ------------------------------------------------------------------------

    def _moved(self, row: Flat) -> Iterator[Hit]:
        at, rows = self._spreads(row)
        known = row.finite[at] & (rows != 0)  # what it holds before its first row is no spread of anything
        at, rows = at[known], rows[known]
        runs, stds, counts = self.steadiness.observe(row.places[at], row.values[at], rows)
        for position, count, std, was in zip(at[runs], rows[runs], stds[runs], counts[runs], strict=True):
            for place, value, metric, site in self._lookup.new("statistics-moved", row, np.array([position])):
                what = f"the smallest standard deviation was {number(std)} and is {number(value)}"
                if not math.isnan(count) and not math.isnan(was) and count != was:
                    what = f"they were made from {_rows(was)} and are now from {number(count)}"
                how = "were made anew by" if self._rebuilt else "are running at"
                says = f"The statistics of the editor's normaliser at {site} {how} edit {row.edit}: {what}."
                yield Hit("statistics-moved", metric, place, value, float(std), "stable", says)

    def _spreads(self, row: Flat) -> tuple[Places, Array]:
        """Where the smallest spreads are, and the rows that each was made from: NaN where they are not counted."""
        beside = self._beside.of(row.schema)
        rows = np.where(beside >= 0, row.values[beside], np.nan) if beside.size else np.zeros(0)
        return self._lookup.at(_STD), rows

    def _restart(self, row: Flat) -> Iterator[Hit]:
        fell, grew = self._counted(row)
        jumped = self._jumped(row, grew)
        for position, was in fell[:1]:
            for place, value, metric, site in self._lookup.new("statistics-restarted", row, np.array([position])):
                says = (
                    f"The editor's normaliser began anew at edit {row.edit}: at {site} it had seen {_rows(was)}, and"
                    f" has now seen {number(value)}."
                )
                yield Hit("statistics-restarted", metric, place, value, was, "drifting", says)
        if fell or jumped is None:
            return
        position, was = jumped
        for place, value, metric, site in self._lookup.new("statistics-restarted", row, np.array([position])):
            says = (
                f"The editor's normaliser began anew at edit {row.edit}: its smallest standard deviations all jumped at"
                f" once, at {site} from {number(was)} to {number(value)}."
            )
            yield Hit("statistics-restarted", metric, place, value, was, "drifting", says)

    def _counted(self, row: Flat) -> tuple[list[tuple[np.intp, float]], NDArray[np.bool_]]:
        """(where a count of rows fell, each with what it was; at which positions of the row one grew)."""
        at, grew = self._lookup.at(ROWS), np.zeros(row.values.size, dtype=bool)
        if not at.size:
            return [], grew
        places, now = row.places[at], row.values[at]
        _, last = self._last_rows.swap(places, now)
        _, earlier = self._rows_before.swap(places, last)
        grew[at] = now > last
        below = (now < last) & ~(now >= earlier)  # NaN where it was not read: then the last alone counts
        return list(zip(at[below], last[below].tolist(), strict=True)), grew

    def _jumped(self, row: Flat, grew: NDArray[np.bool_]) -> tuple[np.intp, float] | None:
        """Where the first of the smallest std jumped, and from what, if all of them did, and no more rows made it."""
        at, beside = self._lookup.at(_STD), self._beside.of(row.schema)
        now = row.values[at]
        read, before = self._last_std.swap(row.places[at], now)
        still = now.size >= TOGETHER and bool((now == before).all()) and not grew.any()
        if still and float(now.min()) > 0 and float(now.max()) < math.inf:  # as mostly: each is what it was
            self._changes.append(0.0)
            return None
        read &= ~((beside >= 0) & grew[beside])
        at, before, after = at[read], before[read], now[read]
        low, high = np.where(after < before, after, before), np.where(after > before, after, before)
        # A std that was 0 had seen nothing, or nothing but a constant: what it sees next is no new beginning.
        telling = (before > 0) | np.isnan(before + after)
        at, before, low, high = at[telling], before[telling], low[telling], high[telling]
        if at.size < TOGETHER:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            change = float(np.min(np.log(high / low)))
        usual = median(self._changes) if self._changes else 0.0
        self._changes.append(change if change < math.inf else 0.0)
        # Not in the usual course of statistics that go on running.
        if not (high >= RESTARTED * low).all() or change < OUT_OF_LINE * usual:
            return None
        return at[0], float(before[0])


def _rows_beside(schema: Schema) -> Places:
    """The position of the count of rows beside each smallest spread, in order; −1 where they are not counted."""
    sites = [site for metric, site in schema.keys if metric == _STD]
    return np.array([schema.position.get((ROWS, site), -1) for site in sites], dtype=np.intp)


def _rows(count: float) -> str:
    return "1 row" if count == 1 else f"{number(count)} rows"


def _few(site: str, edit: int, rows: float | None, std: str, *, spoilt: bool) -> tuple[str, str]:
    """(rule, sentence) of statistics without any spread; empty where other rows than one or none made them so."""
    of, spread = f"editor's normaliser at {site}", f"its standard deviation is {std} at every unit"
    if rows == 0:
        return "no-row", f"The {of} is used at edit {edit} before it has seen any row: {spread}."
    if rows == 1:
        return "one-row", f"The {of} is made from one row by edit {edit}: a spread needs two, and {spread}."
    if spoilt:
        update = "an update with a single row makes running statistics so, for good"
        return "one-row-update", f"The {of} has means and no spread at edit {edit}, {std} at every unit: {update}."
    if rows is None:
        return "spreadless", f"The {of} looks made from one row at edit {edit}: a spread needs two, and {spread}."
    return "", ""
