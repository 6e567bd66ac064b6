"""Hard facts: claims that one reading (or a few in a row) proves, with no baseline. They act from edit 0.

The limits and where they come from:

- ``HEADROOM_BITS``: one more doubling is what a single edit does to an extreme value in an ordinary run; under 2 bits
  a tensor is two doublings from infinity. Only a *fall* counts: a massive activation of a healthy fp16 model can have
  1.5 bits before any edit (FINDINGS.md, section 4), and is then worth a note.
- ``INPUT_DRIFTING``, ``INPUT_DIVERGING``: a value standardised with the mean and standard deviation of n rows can't
  exceed (n−1)/√n among those rows (Samuelson's inequality). |z| ≥ 100 would need ten thousand rows and |z| ≥ 1,000 a
  million, so a unit that reaches them is out of anything its normaliser saw, or was all but constant then.
- ``TINY_STD``: MEND divides by std + 1e-7. A layer input's std within ten times that guard means that the guard, not
  the data, sets the scale.
- ``AGREEMENT``: nine in ten of the canary's answers changed, at three readings in a row.
- ``KL_COLLAPSED``: a mean KL of ln 100 nats multiplies the canary's perplexity against the original's own predictions
  by 100: from the 10–20 of a working language model to the 1,000 and more that the literature calls collapse.
  ``KL_DRIFTING``: the same with a factor of e. Both at three readings in a row.
- ``STILL``: an edit that is right already may rightly move nothing, so weights that used to move must stand still for
  three applied edits in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.columns import Columns, Flat, Places, kind_of
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.readings import EDITOR_SITE

HEADROOM_BITS: Final = 2.0
INPUT_DRIFTING: Final = 100.0
INPUT_DIVERGING: Final = 1_000.0
TINY_STD: Final = 1e-6
AGREEMENT: Final = 0.1
KL_DRIFTING: Final = 1.0
KL_COLLAPSED: Final = math.log(100.0)
SUSTAINED: Final = 3
STILL: Final = 3

NO_PROOF: Final = frozenset({"drift.ratio", "gradient.stable_rank", "feedback.gain", "editor.input_unit"})
"""Derived readings: NaN there may come from 0/0 or a log of zero, with every measured value finite."""


def number(value: float) -> str:
    """A value for a sentence: ``320,000``, ``0.032``, ``3.2e+05``, ``NaN``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinity"
    if value == int(value) and abs(value) < 1e5:
        return f"{int(value):,}"
    return f"{value:.3g}"


def place_name(site: str) -> str:
    """A site in a sentence."""
    return "the model" if site == "model" else site


Says = Callable[[str, str], str]


class _Streak:
    """How many readings in a row a condition held, and since which edit."""

    def __init__(self) -> None:
        self.length = 0
        self.since = 0

    def update(self, holds: bool, edit: int) -> bool:
        """Count one reading; whether the condition has held for ``SUSTAINED`` of them."""
        if not holds:
            self.length = 0
        else:
            self.since = self.since if self.length else edit
            self.length += 1
        return self.length >= SUSTAINED


class FactRules:
    """Checks each row. Lookups are by (metric, site) place and redone only when the set of readings changes."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._at: dict[str, Places] = {}
        self._done: dict[str, NDArray[np.bool_]] = {}
        self._first_headroom: dict[int, float] = {}
        self._streaks: dict[tuple[str, int], _Streak] = {}
        self._still = 0
        self._still_since = 0
        self._moved = False

    def check(self, row: Flat) -> list[Hit]:
        """The hits of one row; a claim that was made at a site before is not made again."""
        if row.fresh:
            self._look_up(row)
        hits: list[Hit] = []
        for rule in (self._nonfinite, self._dead, self._headroom, self._editor_input, self._editor_std, self._canary):
            hits += rule(row)
        return hits + self._unmoved(row)

    def _look_up(self, row: Flat) -> None:
        """Positions within the row, by what is checked there."""
        names = [self._columns.keys[place][0] for place in row.places]
        layer_input = [self._columns.keys[place][1].endswith(".u") for place in row.places]
        chosen: dict[str, Sequence[bool]] = {
            "count": [name.endswith(".nonfinite") for name in names],
            "value": [
                name not in NO_PROOF and not name.endswith((".nonfinite", ".headroom_bits")) for name in names
            ],
            "dead": [name.endswith(".dead") for name in names],
            "headroom": [name.endswith(".headroom_bits") for name in names],
            "input": [name == f"{EDITOR_SITE}.input_max" for name in names],
            "zeros": [name == f"{EDITOR_SITE}.std_zeros" for name in names],
            "tiny": [
                name == f"{EDITOR_SITE}.std_min" and is_input for name, is_input in zip(names, layer_input, strict=True)
            ],
            "agreement": [name == "canary.agreement" for name in names],
            "kl": [name == "canary.kl" for name in names],
            "update": [name == "update.norm" for name in names],
        }
        self._at = {what: np.flatnonzero(np.array(mask, dtype=bool)) for what, mask in chosen.items()}

    def _new(self, rule: str, row: Flat, at: Places) -> Places:
        """Those positions in the row at which `rule` has not spoken before; marks them as spoken for."""
        done = self._done.get(rule, np.zeros(0, dtype=bool))
        if done.size < len(self._columns.keys):
            done = np.concatenate((done, np.zeros(len(self._columns.keys) - done.size, dtype=bool)))
            self._done[rule] = done
        at = at[~done[row.places[at]]]
        done[row.places[at]] = True
        return at

    def _hits(
        self, rule: str, row: Flat, at: Places, threshold: float, verdict: Verdict, says: Callable[[float], Says]
    ) -> Iterator[Hit]:
        for position in self._new(rule, row, at):
            place, value = int(row.places[position]), float(row.values[position])
            yield Hit(rule, self._columns.keys[place][0], place, value, threshold, verdict, says(value))

    def _nonfinite(self, row: Flat) -> list[Hit]:
        counts, values, headroom = self._at["count"], self._at["value"], self._at["headroom"]
        with np.errstate(invalid="ignore"):
            bad = np.concatenate(
                (
                    counts[~(row.values[counts] == 0)],
                    values[~row.finite[values]],
                    headroom[np.isnan(row.values[headroom]) | (row.values[headroom] == -np.inf)],
                )
            )
        at = self._new("non-finite", row, bad)
        # One tensor gone bad shows in many readings of it. The count of bad values, which comes first here, speaks for
        # all of its kind at that site.
        spoken: set[tuple[str, str]] = set()
        hits = []
        for position in at:
            place, value = int(row.places[position]), float(row.values[position])
            metric, site = self._columns.keys[place]
            if (kind_of(metric), site) not in spoken:
                spoken.add((kind_of(metric), site))
                if math.isfinite(value) and not metric.endswith(".nonfinite"):
                    value = math.nan  # a vector whose first entry is still finite
                hits.append(
                    Hit("non-finite", kind_of(metric), place, value, 0.0, "non-finite", _says_nonfinite(value, row.edit))
                )
        return hits

    def _dead(self, row: Flat) -> Iterator[Hit]:
        at = self._at["dead"]

        def says(_: float) -> Says:
            return lambda metric, site: (
                f"All {metric.partition('.')[0]} {'logits ' if metric.startswith('canary') else ''}of {place_name(site)}"
                f" are equal at edit {row.edit}: finite, but the model says nothing any more."
            )

        return self._hits("dead", row, at[row.values[at] == 1], 1.0, "collapsed", says)

    def _headroom(self, row: Flat) -> Iterator[Hit]:
        at = self._at["headroom"]
        at = at[row.finite[at]]
        for position in at:
            self._first_headroom.setdefault(int(row.places[position]), float(row.values[position]))
        at = at[row.values[at] < HEADROOM_BITS]
        if not at.size:
            return
        first = np.array([self._first_headroom[int(place)] for place in row.places[at]])
        had_it = first < HEADROOM_BITS

        def says(value: float) -> Says:
            return lambda metric, site: (
                f"{number(value)} bits from overflow at edit {row.edit}: the largest {_thing(metric)} of {site} is that"
                f" many doublings from what its dtype can hold."
            )

        def says_before(value: float) -> Says:
            return lambda metric, site: (
                f"The largest {_thing(metric)} of {site} was only {number(value)} bits from overflow when first read."
            )

        yield from self._hits("headroom-before", row, at[had_it], HEADROOM_BITS, "stable", says_before)
        fell = ~had_it | (row.values[at] <= first - 1.0)
        yield from self._hits("headroom", row, at[fell], HEADROOM_BITS, "diverging", says)

    def _editor_input(self, row: Flat) -> Iterator[Hit]:
        at = self._at["input"]
        at = at[row.finite[at]]

        def says(value: float) -> Says:
            return lambda metric, site: (
                f"An input to the editor's network at {site} reached {number(value)} standard deviations at edit"
                f" {row.edit}; its normaliser would need {number(value * value)} rows to have seen that."
            )

        yield from self._hits(
            "input-limit", row, at[row.values[at] >= INPUT_DIVERGING], INPUT_DIVERGING, "diverging", says
        )
        yield from self._hits(
            "input-large", row, at[row.values[at] >= INPUT_DRIFTING], INPUT_DRIFTING, "drifting", says
        )

    def _editor_std(self, row: Flat) -> Iterator[Hit]:
        zeros, tiny = self._at["zeros"], self._at["tiny"]

        def says_zeros(value: float) -> Says:
            return lambda metric, site: (
                f"{number(value)} units of the editor's frozen normaliser at {site} have a standard deviation of 0: a"
                f" latent risk, since such a unit's input is multiplied by 1/ε the first time that it is not constant."
            )

        def says_tiny(value: float) -> Says:
            return lambda metric, site: (
                f"The smallest standard deviation of the editor's normaliser at {site} is {number(value)}: a latent"
                f" risk, since that unit's input is divided by it."
            )

        yield from self._hits("zero-std", row, zeros[row.values[zeros] > 0], 0.0, "stable", says_zeros)
        small = tiny[(row.values[tiny] > 0) & (row.values[tiny] <= TINY_STD)]
        yield from self._hits("tiny-std", row, small, TINY_STD, "stable", says_tiny)

    def _canary(self, row: Flat) -> Iterator[Hit]:
        for what, rule, limit, verdict in (
            ("agreement", "canary-lost", AGREEMENT, "collapsed"),
            ("kl", "canary-collapsed", KL_COLLAPSED, "collapsed"),
            ("kl", "canary-moved", KL_DRIFTING, "drifting"),
        ):
            for position in self._at[what]:
                if row.edit == 0 or not row.finite[position]:
                    continue
                place, value = int(row.places[position]), float(row.values[position])
                streak = self._streaks.setdefault((rule, place), _Streak())
                holds = value <= limit if what == "agreement" else value >= limit
                if streak.update(holds, row.edit) and self._new(rule, row, np.array([position])).size:
                    yield Hit(
                        rule, what, place, value, limit, verdict, _says_canary(what, value, streak.since),  # type: ignore[arg-type]
                        streak.since,
                    )

    def _unmoved(self, row: Flat) -> list[Hit]:
        at = self._at["update"]
        if not row.applied or not at.size:
            return []
        if row.values[at].any():
            self._moved, self._still = True, 0
            return []
        self._still_since = self._still_since if self._still else row.edit
        self._still += 1
        at, watched = at[:1], at.size
        place, since = int(row.places[at[0]]), self._still_since
        if not self._moved:
            if not self._new("never-moved", row, at).size:
                return []
            return [
                Hit("never-moved", "update.norm", place, 0.0, 0.0, "stable", lambda metric, site: (
                    f"Edit {since} moved none of the {watched} watched sites: are these the layers that the editor edits?"
                ))
            ]
        if self._still < STILL or not self._new("stopped-moving", row, at).size:
            return []
        return [
            Hit("stopped-moving", "update.norm", place, 0.0, 0.0, "drifting", lambda metric, site: (
                f"Since edit {since} no edit moves any of the {watched} watched sites, though edits did before: the"
                f" update is zero, or too small for the dtype to hold."
            ), since)
        ]


def _thing(metric: str) -> str:
    return {"weight": "weight", "activation": "activation"}.get(kind_of(metric), "value")


def _says_nonfinite(value: float, edit: int) -> Says:
    def says(metric: str, site: str) -> str:
        what = {"weight": "weights", "activation": "activations", "gradient": "gradients", "canary": "canary logits"}
        thing = what.get(kind_of(metric), kind_of(metric))
        if metric.endswith(".nonfinite") and math.isfinite(value):
            return f"{number(value)} {thing} of {place_name(site)} are NaN or infinite at edit {edit}."
        return f"{metric} at {place_name(site)} is {number(value)} at edit {edit}."

    return says


def _says_canary(what: str, value: float, since: int) -> Says:
    if what == "agreement":
        return lambda metric, site: (
            f"Since edit {since} the model gives other answers than the original to all but {value:.0%} of the canary."
        )
    return lambda metric, site: (
        f"Since edit {since} the canary's predictions are {number(value)} nats from the original's: its perplexity"
        f" against them is {number(math.exp(min(value, 700.0)))} times what it was."
    )
