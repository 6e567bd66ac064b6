"""Hard facts: claims that one reading (or a few in a row) proves, with no baseline. They act from edit 0.

This module has those of any model; `stabilitylab.analysis.limits` those that are one metric against one limit, and
`stabilitylab.analysis.facts_editor` those of an editor's own state, `stabilitylab.analysis.facts_normaliser` those of
its statistics, and `stabilitylab.analysis.facts_restoring` the one about what is put back between edits. The limits
here and where they come from:

- ``HEADROOM_BITS``: under 2 bits a tensor is two doublings from infinity. Only a *fall* to there counts: a massive
  activation of a healthy fp16 model can have 1.5 bits before any edit (FINDINGS.md, section 4); that is worth a note.
- ``STILL``: three edits in a row without effect, see `stabilitylab.analysis.landing`.
- ``GROWING``: a cache of keys that grows at five edits in a row which all begin at the original weights.
- ``STALLED``: ten edits that wrote this layer and never moved it, while they moved others.
- ``FROZEN_LOSS``: a loss that is the same to the last bit at five edits in a row, which differing requests never give.
  A note, since the same request against restored weights does give it.
- ``LEAP``, ``ALONE``: after an edit the largest entry of a weight is a hundred times what it was, and the whole
  update's norm is that one entry, to 2% (its old value is 1% of it): all other entries together moved by less than a
  fifth of it. An editor's update is a sum of outer products, which single no entry out; a memory error or a stray index
  does.
- ``SHRUNK``: a weight's norm is a tenth of what it was when first read: nine tenths of what training put there is gone.
  Drift, relative to the original, ends at 1 then, and is as large for a weight that has merely turned.
- A loss that is NaN over logits that are all finite is a mean over nothing: no label was left unmasked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Before, Columns, First, Flat, PerSchema, Places, Schema, kind_of
from stabilitylab.analysis.facts_ahead import HEADROOM_BITS, LARGEST, LEAP, SHRUNK, calm
from stabilitylab.analysis.facts_editor import EditorFacts
from stabilitylab.analysis.facts_gradients import RIGHT, GradientFacts
from stabilitylab.analysis.facts_normaliser import NormaliserFacts
from stabilitylab.analysis.facts_restoring import RestoringFacts
from stabilitylab.analysis.landing import EDITS_LOST, Landing, Landings
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.limits import AGREEMENT, KL_COLLAPSED, LimitFacts
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.nonfinite import NonfiniteContext
from stabilitylab.analysis.restoring import Restoring
from stabilitylab.analysis.steadiness import Steadiness
from stabilitylab.analysis.words import number, place_name
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE, EditRow

__all__ = ["AGREEMENT", "HEADROOM_BITS", "KL_COLLAPSED", "FactRules"]

STILL: Final = 3
ALONE: Final = 0.02
FROZEN_LOSS: Final = 5
GROWING: Final = 5
STALLED: Final = 10

LOSS: Final = "logits.loss"
_LOSSES: Final = ((LOSS, "logits.nonfinite"), ("logits.loss_last", "logits.nonfinite_passes"))
_SHOWN_NONE: Final = 7
"""Number of the first rule that is shown calm rows too."""
_EDITOR: Final = f"{EDITOR_SITE}."

_MANY: Final = {
    "weight": "weights",
    "activation": "activations",
    "attention": "attention logits",
    "gradient": "gradient entries",
    "logits": "logits",
    "canary": "canary logits",
    "editor": "statistics",
    "state": "entries",
}


def _before_norm(metric: str) -> bool:
    return metric.endswith(".norm_headroom_bits")


def _what_is_near(metric: str, site: str) -> str:
    if _before_norm(metric):
        return f"The largest input of the normalisation after {site}"
    return f"The largest {kind_of(metric)} of {site}"


Rule = Callable[[EditRow, Flat], Iterable[Hit]]


def _of_row(rule: Callable[[Flat], Iterable[Hit]]) -> Rule:
    """A rule that needs no more than the first value of each reading."""
    return lambda _, row: rule(row)


class FactRules:
    """Checks each row."""

    def __init__(self, columns: Columns) -> None:
        self._lookup = Lookup(columns)
        self._limits = LimitFacts(self._lookup)
        self._editor = EditorFacts(self._lookup)
        self._gradients = GradientFacts(self._lookup)
        self._normaliser = NormaliserFacts(self._lookup)
        self._restoring = RestoringFacts()
        self._landings = Landings(self._lookup)
        self._context = NonfiniteContext(self._lookup)
        self._first_headroom = First()
        self._first_norm = First()
        self._largest = Before()
        self._energy = Before()
        self._growing = 0
        self._ever_moved: set[int] = set()
        self._moving_edits = 0
        self._stall_told = False
        self._loss = math.nan
        self._same_loss = 0
        self._same_since = 0
        self._rules: tuple[tuple[tuple[str, ...], Rule], ...] = (
            # The first are those that a calm row is not shown to, see `facts_ahead`.
            ((), _of_row(self._nonfinite)),
            ((LOSS,), _of_row(self._labels)),
            ((), _of_row(self._dead)),
            ((), _of_row(self._headroom)),
            (("weight.",), _of_row(self._lone_entry)),
            (("weight.",), _of_row(self._shrunk)),
            ((), _of_row(self._limits.check)),
            ((_EDITOR,), _of_row(self._editor.check)),
            ((_EDITOR,), self._normaliser.check),
            (("update.",), _of_row(self._restoring.check)),
            (("update.",), _of_row(self._lost)),
            ((_EDITOR,), _of_row(self._cache)),
            (("update.",), _of_row(self._stalled)),
            (("gradient.", "update."), _of_row(self._gradients.check)),
            ((LOSS,), _of_row(self._frozen_loss)),
        )
        """Each with how the names of the metrics begin that it is about; without any, it is about every row."""
        self._dues = PerSchema(self._may_speak)
        self._due: frozenset[int] = frozenset()
        self._ahead: deque[tuple[Flat, bool]] = deque()
        self._passed: Flat | None = None

    @property
    def restoring(self) -> Restoring:
        """Whether edits begin at the original weights, as far as it was seen."""
        return self._restoring.restoring

    @property
    def steadiness(self) -> Steadiness:
        """Whether the editor's statistics hold still."""
        return self._normaliser.steadiness

    @property
    def landing(self) -> Landing:
        """Whether edits land."""
        return self._landings.now

    def nothing_moved(self, edit: int) -> None:
        """See `Landings.nothing_moved`."""
        self._landings.nothing_moved(edit)

    def editor_rebuilt(self) -> None:
        """See `NormaliserFacts.rebuilt`."""
        self._normaliser.rebuilt()

    def moved_outside(self) -> None:
        """See `Landings.moved_outside`."""
        self._landings.moved_outside()

    def never_run(self) -> None:
        """See `Landings.never_run`."""
        self._landings.never_run()

    def forget(self, hit: Hit) -> None:
        """What was claimed may be claimed again."""
        self._lookup.once.forget(hit.rule, hit.place)

    def check(self, edit: EditRow, row: Flat) -> list[Hit]:
        """The hits of one row; a claim that was made at a site before is not made again. edit: the same, as it came."""
        self._lookup.look(row)
        self._landings.observe(edit, row)
        before, self._due = self._due, self._dues.of(row.schema)
        # Once more after its readings end: a rule may have to see that they are gone.
        due = self._due if before is self._due else self._due | before
        first = _SHOWN_NONE if self._is_calm(row) else 0
        hits: list[Hit] = []
        for place in range(first, len(self._rules)):
            if place in due:
                hits += self._rules[place][1](edit, row)
        return hits

    def look_ahead(self, rows: Sequence[Flat]) -> None:
        """Rows that will be checked next."""
        quiet = calm(rows, self._lookup, self._first_headroom, self._first_norm, self._limits, self._context)
        self._ahead = deque(zip(rows, quiet, strict=True))

    def _is_calm(self, row: Flat) -> bool:
        is_calm = False
        if self._ahead and self._ahead[0][0] is row:
            is_calm = self._ahead.popleft()[1] and not self._limits.follows
        if is_calm:
            self._passed = row
            self._context.pass_over()
        elif self._passed is not None:
            before, self._passed = self._passed, None
            at = self._lookup.positions(before.schema, LARGEST)
            self._largest.swap(before.places[at], before.values[at])
        return is_calm

    def _may_speak(self, schema: Schema) -> frozenset[int]:
        """Which rules find in a row what they are about."""
        names = {metric for metric, _ in schema.keys}
        return frozenset(
            place
            for place, (begins, _) in enumerate(self._rules)
            if not begins or any(name.startswith(begins) for name in names)
        )

    def _unlabelled(self, row: Flat) -> Places:
        """The losses that are NaN although all logits are finite, of the first forward and of the last."""
        found = []
        for loss, logits in _LOSSES:
            at = self._lookup.at(loss)
            if self._lookup.value(row, logits, MODEL_SITE) == 0:
                found.append(at[np.isnan(row.values[at])])
        return np.concatenate(found) if found else self._lookup.at(LOSS)[:0]

    def _labels(self, row: Flat) -> Iterator[Hit]:
        if self._context.excuses(LOSS, MODEL_SITE):
            return
        for place, value, metric, _ in self._lookup.new("labels-masked", row, self._unlabelled(row)[:1]):
            says = (
                f"The loss is NaN at edit {row.edit} while all logits are finite: a mean over no label at all, as when"
                " every label is masked."
            )
            yield Hit("labels-masked", metric, place, value, 0.0, "non-finite", says)

    def _nonfinite(self, row: Flat) -> Iterator[Hit]:
        look = self._lookup.at
        counts, values, headroom = look("*.nonfinite"), look("value"), look("*.headroom_bits")
        unlabelled = self._unlabelled(row)
        values = values[~np.isin(values, unlabelled)] if unlabelled.size else values  # which says more
        bits = row.values[headroom]
        bad = np.concatenate(
            (
                counts[~(row.values[counts] == 0)],
                values[~row.finite[values]],
                headroom[np.isnan(bits) | (bits == -np.inf)],
            )
        )
        self._context.look(row, bool(bad.size))
        yield from self._context.notes(row)
        if not bad.size:
            return
        bad = bad[[not self._context.excuses(*self._lookup.key(row, position)) for position in bad]]
        # One tensor gone bad shows in many readings of it: the count of bad values, first here, speaks for all of its
        # kind at that site.
        spoken: set[tuple[str, str]] = set()
        for place, value, metric, site in self._lookup.new("non-finite", row, bad):
            kind = kind_of(metric)
            if (kind, site) in spoken:
                continue
            spoken.add((kind, site))
            counted = metric.endswith(".nonfinite")
            shown = value if counted or not math.isfinite(value) else math.nan  # a vector that is bad further on
            first = kind == "logits" and not metric.endswith(("_last", "_worst", "_passes"))
            found = " (in the model as this edit found it)" if first else ""
            says = (
                f"{number(value)} {_MANY.get(kind, kind)} of {place_name(site)} are NaN or infinite at edit"
                f" {row.edit}{found}."
                if counted and math.isfinite(value)
                else f"{metric} at {place_name(site)} is {number(shown)} at edit {row.edit}{found}."
            )
            # What nobody watches may be a scratch buffer: a canary that is sound says that the model is.
            sound = kind == "state" and self._lookup.value(row, "canary.nonfinite", MODEL_SITE) == 0
            yield Hit("non-finite", kind, place, shown, 0.0, "drifting" if sound else "non-finite", says)

    def _dead(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at("*.dead")
        for place, value, metric, _ in self._lookup.new("dead", row, at[row.values[at] == 1]):
            whose = "canary's" if kind_of(metric) == "canary" else "model's"
            says = f"The {whose} logits are all equal at edit {row.edit}: finite, but they say nothing any more."
            yield Hit("dead", metric, place, value, 1.0, "collapsed", says)

    def _headroom(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at("*.headroom_bits")
        at = at[row.finite[at]]
        first = self._first_headroom.of(row.places[at], row.values[at])
        low = row.values[at] < HEADROOM_BITS
        if not low.any():
            return
        at, first = at[low], first[low]
        had_none = first < HEADROOM_BITS
        fell = ~had_none | (row.values[at] <= first - 1.0)
        for place, bits, metric, site in self._lookup.new("headroom-before", row, at[had_none]):
            says = f"{_what_is_near(metric, site)} was only {number(bits)} bits from overflow when first read."
            yield Hit("headroom-before", metric, place, bits, HEADROOM_BITS, "stable", says)
        for place, bits, metric, site in self._lookup.new("headroom", row, at[fell]):
            limit = "where its square overflows" if _before_norm(metric) else "what its dtype can hold"
            says = f"{_what_is_near(metric, site)} is {number(bits)} bits (doublings) from {limit} at edit {row.edit}."
            yield Hit("headroom", metric, place, bits, HEADROOM_BITS, "diverging", says)

    def _lone_entry(self, row: Flat) -> Iterator[Hit]:
        """An update that is one entry, which leapt."""
        at = self._lookup.at(LARGEST)
        values = row.values[at]
        _, before = self._largest.swap(row.places[at], values)
        # A weight of zeros has no size to leap from: a bias may begin so, and its first entry is the first to move.
        leapt = (before > 0) & (LEAP * before <= values) & (values < np.inf)
        for position, was in zip(at[leapt], before[leapt].tolist(), strict=True):
            place, largest = int(row.places[position]), float(row.values[position])
            site = self._lookup.key(row, position)[1]
            update = self._lookup.value(row, "update.norm", site)
            if update is None or not abs(update - largest) <= ALONE * largest:
                continue
            for _, _, metric, _ in self._lookup.new("one-entry", row, np.array([position])):
                says = (
                    f"Edit {row.edit} changed one entry of {site} alone, from at most {number(was)} to"
                    f" {number(largest)}: no editor does that; look for a memory error or a stray index."
                )
                yield Hit("one-entry", metric, place, largest, LEAP * was, "diverging", says)

    def _shrunk(self, row: Flat) -> Iterator[Hit]:
        """A weight that has lost most of what it began with: its drift alone does not tell it from one that turned."""
        at = self._lookup.at("weight.norm")
        first = self._first_norm.of(row.places[at], row.values[at])
        for place, value, metric, site in self._lookup.new("weight-shrunk", row, at[row.values[at] < SHRUNK * first]):
            left = value / self._first_norm.at(place)
            says = f"The weight of {site} has shrunk to {left:.2g} of the norm that it had when first read."
            yield Hit("weight-shrunk", metric, place, value, SHRUNK * value / left, "drifting", says)

    def _lost(self, row: Flat) -> Iterator[Hit]:
        """Edits without effect, from three in a row on. That is no harm to the model: a note, see `landing`."""
        landing, at = self._landings.now, self._lookup.at("update.norm")
        if landing.lost < STILL or landing.in_turn or landing.since is None or not at.size:
            return
        for place, value, metric, _ in self._lookup.new(EDITS_LOST, row, at[:1]):
            before = ", though edits did before" if landing.landed else ""
            sites = "the watched site" if at.size == 1 else f"any of the {at.size} watched sites"
            what = f"they did not move {sites}"
            if landing.failed == landing.lost:
                what = "each raised an exception"
            elif landing.gradients_bad == landing.lost:
                what = f"gradients were not finite, and {what}"
            here = " on what is watched" if landing.others_moved else ""
            says = f"Edits {landing.since} to {row.edit} had no effect{here}{before}: {what}."
            yield Hit(EDITS_LOST, metric, place, value, 0.0, "stable", says, landing.since)

    def _cache(self, row: Flat) -> Iterator[Hit]:
        """A cache of edited keys that grows while edits are put back."""
        at = self._lookup.at("editor.cache_energy")
        read, before = self._energy.swap(row.places[at], row.values[at])
        grows = bool(read.any()) and bool((row.values[at[read]] > before[read]).all())
        self._growing = self._growing + 1 if grows and self._restoring.restoring.restored else 0
        if self._growing < GROWING:
            return
        for place, value, metric, site in self._lookup.new("cache-grows", row, at[:1]):
            says = (
                f"The cache of edited keys at {site} grows with each edit, though each begins at the original weights."
            )
            yield Hit("cache-grows", metric, place, value, 0.0, "stable", says, row.edit - GROWING + 1)

    def _stalled(self, row: Flat) -> Iterator[Hit]:
        """A site that never moved while others did, edit after edit."""
        at = self._lookup.at("update.norm")
        if not row.applied or at.size < 2 or not (row.values[at] > 0).any():
            return
        still = row.values[at] == 0
        self._ever_moved |= set(row.places[at[~still]].tolist())
        self._moving_edits += 1
        if self._moving_edits < STALLED:
            return
        written = self._lookup.at("update.writes")
        wrote = {self._lookup.key(row, position)[1] for position in written[row.values[written] > 0]}
        # Only what was written: a watched layer that no edit means is none of this.
        never = at[
            [
                int(row.places[position]) not in self._ever_moved and self._lookup.key(row, position)[1] in wrote
                for position in at
            ]
        ]
        if not never.size or self._stall_told:
            return
        self._stall_told = True
        for place, value, metric, site in self._lookup.new("site-stalled", row, never[:1]):
            more = f" and {never.size - 1} more" if never.size > 1 else ""
            says = f"{self._moving_edits} edits wrote {site}{more} and moved nothing there, while others moved."
            yield Hit("site-stalled", metric, place, value, 0.0, "stable", says, 1)

    def _frozen_loss(self, row: Flat) -> Iterator[Hit]:
        at = self._lookup.at(LOSS)
        if not row.applied or not at.size:
            return
        loss = float(row.values[at[0]])
        if loss != self._loss or not RIGHT < loss < math.inf:
            self._loss, self._same_loss, self._same_since = loss, 1, row.edit
            return
        self._same_loss += 1
        if self._same_loss < FROZEN_LOSS:
            return
        for place, value, metric, _ in self._lookup.new("frozen-loss", row, at[:1]):
            says = (
                f"The loss is {number(loss)} to the last bit at every edit since {self._same_since}: the model no"
                " longer heeds its input, or the same request meets the same weights again and again."
            )
            yield Hit("frozen-loss", metric, place, value, 0.0, "stable", says, self._same_since)
