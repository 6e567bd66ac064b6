"""What the dtype could not hold."""

from __future__ import annotations

import math
from typing import Final

from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.columns import kind_of
from stabilitylab.analysis.words import number

FP16_MAX: Final = 65_504.0
FAR: Final = 8.0
"""Bits of headroom in the edit before, from which a weight does not overflow by growing."""


def _in_float16(evidence: Evidence) -> bool:
    largest = evidence.largest_finite
    return largest is not None and math.isclose(largest, FP16_MAX, rel_tol=1e-3)


def _adam(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.edit != fatal.edit or kind_of(bad.metric) != "weight":
        return None
    sudden = evidence.headroom_before is not None and evidence.headroom_before >= FAR
    if not (_in_float16(evidence) and fatal.sound_gradients and sudden) or evidence.reported:
        return None
    return Claim(
        f"the float16 weights of {bad.site} are no longer finite after edit {bad.edit}, whose first gradients are all"
        f" finite, and which began {number(evidence.headroom_before or 0.0)} bits from overflow: the optimiser's"
        " step itself divided by zero.",
        "medium",
    )


def _swallowed(evidence: Evidence) -> Claim | None:
    found = evidence.of("update-swallowed")
    if found is None or evidence.is_past("drifting"):
        return None
    return Claim(
        f"since edit {found.start} the dtype of {found.site} rounds the edits away: {found.value:.0%} of the entries"
        " that were to change are the same as before.",
        "high",
    )


def _overflow(evidence: Evidence) -> Claim | None:
    bad = evidence.first_bad
    if bad is None or not _in_float16(evidence):
        return None
    if bad.rule == "headroom":
        how = f"had {number(bad.value)} bits of headroom left at edit {bad.edit}"
    elif evidence.overflowed:
        how = f"became infinite at edit {bad.edit} while all that was read before it in that edit was finite"
    else:
        return None
    return Claim(f"values at {bad.site} are kept in float16, which ends at 65,504, and {how}.", "high")


BEFORE_GROWTH = (
    Rule(
        "adam-eps-underflow",
        "dtype",
        _adam,
        "Keep the edited weights and the optimiser in float32 (or bfloat16), or give Adam an eps that float16 holds:"
        " 1e-4 instead of 1e-8.",
        "Adam divides by √v + eps. In float16 an eps of 1e-8 is 0, and so is the square of a gradient below 2e-4: the"
        " very first step is a division by zero.",
        "Float16 weights that stop being finite in one edit, far from overflow, with finite gradients in its first"
        " pass, by an editor that tells of no denominator, solve or normaliser.",
        "Fine-tuning SmolLM2 in float16 with Adam's defaults: 97% of the edited weights are bad after the first step.",
    ),
    Rule(
        "update-absorbed",
        "dtype",
        _swallowed,
        "Keep the edited layers in float32, or keep a float32 copy of their weights, add the update there, and cast.",
        "bfloat16 has 8 bits: 1 + 0.003 is 1. An update that is small beside its weight is rounded away, entry by"
        " entry, and the edit is lost without any error.",
        "At three edits in a row at least nine in ten of the entries that the editor meant to change are the same. Only"
        " where the editor tells its Δ (edit.report).",
        "Fine-tuning a bfloat16 layer at a learning rate of 1e-5.",
    ),
)

AFTER_GROWTH = (
    Rule(
        "dtype-overflow",
        "dtype",
        _overflow,
        "Keep the edited layers in bfloat16 or float32. That removes the overflow, not the growth: look at what grew"
        " before it, and constrain the norm of the updates.",
        "Float16 ends at 65,504. A float32 update that is cast to the weight's dtype, or a weight that has grown for"
        " many edits, becomes infinite there. Where feedback is seen before it, that is named instead: the dtype is"
        " only where the growth ends.",
        "Less than two bits of headroom, or an infinity (not NaN), first of all readings, in a float16 tensor.",
        "EasyEdit loads BLIP2's OPT decoder in float16, whatever the rest is kept in.",
    ),
)
