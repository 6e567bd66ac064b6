"""Hard facts: claims that one reading (or a few in a row) proves, with no baseline. They act from edit 0.

The limits and where they come from:

- ``HEADROOM_BITS``: under 2 bits a tensor is two doublings from infinity. Only a *fall* to there counts: a massive
  activation of a healthy fp16 model can have 1.5 bits before any edit (FINDINGS.md, section 4); that is worth a note.
- ``INPUT_DRIFTING``, ``INPUT_DIVERGING``: a value standardised with the mean and standard deviation of n rows can't
  exceed (n−1)/√n among those rows (Samuelson's inequality). |z| ≥ 100 would need ten thousand rows and |z| ≥ 1,000 a
  million, so a unit that reaches them is far out of all that its normaliser saw, or was all but constant then.
- ``TINY_STD``: MEND divides by std + 1e-7. A layer input's std within ten times that guard means that the guard, not
  the data, sets the scale. Gradients can be that small by nature, so it holds for layer inputs only.
- ``AGREEMENT``: nine in ten of the canary's answers changed, at three readings in a row.
- ``KL_COLLAPSED``: a mean KL of ln 100 nats multiplies the canary's perplexity against the original's own predictions
  by 100: from the 10–20 of a working language model to the 1,000 and more that the literature calls collapse.
  ``KL_DRIFTING``: the same with a factor of e. Both at three readings in a row.
- ``STILL``: an edit that is right already may rightly move nothing, so weights that used to move must stand still for
  three applied edits in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Columns, Flat, Once, Places, kind_of
from stabilitylab.analysis.findings import Verdict
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.words import number, place_name
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

NO_PROOF: Final = frozenset(
    {
        "drift.ratio",
        "gradient.stable_rank",
        "feedback.gain",
        "editor.input_unit",
        "weight.condition_number",
        "canary.perplexity",
        "canary.perplexity_ratio",
        "editor.covariance_condition",
        "editor.system_condition",
    }
)
"""Derived readings: NaN or infinity there may come from x/0 or a log of zero, with every measured value finite."""

_CANARY_RULES: Final[tuple[tuple[str, str, float, Verdict], ...]] = (
    ("canary.agreement", "canary-lost", AGREEMENT, "collapsed"),
    ("canary.kl", "canary-collapsed", KL_COLLAPSED, "collapsed"),
    ("canary.kl", "canary-moved", KL_DRIFTING, "drifting"),
)
_MANY: Final = {
    "weight": "weights",
    "activation": "activations",
    "attention": "attention logits",
    "gradient": "gradient entries",
    "logits": "logits",
    "canary": "canary logits",
    "editor": "statistics",
}


def _before_norm(metric: str) -> bool:
    return metric.endswith(".norm_headroom_bits")


def _what_is_near(metric: str, site: str) -> str:
    if _before_norm(metric):
        return f"The largest input of the normalisation after {site}"
    return f"The largest {kind_of(metric)} of {site}"


class FactRules:
    """Checks each row. Lookups are by (metric, site) place, and redone only when the set of readings changes."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._once = Once()
        self._at: dict[str, Places] = {}
        self._first_headroom: dict[int, float] = {}
        self._streaks: dict[tuple[str, int], tuple[int, int]] = {}
        self._still = 0
        self._still_since = 0
        self._moved = False

    def check(self, row: Flat) -> list[Hit]:
        """The hits of one row; a claim that was made at a site before is not made again."""
        if row.fresh:
            self._look_up(row)
        rules = (self._nonfinite, self._dead, self._headroom, self._editor_input, self._editor_std, self._canary)
        return [hit for rule in (*rules, self._unmoved) for hit in rule(row)]

    def _look_up(self, row: Flat) -> None:
        """Positions within the row, by metric and by what is checked."""
        at: dict[str, list[int]] = {}
        for position, place in enumerate(row.places):
            metric, site = self._columns.keys[place]
            at.setdefault(metric, []).append(position)
            kind = metric.rpartition(".")[2].removeprefix("norm_")
            if kind in {"nonfinite", "headroom_bits", "dead"}:
                at.setdefault(f"*.{kind}", []).append(position)
            if kind not in {"nonfinite", "headroom_bits"} and metric not in NO_PROOF:
                at.setdefault("value", []).append(position)
            if metric == f"{EDITOR_SITE}.std_min" and site.endswith(".u"):
                at.setdefault("layer-std", []).append(position)
        self._at = {what: np.array(positions, dtype=np.intp) for what, positions in at.items()}

    def _read(self, what: str) -> Places:
        return self._at.get(what, np.zeros(0, dtype=np.intp))

    def _new(self, rule: str, row: Flat, at: Places) -> Iterator[tuple[int, float, str, str]]:
        """(place, value, metric, site) of those positions in the row at which `rule` has not spoken before."""
        places = row.places[at]
        for position in at[self._once.new(rule, places)]:
            place = int(row.places[position])
            yield (place, float(row.values[position]), *self._columns.keys[place])

    def _nonfinite(self, row: Flat) -> Iterator[Hit]:
        counts, values, headroom = self._read("*.nonfinite"), self._read("value"), self._read("*.headroom_bits")
        bits = row.values[headroom]
        bad = np.concatenate(
            (
                counts[~(row.values[counts] == 0)],
                values[~row.finite[values]],
                headroom[np.isnan(bits) | (bits == -np.inf)],
            )
        )
        # One tensor gone bad shows in many readings of it: the count of bad values, first here, speaks for all of its
        # kind at that site.
        spoken: set[tuple[str, str]] = set()
        for place, value, metric, site in self._new("non-finite", row, bad):
            kind = kind_of(metric)
            if (kind, site) in spoken:
                continue
            spoken.add((kind, site))
            counted = metric.endswith(".nonfinite")
            shown = value if counted or not math.isfinite(value) else math.nan  # a vector that is bad further on
            found = " (in the model as this edit found it)" if kind == "logits" else ""
            says = (
                f"{number(value)} {_MANY.get(kind, kind)} of {place_name(site)} are NaN or infinite at edit"
                f" {row.edit}{found}."
                if counted and math.isfinite(value)
                else f"{metric} at {place_name(site)} is {number(shown)} at edit {row.edit}{found}."
            )
            yield Hit("non-finite", kind, place, shown, 0.0, "non-finite", says)

    def _dead(self, row: Flat) -> Iterator[Hit]:
        at = self._read("*.dead")
        for place, value, metric, _ in self._new("dead", row, at[row.values[at] == 1]):
            whose = "canary's" if kind_of(metric) == "canary" else "model's"
            says = f"The {whose} logits are all equal at edit {row.edit}: finite, but they say nothing any more."
            yield Hit("dead", metric, place, value, 1.0, "collapsed", says)

    def _headroom(self, row: Flat) -> Iterator[Hit]:
        at = self._read("*.headroom_bits")
        at = at[row.finite[at]]
        for place, bits in zip(row.places[at], row.values[at], strict=True):
            self._first_headroom.setdefault(int(place), float(bits))
        at = at[row.values[at] < HEADROOM_BITS]
        first = np.array([self._first_headroom[int(place)] for place in row.places[at]])
        had_none = first < HEADROOM_BITS
        fell = ~had_none | (row.values[at] <= first - 1.0)
        for place, bits, metric, site in self._new("headroom-before", row, at[had_none]):
            says = f"{_what_is_near(metric, site)} was only {number(bits)} bits from overflow when first read."
            yield Hit("headroom-before", metric, place, bits, HEADROOM_BITS, "stable", says)
        for place, bits, metric, site in self._new("headroom", row, at[fell]):
            limit = "where its square overflows" if _before_norm(metric) else "what its dtype can hold"
            says = f"{_what_is_near(metric, site)} is {number(bits)} bits (doublings) from {limit} at edit {row.edit}."
            yield Hit("headroom", metric, place, bits, HEADROOM_BITS, "diverging", says)

    def _editor_input(self, row: Flat) -> Iterator[Hit]:
        at = self._read(f"{EDITOR_SITE}.input_max")
        at = at[row.finite[at]]
        limits: tuple[tuple[str, float, Verdict], ...] = (
            ("input-limit", INPUT_DIVERGING, "diverging"),
            ("input-large", INPUT_DRIFTING, "drifting"),
        )
        for rule, limit, verdict in limits:
            over = at[row.values[at] >= limit]
            if rule == "input-large":  # the higher limit has said it
                over = over[~self._once.said("input-limit", row.places[over])]
            for place, value, metric, site in self._new(rule, row, over):
                says = (
                    f"An input to the editor's network at {site} is {number(value)} standard deviations from its mean"
                    f" at edit {row.edit}: statistics of n rows hold nothing beyond √n."
                )
                yield Hit(rule, metric, place, value, limit, verdict, says)

    def _editor_std(self, row: Flat) -> Iterator[Hit]:
        zeros, least = self._read(f"{EDITOR_SITE}.std_zeros"), self._read("layer-std")
        for place, value, metric, site in self._new("zero-std", row, zeros[row.values[zeros] > 0]):
            units = "1 unit has" if value == 1 else f"{number(value)} units have"
            says = (
                f"{units} a standard deviation of 0 in the editor's frozen normaliser at {site}: a latent risk, since"
                " such a unit is divided by next to nothing the first time that it is not constant."
            )
            yield Hit("zero-std", metric, place, value, 0.0, "stable", says)
        tiny = least[(row.values[least] > 0) & (row.values[least] <= TINY_STD)]
        for place, value, metric, site in self._new("tiny-std", row, tiny):
            says = (
                f"The smallest standard deviation in the editor's frozen normaliser at {site} is {number(value)}: a"
                " latent risk, since that unit is divided by it."
            )
            yield Hit("tiny-std", metric, place, value, TINY_STD, "stable", says)

    def _canary(self, row: Flat) -> Iterator[Hit]:
        for name, rule, limit, verdict in _CANARY_RULES:
            at = self._read(name)
            for position in at[row.finite[at]] if row.edit > 0 else ():
                place, value = int(row.places[position]), float(row.values[position])
                length, since = self._streaks.get((rule, place), (0, row.edit))
                holds = value <= limit if name == "canary.agreement" else value >= limit
                length, since = (length + 1, since if length else row.edit) if holds else (0, row.edit)
                self._streaks[rule, place] = (length, since)
                if length < SUSTAINED or not self._once.new(rule, row.places[position : position + 1])[0]:
                    continue
                says = f"Since edit {since} the canary's predictions are {number(value)} nats from the original's."
                if name == "canary.agreement":
                    says = f"Since edit {since} the model agrees with the original on only {value:.0%} of the canary."
                yield Hit(rule, name, place, value, limit, verdict, says, since)

    def _unmoved(self, row: Flat) -> Iterator[Hit]:
        at = self._read("update.norm")
        if not row.applied or not at.size:
            return
        if row.values[at].any():
            self._moved, self._still = True, 0
            return
        self._still_since = self._still_since if self._still else row.edit
        self._still += 1
        sites = "the watched site" if at.size == 1 else f"any of the {at.size} watched sites"
        if not self._moved:
            for place, value, metric, _ in self._new("never-moved", row, at[:1]):
                says = f"Edit {row.edit} did not move {sites}: is it these layers that the editor edits?"
                yield Hit("never-moved", metric, place, value, 0.0, "stable", says)
        elif self._still >= STILL:
            for place, value, metric, _ in self._new("stopped-moving", row, at[:1]):
                says = (
                    f"Since edit {self._still_since} no edit moves {sites}, though edits did before: the update is"
                    " zero, or too small for the dtype to add."
                )
                yield Hit("stopped-moving", metric, place, value, 0.0, "drifting", says, self._still_since)
