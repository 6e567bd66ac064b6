"""Whether edits land: a question of its own, beside what became of the model.

An edit lands when it changes what it is about: a watched weight, or what the editor keeps beside the weights. It does
not when it raises, when it is skipped, when it is undone before it ends, or when it is rounded away. That harms no
model, and the edits are lost all the same.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Flat
from stabilitylab.analysis.findings import Landed
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE, EditRow

EDITS_LOST: Final = "edits-lost"
"""The rule that says of edits in a row that none had an effect."""
LAST: Final = 10
"""Edits in a row without effect that are told of, however many landed before; of a shorter run, all of them."""
FEWEST: Final = 3
"""Edits from which on that is no accident."""
SAME: Final = 2
"""Gaps between landings in a row that are alike, from which on a loop is taken to step in turn."""
FLOAT16_MAX: Final = 65_504.0
ALREADY: Final = 0.1
"""A loss of at most so much leaves nothing to do: the answer has nine tenths of the probability."""
STILL: Final = 1e-4
"""Nats between two answers of one model, at most: sums in another order give some 1e-7."""
WORDS: Final = 120


@dataclass(frozen=True)
class Landing:
    """How many edits were seen to take effect.

    tried: edits of which that could be seen. landed: those that did. lost: in a row without effect, up to the last.
    since: the first of these; None when the last one landed. first: the first of the run without effect. Of all without
    effect: failed: how many raised. left: how many of these had moved weights by then. words: what most of the last
    said. gradients_bad: how many had gradients that are not finite. gradients: how many had finite ones above zero.
    written: how many wrote a watched weight, and left it.
    huge: how many had a gradient whose norm over all watched layers is past what float16 holds. clipped: how many had
    finite ones above zero that were exactly 0 when the optimizer got them. elsewhere: whether no edit ever ran the
    model that is watched. gap: edits from each of the last landings to the next, where these are as many: a loop that
    steps at each n-th. longest: edits in the longest run without effect. whole: whether the whole model was looked
    at, for want of a layer that is watched. answers: of edits of which none landed: how far the canary's answers
    are from the original's all the same, in nats.
    """

    tried: int = 0
    landed: int = 0
    lost: int = 0
    since: int | None = None
    first: int | None = None
    failed: int = 0
    left: int = 0
    words: str = ""
    gradients_bad: int = 0
    gradients: int = 0
    written: int = 0
    huge: int = 0
    clipped: int = 0
    elsewhere: bool = False
    gap: int | None = None
    longest: int = 0
    whole: bool = False
    answers: float = 0.0

    @property
    def others_moved(self) -> bool:
        """Whether something other than what is watched was edited: the model answers in another way than it did."""
        return self.tried > 0 and not self.landed and self.answers > STILL

    @property
    def what(self) -> str:
        """What edits without effect did not move."""
        return "any parameter of the model" if self.whole else "a watched layer"

    @property
    def kind(self) -> Landed | None:
        """All, some or none of the edits; None when that could not be seen of any."""
        if not self.tried:
            return None
        return "all" if self.landed == self.tried else "some" if self.landed else "none"

    @property
    def in_turn(self) -> bool:
        """Whether edits wait for their step, as in accumulation: the last ones too, as far as it can be told by now.
        Those that wait neither fail nor write a weight.
        """
        waits = self.gap is not None and self.gap > 1 and self.lost < 2 * self.gap
        return waits and not self.failed and not self.written

    @property
    def only_waited(self) -> bool:
        """Whether none of the run's edits was without effect but those that waited for their step."""
        return self.in_turn and self.gap is not None and self.longest < self.gap

    @property
    def gone(self) -> int:
        """How many edits of the run had no effect."""
        return self.tried - self.landed

    @property
    def nothing_lands(self) -> bool:
        """Whether none of the last edits took effect: of the last ten, or of all in a shorter run. Of fewer than three
        only where each raised: an edit that moves nothing may have had nothing to do.
        """
        enough = self.lost >= FEWEST or (self.lost > 0 and self.failed == self.gone)
        return enough and not self.in_turn and self.lost >= min(LAST, self.tried)

    @property
    def mostly_lost(self) -> bool:
        """Whether nothing lands, or not even half of the run's edits did."""
        return self.nothing_lands or (self.tried >= LAST and self.landed < self.tried / 2 and not self.in_turn)

    @property
    def says_failed(self) -> str:
        """How many raised, in a sentence of its own."""
        words = f"{':' if self.failed == 1 else ', mostly:'} {self.words}" if self.words else ""
        return f"{self.failed} of {self.tried} edits raised an exception{words}."

    @property
    def says(self) -> str:
        """In a sentence, without its full stop; empty where edits land."""
        if not self.mostly_lost:
            return ""
        words = f" ({self.words})" if self.words else ""
        if not self.nothing_lands:
            only = f"Only {self.landed} of {self.tried} edits"
            raised = self.failed == self.gone
            return f"{only} were carried out, the others raised{words}" if raised else f"{only} moved {self.what}"
        which = f"None of {self.tried} edits" if not self.landed else f"None of the last {self.lost} edits"
        if self.failed >= self.lost and self.failed == self.gone:
            if self.tried == 1:
                return f"The only edit raised an exception{words}"
            return f"{which} was carried out: each raised an exception{words}"
        others = ", and the model's answers change: others are edited" if self.others_moved else ""
        return f"{which} moved {self.what}{others}"


class Landings:
    """Follows every edit. `now` is what is known."""

    def __init__(self, lookup: Lookup) -> None:
        """lookup: of the row that is looked at, see `Lookup.look`."""
        self.now = Landing()
        self._lookup = lookup
        self._elsewhere = self._outside = False
        self._last: deque[str] = deque(maxlen=LAST)
        self._landed_at: int | None = None
        self._gaps: deque[int] = deque(maxlen=SAME)

    def observe(self, row: EditRow, flat: Flat) -> None:
        """Take in an edit. Edit 0 is none."""
        if row.edit == 0:
            return
        landed = self._landed(row, flat)
        if landed is None:
            return
        before = self.now
        if landed:
            if self._landed_at is not None:
                self._gaps.append(row.edit - self._landed_at)
            self._landed_at = row.edit
            gap = self._gaps[0] if len(self._gaps) == SAME and len(set(self._gaps)) == 1 else None
            self.now = replace(before, tried=before.tried + 1, landed=before.landed + 1, lost=0, since=None, gap=gap)
            return
        bad = np.concatenate([self._lookup.at(f"gradient.{name}") for name in ("nonfinite", "nonfinite_steps")])
        norms, stepped = (flat.values[self._lookup.at(f"gradient.{name}")] for name in ("norm", "norm_stepped"))
        spoilt = bool((flat.values[bad] > 0).any())
        sound = not spoilt and bool(((norms > 0) & (norms < math.inf)).any())
        error = row.error or ""
        error = error if len(error) <= WORDS else f"{error[: WORDS - 1].rstrip()}…"
        self._last.append(error)
        said = Counter(words for words in self._last if words)
        self.now = Landing(
            tried=before.tried + 1,
            landed=before.landed,
            lost=before.lost + 1,
            since=row.edit if before.since is None else before.since,
            first=row.edit if before.first is None else before.first,
            failed=before.failed + (row.status == "failed"),
            left=before.left + bool((flat.values[self._lookup.at("update.norm")] != 0).any()),
            words=said.most_common(1)[0][0] if said else "",
            gradients_bad=before.gradients_bad + spoilt,
            gradients=before.gradients + sound,
            huge=before.huge + (sound and math.sqrt(math.fsum((norms * norms).tolist())) > FLOAT16_MAX),
            clipped=before.clipped + (sound and stepped.size > 0 and bool((stepped == 0).all())),
            elsewhere=before.elsewhere,
            gap=before.gap,
            longest=max(before.longest, before.lost + 1),
            written=before.written + bool((flat.values[self._lookup.at("update.writes")] > 0).any()),
            answers=self._answers(before, flat),
        )

    def _answers(self, before: Landing, flat: Flat) -> float:
        """NaN is a fault of its own, and no news of where edits go."""
        now = self._lookup.value(flat, "canary.kl", MODEL_SITE)
        return before.answers if now is None or math.isnan(now) else now

    def nothing_moved(self, edit: int) -> None:
        """An edit moved no parameter of a model that is watched as a whole."""
        before = self.now
        since = edit if before.since is None else before.since
        first = edit if before.first is None else before.first
        self.now = replace(before, tried=before.tried + 1, lost=before.lost + 1, since=since, first=first, whole=True)

    def moved_outside(self) -> None:
        """What applies the edits is outside of them: whether they land can't be seen in them."""
        self._outside = True
        self.now = Landing()

    def never_run(self) -> None:
        """The edits never run the model that is watched."""
        self.now = replace(self.now, elsewhere=True)

    def _landed(self, row: EditRow, flat: Flat) -> bool | None:
        """None where it can't be seen, or where nothing was left to do."""
        if row.status == "failed":
            return False
        keys, sides = (self._lookup.at(f"{EDITOR_SITE}.{name}") for name in ("keys", "side_norm"))
        # By design: what the edit knows is beside the weights.
        self._elsewhere = self._elsewhere or sides.size > 0 or bool((flat.values[keys] > 0).any())
        updates = self._lookup.at("update.norm")
        if self._elsewhere:
            return True
        if not updates.size:
            return None
        if (flat.values[updates] != 0).any():  # NaN is not 0 either
            return True
        if self._outside:
            return None
        loss = self._lookup.value(flat, "logits.loss", MODEL_SITE)
        return None if loss is not None and loss <= ALREADY else False
