"""What led up to the first non-finite value: a bounded memory of editor inputs, updates and extremes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from stabilitylab.analysis.causes.evidence import EditorInput, Evidence, FatalRow, Growth
from stabilitylab.analysis.columns import Columns, Flat, PerSchema, Places, Schema, kind_of
from stabilitylab.analysis.facts_editor import INPUT_DIVERGING, INPUT_DRIFTING
from stabilitylab.analysis.facts_normaliser import TINY_STD
from stabilitylab.analysis.findings import Finding, Verdict
from stabilitylab.analysis.landing import Landing
from stabilitylab.analysis.restoring import Restoring
from stabilitylab.analysis.steadiness import State, Steadiness
from stabilitylab.analysis.steps import Steps
from stabilitylab.analysis.trends import theil_sen
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE, Key

WINDOWS: Final = (12, 30)
LEAST: Final = 5
CONFIDENCE: Final = 0.9
FLOAT16_MAX: Final = 65_504.0
BFLOAT16_BELOW: Final = 3.395e38
"""Between the largest of bfloat16, 3.3895e38, and of float32, 3.4028e38."""
STRAY: Final = 0.1
"""Of the bad entries of the worst weight: one that has fewer was hit by the way."""
_INPUT: Final = f"{EDITOR_SITE}.input"
_INPUT_MAX: Final = f"{_INPUT}_max"
_TELLS: Final = tuple(
    f"{EDITOR_SITE}.{name}" for name in ("denominator", "system_condition", "input_max", "value_ratio", "clamp_hits")
)
_BAD_INPUTS: Final = "inputs.bad_entries"
_MASKED: Final = "attention.masked_rows"
_BITS: Final = "weight.headroom_bits"
_WATCHED: Final = (
    *_TELLS,
    *("update.norm", _BITS, "weight.nonfinite"),
    *("gradient.nonfinite_passes", "activation.nonfinite_passes", "logits.nonfinite_passes"),
    *("gradient.nonfinite", "gradient.norm", "gradient.norm_stepped"),
    *("activation.nonfinite", "logits.nonfinite", _MASKED, _BAD_INPUTS),
)


@dataclass(frozen=True)
class _Where:
    """Positions in a row of what is followed.

    places: by metric. extremes: (kind, site), and where the largest entry and the headroom are. bit_sites: of the
    weights' headroom.
    """

    places: dict[str, Places]
    extremes: tuple[tuple[Key, int, int], ...]
    bit_sites: tuple[str, ...]


def _where(schema: Schema) -> _Where:
    chosen: dict[str, list[int]] = {name: [] for name in _WATCHED}
    extremes = []
    for position, (metric, site) in enumerate(schema.keys):
        if metric in chosen:
            chosen[metric].append(position)
        kind = kind_of(metric)
        bits = schema.position.get((f"{kind}.headroom_bits", site))
        if metric == f"{kind}.max_abs" and bits is not None:
            extremes.append(((kind, site), position, bits))

    def sites(metric: str) -> tuple[str, ...]:
        return tuple(schema.keys[position][1] for position in chosen[metric])

    return _Where(
        {name: np.array(positions, dtype=np.intp) for name, positions in chosen.items()},
        tuple(extremes),
        sites(_BITS),
    )


class LeadIn:
    """Remembers until the first non-finite value, then holds still: what comes after it is consequence."""

    def __init__(
        self, columns: Columns, restoring: Restoring, steadiness: Steadiness, *, single_edits: bool = False
    ) -> None:
        """restoring, steadiness: followed by the facts, see `stabilitylab.analysis.facts_restoring` and
        `stabilitylab.analysis.facts_normaliser`. single_edits: whether the loop's configuration says that it makes
        single ones.
        """
        self._steadiness = steadiness
        self.single_edits = single_edits
        self._columns = columns
        self._restoring = restoring
        self._wheres = PerSchema(_where)
        self._where = _where(Schema((), np.zeros(0, dtype=np.intp)))
        self._points: deque[tuple[float, float, float]] = deque(maxlen=max(WINDOWS))
        self._strongest: Growth | None = None
        self._crossed: EditorInput | None = None
        self._divided: EditorInput | None = None
        self._largest_finite: dict[Key, float] = {}
        self._infinite: set[Key] = set()
        self._frozen = False
        self._looked_up: Schema | None = None
        self._steps = Steps(columns)
        self._reported = False
        self._masked = self._asked = False
        self._bits: dict[str, float] = {}
        self._fatal: FatalRow | None = None
        self._stayed: int | None = None
        self.besides = False
        """Whether edits write parameters that are not watched."""

    def observe(self, row: Flat, *, alarmed: bool, lost: bool, nonfinite: bool) -> None:
        """Take in a row. alarmed, nonfinite: whether the run is, up to and including this row. lost: whether it is by a
        hard fact, not by drift alone.
        """
        if self._frozen:
            return
        if row.schema is not self._looked_up:  # not every row comes here, so that a change may have gone by unseen
            self._look_up(row)
        places = self._where.places
        self._follow_inputs(row)
        self._steps.observe(row, alarmed=alarmed, lost=lost)
        self._follow_growth(row, places[_INPUT_MAX], places["update.norm"])
        if alarmed:  # from here on the strongest counts: that the run has saturated later must not hide the growth
            self._strongest = self.growth
        if nonfinite:
            self._frozen = True
            self._fatal = self._look_at_fatal(row)
            self._infinite = {
                (kind_of(metric), site)
                for (metric, site), at in row.schema.position.items()
                if metric.endswith(".max_abs") and math.isinf(row.values[at])
            }
            return
        if places[_MASKED].size:
            self._masked = self._masked or bool((row.values[places[_MASKED]] > 0).any())
            self._asked = True
        self._bits.update(zip(self._where.bit_sites, row.values[places[_BITS]].tolist(), strict=True))

    def not_put_back(self, edit: int) -> None:
        """What was to put an edit back has run, and its weights stayed."""
        self._stayed = edit if self._stayed is None else self._stayed

    def go_on(self) -> None:
        """What was not finite has been put back."""
        self._frozen, self._fatal, self._infinite = False, None, set()

    def _look_up(self, row: Flat) -> None:
        self._looked_up, self._where = row.schema, self._wheres.of(row.schema)
        self._reported = self._reported or any(self._where.places[name].size for name in _TELLS)
        for key, at, bits_at in self._where.extremes:
            largest, bits = float(row.values[at]), float(row.values[bits_at])
            if math.isfinite(bits) and 0 < largest < math.inf:
                # fp64 itself ends at 2^1024, where rounding would tip this over into infinity.
                exponent = min(math.log2(largest) + bits, 1024 - 1e-9)
                self._largest_finite.setdefault(key, 2.0**exponent)

    def _site(self, row: Flat, position: np.intp) -> str:
        return self._columns.keys[int(row.places[position])][1]

    @property
    def _weights_dtype(self) -> str | None:
        """The narrowest dtype of a watched weight, by what it can hold; None for 32 bits or more, and unknown."""
        held = [limit for (kind, _), limit in self._largest_finite.items() if kind == "weight"]
        narrowest = min(held, default=math.inf)
        if narrowest < 2.0 * FLOAT16_MAX:
            return "float16"
        return "bfloat16" if narrowest < BFLOAT16_BELOW else None

    def _overflowed_gradient(self, row: Flat) -> str | None:
        for at in self._where.places["gradient.norm"]:
            site = self._site(row, at)
            # The factors are those of the first pass; the gradient may be a sum over several.
            if not row.finite[at] and self._value(row, "gradient.nonfinite", site) == 0 and self._later(row, site) == 0:
                return site
        return None

    def _lost_before_step(self, row: Flat) -> str | None:
        for at in self._where.places["gradient.norm_stepped"][::-1]:  # as gradients flow, and their findings stand
            left = self._value(row, "gradient.norm", site := self._site(row, at))
            if not row.finite[at] and left is not None and math.isfinite(left):
                return site
        return None

    def _later(self, row: Flat, site: str) -> float:
        """How many passes of a layer after its first had a gradient that was not finite."""
        return self._value(row, "gradient.nonfinite_passes", site) or 0.0

    def _look_at_fatal(self, row: Flat) -> FatalRow:
        places = self._where.places
        bad, norms = places["gradient.nonfinite"], places["gradient.norm"]
        outputs, logits = places["activation.nonfinite"], places["logits.nonfinite"]
        later = [places[f"{kind}.nonfinite_passes"] for kind in ("activation", "logits")]
        forward = np.concatenate((outputs, logits))
        # Where a step of the same edit has spoilt the weights, what comes after it is no news.
        still_sound = bool((row.values[np.concatenate(later)] == 0).all())
        later_bad = still_sound and bool((row.values[places["gradient.nonfinite_passes"]] > 0).any())
        first_sound = bool(norms.size) and bool((row.values[bad] == 0).all())
        sound = first_sound and bool(row.finite[norms].all())
        # The gradient itself is not finite where a later pass is a part of it.
        told = all(row.finite[at] or self._later(row, self._site(row, at)) > 0 for at in norms)
        weights = [at for at in places["weight.nonfinite"] if row.values[at] > 0]
        # The first in dataflow, but for stray entries: where thousands overflowed is the place to look at.
        most = max((row.values[at] for at in weights), default=0.0)
        weight = next((self._site(row, at) for at in weights if row.values[at] >= STRAY * most), None)
        largest = None if weight is None else self._value(row, "weight.max_abs", weight)
        overflowed = self._overflowed_gradient(row)
        return FatalRow(
            edit=row.edit,
            bad_inputs=float(row.values[places[_BAD_INPUTS]].sum()),
            masked_rows=float(row.values[places[_MASKED]].sum()),
            unmasked_before=not self._masked,
            masks_before=self._asked,
            sound_forward=bool(logits.size and (row.values[forward] == 0).all()),
            sound_gradients=sound and not later_bad,
            no_gradients=bool(norms.size and bad.size) and bool((row.values[bad] > 0).all()),
            gradients_unread=norms.size == 0,
            later_gradients=first_sound and told and later_bad,
            gradient_overflowed=overflowed,
            gradient_is_nan=overflowed is not None and math.isnan(self._value(row, "gradient.norm", overflowed) or 0.0),
            lost_before_step=self._lost_before_step(row),
            loss=self._value(row, "logits.loss", MODEL_SITE),
            loss_weight=self._value(row, "logits.loss_weight", MODEL_SITE),
            moved_before=self._steps.moved_before,
            weight=weight,
            overflowed=largest is not None and math.isinf(largest),
            headroom=None if weight is None else self._bits.get(weight),
            limit=None if weight is None else self._largest_finite.get(("weight", weight)),
        )

    def _value(self, row: Flat, metric: str, site: str) -> float | None:
        at = row.schema.position.get((metric, site))
        return None if at is None else float(row.values[at])

    def _follow_growth(self, row: Flat, inputs: Places, updates: Places) -> None:
        """The largest editor input and the largest update of an edit, in logs."""
        if not row.applied or not inputs.size or not updates.size:
            return
        sizes = [row.values[at][np.isfinite(row.values[at])].max(initial=0.0) for at in (inputs, updates)]
        if min(sizes) > 0:
            self._points.append((float(row.edit), math.log(sizes[0]), math.log(sizes[1])))

    def _follow_inputs(self, row: Flat) -> None:
        """The first editor input past a limit, and the first over next to no std, see `_taken_over`."""
        at = self._where.places[_INPUT_MAX]
        if not at.size:
            return
        for position in at[(row.values[at] >= INPUT_DRIFTING) & (row.values[at] < np.inf)]:
            site, value = self._site(row, position), float(row.values[position])
            unit, std = self._value(row, f"{_INPUT}_unit", site), self._value(row, f"{_INPUT}_unit_std", site)
            number = int(unit) if unit is not None and math.isfinite(unit) else None
            spreadless = self._value(row, f"{EDITOR_SITE}.no_spread", site) == 1
            here = EditorInput(row.edit, site, value, number, std, self._state(row, site), spreadless)
            self._crossed = _taken_over(self._crossed, here)
            # Gradients can be next to nothing by nature; a spread of 0 is one on either side.
            if std is not None and (std == 0 or (std <= TINY_STD and site.endswith(".u"))):
                self._divided = _taken_over(self._divided, here)

    def _state(self, row: Flat, site: str) -> State:
        """Whether the statistics at a site hold still."""
        at = row.schema.position.get((f"{EDITOR_SITE}.std_min", site))
        return "" if at is None else self._steadiness.of(int(row.places[at]))

    @property
    def crossed(self) -> EditorInput | None:
        """The first editor input past a limit, at the edit where that unit was furthest out."""
        return self._crossed

    @property
    def growth(self) -> Growth | None:
        """The joint growth of the largest editor input and update up to now; from the alarm on, the strongest seen."""
        best = self._strongest
        if self._frozen:
            return best
        for window in WINDOWS:
            points = np.array(self._points)[-window:]
            if len(points) < LEAST:
                continue
            slope, lower, _ = theil_sen(np.stack((points[:, 0],) * 2), points[:, 1:].T, CONFIDENCE)
            if (lower <= 0).any():
                continue
            factors = np.exp(np.minimum(slope * (points[-1, 0] - points[0, 0]), 700.0))
            here = Growth(int(points[0, 0]), int(points[-1, 0]), float(factors[0]), float(factors[1]))
            if best is None or here.least > best.least:
                best = here
        return best

    def largest_finite(self, bad: Finding | None) -> float | None:
        """What the dtype of a finding's weights or activations can hold; None where nothing says it."""
        return None if bad is None else self._largest_finite.get((kind_of(bad.metric), bad.site))

    def overflowed(self, bad: Finding | None) -> bool:
        """Whether the weights or activations of a finding became infinite, not NaN, at the first non-finite edit."""
        return bad is not None and (kind_of(bad.metric), bad.site) in self._infinite

    def evidence(
        self,
        verdict: Verdict,
        findings: Sequence[Finding],
        first_bad: Finding | None,
        landing: Landing,
        operations: Sequence[Operation] = (),
    ) -> Evidence:
        """All that a cause may be read from, up to now."""
        return Evidence(
            verdict=verdict,
            findings=findings,
            first_bad=first_bad,
            crossed=self.crossed,
            divided=self._divided,
            growth=self.growth,
            largest_finite=self.largest_finite(first_bad),
            narrow=any(limit < 2.0 * FLOAT16_MAX for limit in self._largest_finite.values()),
            overflowed=self.overflowed(first_bad),
            steps=self._steps.up_to(first_bad),
            latest=self._steps.latest,
            learning=self._steps.learning,
            fatal=self._fatal,
            restored_until=self._restoring.until,
            forgotten=self._restoring.forgotten,
            carried=self._restoring.carried if self.single_edits else 0,
            stayed=self._stayed,
            besides=self.besides,
            moved=self._steps.moved,
            codebook=self._steps.codebook,
            reported=self._reported,
            landing=landing,
            weights_dtype=self._weights_dtype,
            changes_inside=self._steps.changes_inside,
            ways=self._steps.ways,
            ascent=self._steps.ascent,
            operations=operations,
        )


def _taken_over(known: EditorInput | None, here: EditorInput) -> EditorInput:
    """The first input past a limit; the higher limit takes over, and of several at one edit the furthest. Below it, of
    one unit the furthest that it went.
    """
    if known is None or known.largest < INPUT_DIVERGING <= here.largest:
        return here
    furthest = max(known.largest, here.largest) < INPUT_DIVERGING
    same_unit = furthest and (known.site, known.unit) == (here.site, here.unit)
    if known.edit == here.edit and known.largest < here.largest:
        return here
    return replace(here, std=known.std) if same_unit and known.largest < here.largest else known
