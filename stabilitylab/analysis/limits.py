"""Hard facts that are one metric against one limit, as a table: a rule of this kind is a line in it.

Where the limits come from:

- ``AGREEMENT``: nine in ten of the canary's answers changed, at three readings in a row, and more than
  ``harm.STILL_NATS`` away: within so much no answer's probability has moved by more than √(KL/2) (Pinsker's
  inequality), a fifth, and what changed were near ties, as of a model that was never trained.
- ``KL_COLLAPSED``: a mean KL of ln 100 nats multiplies the canary's perplexity against the original's own predictions
  by 100: from the 10–20 of a working language model to the 1,000 and more that the literature calls collapse.
  ``KL_DRIFTING``: the same with a factor of e. ``PERPLEXITY_RATIO``: the same of the canary's own text.
- ``SWALLOWED``: nine in ten of the entries that were to change are as before; a sound edit of a converging search was
  seen to lose half of them, the small ones, once. Three in a row: the edits are lost, the model is not.
- ``DENOMINATOR``: for u = C⁻¹k with a positive definite C of condition κ, cos(u, k) ≥ 2√κ / (1 + κ) (Kantorovich's
  inequality). Below 6e-4, κ is past 10⁷: no C that float32 can invert gives that, and the update is 1,600 times what
  it need be. A uᵀk below zero no positive definite C gives at all.
- ``CONDITION``: 10⁷ is where a solve in float32 keeps no digit (Golub and Van Loan, §2.6.2). The dtype of the system
  is not recorded, and in float64 such a system is sound, so this is a note; ``RESIDUAL``: one per cent of the right
  side unanswered is wrong in any dtype, if the system is ill-conditioned too (see `facts_editor`).
- ``EVERYTHING``, ``NOTHING``: a projection that leaves 99% of directions free preserves next to nothing; one that
  leaves a tenth has little room for an edit (sound ones on the zoo's small models leave 80% to 96%). Both may be right
  for some layer: notes.
- What exists at edit 0 that only edits can make (a cache of edited keys, a codebook, side memories): a note, since a
  run may be resumed on purpose.
- ``LOST``: a perplexity of 1,000 before any edit: the original that everything is compared with is itself lost, or
  was never trained on text like the canary's.

Severity: what harms the model is ``drifting`` or worse; what only loses an edit, or may be meant, is a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.columns import Flat, PerSchema, Places, Schema
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.harm import is_still
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.words import number, place_name
from stabilitylab.record.readings import Array

AGREEMENT: Final = 0.1
KL_DRIFTING: Final = 1.0
KL_COLLAPSED: Final = math.log(100.0)
PERPLEXITY_RATIO: Final = 100.0
LOST: Final = 1_000.0
SWALLOWED: Final = 0.9
DENOMINATOR: Final = 2.0 / math.sqrt(1e7)
CONDITION: Final = 1e7
EVERYTHING: Final = 0.99
NOTHING: Final = 0.1
SUSTAINED: Final = 3

When = Literal["any", "start", "edits"]


@dataclass(frozen=True)
class Limit:
    """One metric against one limit.

    compare: how the value must stand to the limit. sustained: readings in a row at which it must hold; a NaN among them
    is passed over. when: at edit 0 only, at edits only, or both. says: a format string over ``value``, ``number`` (the
    value in words), ``site``, ``edit`` and ``since``. unless_still: says nothing while the canary's
    predictions are where they were, see `harm.is_still`.
    """

    rule: str
    metric: str
    compare: Literal["<", "<=", ">", ">="]
    limit: float
    verdict: Verdict
    says: str
    sustained: int = 1
    when: When = "any"
    unless_still: bool = False


LIMITS: Final = (
    Limit(
        "canary-lost",
        "canary.agreement",
        "<=",
        AGREEMENT,
        "collapsed",
        "Since edit {since} the model agrees with the original on only {value:.0%} of the canary.",
        SUSTAINED,
        "edits",
        unless_still=True,
    ),
    Limit(
        "canary-collapsed",
        "canary.kl",
        ">=",
        KL_COLLAPSED,
        "collapsed",
        "Since edit {since} the canary's predictions are {number} nats from the original's.",
        SUSTAINED,
        "edits",
    ),
    Limit(
        "canary-moved",
        "canary.kl",
        ">=",
        KL_DRIFTING,
        "drifting",
        "Since edit {since} the canary's predictions are {number} nats from the original's.",
        SUSTAINED,
        "edits",
    ),
    Limit(
        "perplexity-lost",
        "canary.perplexity_ratio",
        ">=",
        PERPLEXITY_RATIO,
        "collapsed",
        "Since edit {since} the perplexity of the canary's text is {number} times the original's.",
        SUSTAINED,
        "edits",
    ),
    Limit(
        "original-lost",
        "canary.perplexity",
        ">=",
        LOST,
        "stable",
        "Before any edit the perplexity of the canary's text was {number}: the original that edits are compared with is"
        " lost already, or knows no such text.",
        when="start",
    ),
    Limit(
        "update-swallowed",
        "update.swallowed_share",
        ">=",
        SWALLOWED,
        "drifting",
        "Since edit {since} the dtype of {site} rounds the edits away: {value:.0%} of the entries that edit {edit} was"
        " to change are the same as before.",
        SUSTAINED,
    ),
    Limit(
        "masked-sequence",
        "attention.masked_sequences",
        ">",
        0,
        "stable",
        "{number} of the rows in edit {edit}'s batch are padding altogether.",
    ),
    Limit(
        "denominator-near-zero",
        "editor.denominator_ratio",
        "<=",
        DENOMINATOR,
        "diverging",
        "The update of {site} at edit {edit} was divided by next to nothing: uᵀk is {number} of ‖u‖‖k‖.",
    ),
    Limit(
        "denominator-negative",
        "editor.denominator",
        "<",
        0,
        "stable",
        "What the update of {site} was divided by at edit {edit} is negative, {number}: u is not C⁻¹k for this key.",
    ),
    Limit(
        "ill-conditioned",
        "editor.system_condition",
        ">=",
        CONDITION,
        "stable",
        "The system that the editor solved for {site} at edit {edit} has a condition of {number}: past 1e7 a solve in"
        " float32 is noise.",
    ),
    Limit(
        "covariance-singular",
        "editor.covariance_condition",
        ">=",
        CONDITION,
        "stable",
        "The covariance of keys at {site} has a condition of {number}: past 1e7 its inverse in float32 is noise.",
    ),
    Limit(
        "nothing-preserved",
        "editor.null_space_share",
        ">=",
        EVERYTHING,
        "stable",
        "The projection at {site} leaves {value:.2%} of the input directions free: next to nothing is preserved.",
    ),
    Limit(
        "no-room",
        "editor.null_space_share",
        "<=",
        NOTHING,
        "stable",
        "The projection at {site} leaves {value:.2%} of the input directions free: little room for an edit.",
    ),
    Limit(
        "key-unreachable",
        "editor.radius_min",
        "<",
        0,
        "stable",
        "A key of the codebook at {site} has a radius of {number} at edit {edit}, below zero: it answers to nothing.",
    ),
    Limit(
        "cache-before",
        "editor.cache_energy",
        ">",
        0,
        "stable",
        "The cache of edited keys at {site} was not empty before the first edit (its energy is {number}).",
        when="start",
    ),
    Limit(
        "codebook-before",
        "editor.keys",
        ">",
        0,
        "stable",
        "The codebook at {site} held {number} keys before the first edit.",
        when="start",
    ),
    Limit(
        "side-memory-before",
        "editor.side_drift",
        ">",
        0,
        "stable",
        "A side memory at {site} was {number} away from its layer's weight before the first edit.",
        when="start",
    ),
)


@dataclass(frozen=True)
class _Bounds:
    """All limits of one set of readings, to be looked at at once: [pairs of a reading and a limit]. sides: −1 where
    what is below a limit is out of line.
    """

    positions: Places
    numbers: Places
    sides: Array
    signed: Array

    def any(self, values: Array) -> NDArray[np.bool_]:
        """Whether some reading may have passed some limit, by row; values: [rows, readings]."""
        return np.asarray((values[:, self.positions] * self.sides >= self.signed).any(axis=1))

    def reached(self, values: Array) -> set[int]:
        """Numbers of the limits that some reading may have passed; most rows have passed none."""
        return set(self.numbers[values[self.positions] * self.sides >= self.signed].tolist())


def _bounds(schema: Schema) -> _Bounds:
    pairs = [
        (position, number, side, side * limit.limit)
        for position, (metric, _) in enumerate(schema.keys)
        for number, limit in enumerate(LIMITS)
        for side in (-1.0 if limit.compare in ("<", "<=") else 1.0,)
        if limit.metric == metric
    ]
    positions, numbers, sides, signed = np.array(pairs, dtype=np.float64).reshape(-1, 4).T
    return _Bounds(positions.astype(np.intp), numbers.astype(np.intp), sides, signed)


_COMPARE: Final = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


class LimitFacts:
    """Checks a row against every limit. Remembers, per limit and place, since when it has held."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._streaks: dict[str, dict[int, tuple[int, int]]] = {limit.rule: {} for limit in LIMITS}
        self._bounds = PerSchema(_bounds)

    @property
    def follows(self) -> bool:
        """Whether some limit was passed at the last row, and has to be looked at again."""
        return any(self._streaks.values())

    def may_reach(self, schema: Schema, values: Array) -> NDArray[np.bool_]:
        """Whether rows with these readings may have passed some limit, [rows]. values: [rows, readings]."""
        return self._bounds.of(schema).any(values)

    def check(self, row: Flat) -> Iterator[Hit]:
        """The hits of one row."""
        reached = self._bounds.of(row.schema).reached(row.values)
        for place, limit in enumerate(LIMITS):
            if place not in reached and not self._streaks[limit.rule]:
                continue
            at = self._lookup.at(limit.metric)
            if at.size and (limit.when == "any" or (row.edit == 0) == (limit.when == "start")):
                yield from self._against(limit, row)

    def _against(self, limit: Limit, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(limit.metric)
        holds = _COMPARE[limit.compare](row.values[at], limit.limit)
        if limit.unless_still and is_still(row):
            holds = np.zeros_like(holds)
        streaks = self._streaks[limit.rule]
        if streaks:
            for place in row.places[at[~holds & ~np.isnan(row.values[at])]].tolist():
                streaks.pop(place, None)
        for position in at[holds & ~self._lookup.once.said(limit.rule, row.places[at])] if holds.any() else ():
            here = int(row.places[position])
            length, since = streaks.get(here, (0, row.edit))
            streaks[here] = (length + 1, since)
            if length + 1 < limit.sustained:
                continue
            for place, value, metric, site in self._lookup.new(limit.rule, row, np.array([position])):
                says = limit.says.format(
                    value=value, number=number(value), site=place_name(site), edit=row.edit, since=since
                )
                start = since if limit.sustained > 1 else None
                yield Hit(limit.rule, metric, place, value, float(limit.limit), limit.verdict, says, start)
