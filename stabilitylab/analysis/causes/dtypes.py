"""What the dtype could not hold."""

from __future__ import annotations

import math
from typing import Final

from stabilitylab.analysis.causes.evidence import Evidence, FatalRow, Place
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.landing import FEWEST
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE

FP16_MAX: Final = 65_504.0
_BITS: Final = {"float16": 11, "bfloat16": 8}
MOSTLY: Final = 0.9
FAR: Final = 8.0
"""Bits of headroom in the edit before, from which a weight does not overflow by growing."""


def _is_float16(limit: float | None) -> bool:
    return limit is not None and math.isclose(limit, FP16_MAX, rel_tol=1e-3)


def _gradient(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.edit != fatal.edit or not fatal.sound_forward:
        return None
    if fatal.gradient_overflowed is None:
        return _on_its_way(evidence, fatal)
    # A product past the end of its range is infinite. A NaN in a wide one came to the weight on another way.
    if fatal.gradient_is_nan and not evidence.narrow:
        return None
    where = "float16, which ends at 65,504" if evidence.narrow else "its dtype"
    return Claim(
        f"the gradient of {fatal.gradient_overflowed} at edit {fatal.edit} is not finite, while the layer's input and"
        f" the gradient at its output are: their product left the range of {where}.",
        "high",
        Place(fatal.edit, "gradient.norm", fatal.gradient_overflowed),
    )


def _on_its_way(evidence: Evidence, fatal: FatalRow) -> Claim | None:
    """It was not finite when it came to the layers. A finite loss of finite logits has a finite derivative."""
    if not fatal.no_gradients or fatal.loss is None or not math.isfinite(fatal.loss):
        return None
    if evidence.weights_dtype != "float16":
        return None
    return Claim(
        f"no gradient of edit {fatal.edit} is finite, while the loss ({number(fatal.loss)}), the logits and all outputs"
        " are, and the layers are kept in float16: on its way back the gradient left its range, which ends at 65,504.",
        "medium",
    )


def _adam(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.edit != fatal.edit or fatal.weight is None or not _is_float16(fatal.limit):
        return None
    if not (fatal.sound_gradients and fatal.sound_forward) or fatal.overflowed or evidence.reported:
        return None
    # Adam's first step is the one that divides by zero: a loop that made sound edits has another optimiser.
    if evidence.given_to_step or fatal.moved_before or fatal.headroom is None or fatal.headroom < FAR:
        return None
    return Claim(
        f"the float16 weights of {fatal.weight} are NaN after edit {fatal.edit}, the first that moved them, whose first"
        f" outputs and gradients are all finite, and which began {number(fatal.headroom)} bits from overflow: the"
        " optimiser's step itself divided by zero.",
        "medium",
        Place(fatal.edit, "weight.nonfinite", fatal.weight),
    )


def _step(evidence: Evidence) -> Claim | None:
    """NaN that the step itself made: what went into it was finite."""
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.edit != fatal.edit or fatal.weight is None or fatal.overflowed:
        return None
    sound = fatal.sound_gradients or fatal.gradients_unread
    if not sound or not fatal.sound_forward or evidence.reported or evidence.lone_entry or fatal.edit == 0:
        return None
    if evidence.sent_back or evidence.given_to_step:
        return None
    return Claim(
        f"the weights of {fatal.weight} are NaN after edit {fatal.edit}, whose outputs"
        f"{'' if fatal.gradients_unread else ' and gradients'} are all finite: the step itself made them, as a division"
        " of 0 by 0 does.",
        "medium",
        Place(fatal.edit, "weight.nonfinite", fatal.weight),
    )


def _swallowed(evidence: Evidence) -> Claim | None:
    found = evidence.of("update-swallowed")
    if found is None or evidence.is_past("drifting"):
        return None
    return Claim(
        f"since edit {found.start} the dtype of {found.site} rounds the edits away: {found.value:.0%} of the entries"
        " that were to change are the same as before.",
        "high",
        Place(found.start, found.metric, found.site),
    )


def rounded_away(evidence: Evidence) -> Claim | None:
    """The same where the editor tells no Δ: by what is left when gradients are sound and no weight moves."""
    lost, dtype = evidence.landing, evidence.weights_dtype
    if dtype is None or lost.lost < FEWEST or lost.in_turn or lost.gradients < lost.gone:
        return None
    if evidence.is_past("drifting"):
        return None
    undone = evidence.changes_inside and lost.written == lost.gone
    if undone or (dtype == "float16" and lost.huge >= MOSTLY * lost.gone):  # see `lost`
        return None
    return Claim(
        f"since edit {lost.since} gradients are finite and above zero, and no weight moves: {dtype} keeps"
        f" {_BITS[dtype]} bits, so that a step that is small beside its weight is rounded away, and so are constants of"
        " an optimiser that is kept in it (1 − 0.999 is 0).",
        "medium",
    )


def _overflow(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or evidence.lone_entry:
        return None
    if _is_float16(evidence.largest_finite) and bad.rule == "headroom":
        place = Place(bad.edit, bad.metric, bad.site)
        how = f"had {number(bad.value)} bits of headroom left at edit {bad.edit}"
    elif fatal is not None and bad.edit == fatal.edit and _overflowed_in_step(fatal):
        place = Place(fatal.edit, "weight.max_abs", fatal.weight or bad.site)
        how = f"became infinite at edit {fatal.edit}, whose first outputs and gradients are all finite"
    elif _is_float16(evidence.largest_finite) and evidence.overflowed:
        place = Place(bad.edit, bad.metric, bad.site)
        how = f"became infinite at edit {bad.edit} while all that was read before it in that edit was finite"
    elif fatal is not None and fatal.weight is None and fatal.moved_before and evidence.weights_dtype == "float16":
        return Claim(
            f"the watched layers are kept in float16, which ends at 65,504: at edit {fatal.edit} the model's outputs"
            " are not finite, while every watched weight still is.",
            "medium",
            link=Place(fatal.edit, "logits.nonfinite", MODEL_SITE),
        )
    else:
        return None
    return Claim(f"values at {place.site} are kept in float16, which ends at 65,504, and {how}.", "high", place)


def _ended(evidence: Evidence) -> Claim | None:
    """Where growth ended, whatever made it grow: a chain has its end too."""
    fatal = evidence.fatal
    if fatal is None or evidence.lone_entry or _overflow(evidence) is not None:
        return None
    if fatal.weight is None or not fatal.overflowed or not _is_float16(fatal.limit):
        return None
    return Claim(
        f"the weights of {fatal.weight} are kept in float16, which ends at 65,504, and became infinite at edit"
        f" {fatal.edit}.",
        "high",
        Place(fatal.edit, "weight.max_abs", fatal.weight),
    )


def _overflowed_in_step(fatal: FatalRow) -> bool:
    return fatal.overflowed and fatal.sound_forward and fatal.sound_gradients and _is_float16(fatal.limit)


BEFORE_GROWTH = (
    Rule(
        "gradient-overflow",
        "dtype",
        "limit",
        _gradient,
        "Lower the loss scale, or let a scaler skip such steps (torch.amp.GradScaler); keep the weights that are"
        " edited, and with them their gradients, in float32 or bfloat16.",
        "A gradient sums over all tokens and is kept in its weight's dtype: in float16 it ends at 65,504, though every"
        " term is far below.",
        "A .grad that is not finite after a backward whose factors, the layer's input and the gradient at its output,"
        " all are, in the edit with the first value that is not finite; NaN counts only in float16. Or, with weights in"
        " float16, no finite gradient at any watched layer, while the model's own loss, its logits and all outputs are"
        " finite.",
        "A layer in float16 with inputs of 200 and a gradient of 100 at its output: seven tokens add up to 140,000.",
    ),
    Rule(
        "adam-eps-underflow",
        "dtype",
        "trigger",
        _adam,
        "Keep the edited weights and the optimiser in float32 (or bfloat16), or give Adam an eps that float16 holds:"
        " 1e-4 instead of 1e-8.",
        "Adam divides by √v + eps. In float16 an eps of 1e-8 is 0, and so is the square of a gradient below 2e-4: the"
        " very first step is a division by zero.",
        "Float16 weights that are NaN, not infinite, after the first edit that moves them, far from overflow, with"
        " finite outputs and gradients in its first pass, by an editor that tells of no denominator, solve or"
        " normaliser.",
        "Fine-tuning SmolLM2 in float16 with Adam's defaults: 97% of the edited weights are bad after the first step.",
    ),
    Rule(
        "optimiser-nan",
        "dtype",
        "trigger",
        _step,
        "Look for what the step divides by: a second moment that is 0 for entries without gradient (eps that the dtype"
        " rounds to 0), a bias correction 1 − βᵗ that is 0 in bfloat16, a scale of a channel that is all zero. Keep the"
        " optimiser's state in float32, and guard each division.",
        "The gradient is sound, and what is made of it isn't: an optimiser or a quantiser divides 0 by 0.",
        "Weights that are NaN, not infinite, first of all readings, after an edit whose outputs and gradients are"
        " finite.",
        "1 − β₂ᵗ is 0 in bfloat16 at the first step, so that v / (1 − β₂ᵗ) is 0/0.",
    ),
    Rule(
        "update-absorbed",
        "dtype",
        "limit",
        lambda evidence: _swallowed(evidence) or rounded_away(evidence),
        "Keep the edited layers and the optimiser's state in float32, or keep a float32 copy of the weights, add the"
        " update there, and cast.",
        "bfloat16 has 8 bits: 1 + 0.003 is 1. An update that is small beside its weight is rounded away, entry by"
        " entry, and the edit is lost without any error.",
        "At three edits in a row at least nine in ten of the entries that the editor meant to change are the same,"
        " where the editor tells its Δ (edit.report); or none moves at all, with gradients that are finite and above"
        " zero and weights of 16 bits.",
        "Fine-tuning a bfloat16 layer at a learning rate of 1e-5.",
    ),
)

AFTER_GROWTH = (
    Rule(
        "dtype-overflow",
        "dtype",
        "limit",
        _overflow,
        "Keep the edited layers in bfloat16 or float32. That removes the overflow, not its reason: look at what grew"
        " before it, or at what made that one update so large, and constrain the norm of the updates.",
        "Float16 ends at 65,504. A float32 update that is cast to the weight's dtype, or a weight that has grown for"
        " many edits, becomes infinite there. Where feedback is seen before it, that is named instead: the dtype is"
        " only where the growth ends.",
        "Less than two bits of headroom, or an infinity (not NaN), first of all readings, in a float16 tensor; or"
        " float16 weights that are infinite after an edit whose first pass was finite. Not where a single entry leapt.",
        "EasyEdit loads BLIP2's OPT decoder in float16, whatever the rest is kept in.",
    ),
)

LIMITS = (
    Rule(
        "float16-limit",
        "dtype",
        "limit",
        _ended,
        "Keep the edited layers in bfloat16 or float32: float32 would have held these values. What made them grow is"
        " named beside it.",
        "Whatever makes values grow, in float16 they end at 65,504. With more range the model may be destroyed just the"
        " same, but later, and without a NaN.",
        "A float16 weight that became infinite at the first edit with a value that is not finite, after values had"
        " grown.",
        "MEND on BLIP2-OPT: its updates grow 90-fold over 26 edits, and then the float16 decoder overflows.",
        leads=False,
        unless="dtype-overflow",
    ),
)
