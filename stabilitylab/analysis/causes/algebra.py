"""How the update was made: what it was divided by, solved from, cut to and projected with."""

from __future__ import annotations

from typing import Final

from stabilitylab.analysis.causes.evidence import Evidence, Place
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.words import number

SOON: Final = 3
"""Edits within which a fallen denominator must show in what follows."""
NOISE: Final = 1e4
"""Beyond the dimension of usual layers: kᵀC⁻¹k has that dimension for its mean over the keys that C is made of."""

_WEIGHTS: Final = frozenset({"update.norm", "weight.max_abs", "weight.headroom_bits", "weight.nonfinite"})


def _denominator(evidence: Evidence) -> Claim | None:
    found, bad = evidence.of("denominator-near-zero"), evidence.first_bad
    if found is not None and bad is not None and found.edit <= bad.start + SOON:
        return Claim(
            f"the update of {found.site} at edit {found.edit} was divided by a uᵀk of only {number(found.value)}"
            f" ‖u‖‖k‖: it is {number(1.0 / found.value) if found.value else 'infinitely many'} times what the same"
            " change of value needs along the key.",
            "high",
            Place(found.edit, found.metric, found.site),
        )
    fell = evidence.of("denominator-fell")
    if fell is not None and bad is not None and fell.edit <= bad.start <= fell.edit + SOON:
        return Claim(
            f"what the update of {fell.site} is divided by fell to {number(fell.value)} ‖u‖‖k‖ at edit {fell.edit}, a"
            f" tenth of its usual size, and the first bad edit is {bad.start}.",
            "medium",
            Place(fell.edit, fell.metric, fell.site),
        )
    return None


def _solve(evidence: Evidence) -> Claim | None:
    failed, bad = evidence.of("solve-failed"), evidence.first_bad
    if failed is not None:
        return Claim(
            f"the editor's solve for {failed.site} at edit {failed.edit} left {failed.value:.0%} of its right side"
            " unanswered, with a system too ill-conditioned for its dtype.",
            "high",
        )
    negative = evidence.of("denominator-negative")
    if negative is not None and bad is not None and negative.value <= -NOISE and negative.edit <= bad.start + SOON:
        return Claim(
            f"uᵀk of {negative.site} at edit {negative.edit} is {number(negative.value)}: for u = C⁻¹k it is positive,"
            " and about as large as the layer has inputs. What was solved for u is noise.",
            "medium",
            Place(negative.edit, negative.metric, negative.site),
        )
    ill = evidence.of("ill-conditioned", "covariance-singular")
    if ill is None or bad is None or bad.metric not in _WEIGHTS or bad.edit < ill.edit:
        return None
    return Claim(
        f"{ill.metric} at {ill.site} is {number(ill.value)} at edit {ill.edit}: past 1e7, what float32 makes of it is"
        f" noise; the first bad reading is the weights' own, at edit {bad.edit}.",
        "low",
    )


def _null_space(evidence: Evidence) -> Claim | None:
    everything, nothing = evidence.of("nothing-preserved"), evidence.of("no-room")
    if everything is not None and evidence.is_past("stable"):
        return Claim(
            f"the projection at {everything.site} leaves {everything.value:.2%} of the input directions free: edits are"
            " kept away from next to nothing.",
            "medium",
            Place(everything.edit, everything.metric, everything.site),
        )
    if nothing is None:
        return None
    lost = evidence.of("edits-lost", "update-swallowed", "clamp-pinned") is not None
    return Claim(
        f"the projection at {nothing.site} leaves {nothing.value:.2%} of the input directions free: there is little"
        " room for an edit.",
        "medium" if lost else "low",
        Place(nothing.edit, nothing.metric, nothing.site),
    )


def _clamp(evidence: Evidence) -> Claim | None:
    found, bad = evidence.of("clamp-pinned"), evidence.first_bad
    if found is None or (bad is not None and found.start > bad.start):
        return None
    return Claim(
        f"since edit {found.start} the search for the value to write at {found.site} ends on its norm clamp after every"
        " step, at most edits: the clamp, and not the answer, says what is written.",
        "medium",
        Place(found.start, found.metric, found.site),
    )


def _lost_before_step(evidence: Evidence) -> Claim | None:
    bad, fatal = evidence.first_bad, evidence.fatal
    if bad is None or fatal is None or bad.edit != fatal.edit or fatal.lost_before_step is None:
        return None
    return Claim(
        f"the gradient of {fatal.lost_before_step} at edit {fatal.edit} is finite after the backward, and is not when"
        " the optimizer steps with it: what is done to gradients between the two did that.",
        "high",
        Place(fatal.edit, "gradient.norm_stepped", fatal.lost_before_step),
    )


RULES = (
    Rule(
        "singular-solve",
        "update algebra",
        "trigger",
        _solve,
        "Solve in float64, add a ridge (a larger mom2_update_weight in MEMIT, a larger L2 in AlphaEdit, λ in MALMEN)"
        " and estimate the covariance from more tokens than the layer has inputs.",
        "A system that is singular to working precision is solved without an exception; the answer is noise of any"
        " size.",
        "A condition past 1e7 together with a residual of at least 1% of the right side; the condition alone, where the"
        ' weights are what first goes bad, gives a low confidence. Both are measured at probes="deep". With any'
        " probes: a uᵀk (ROME) below -1e4, which no covariance gives.",
        "A covariance from 300 tokens for a layer of 1,536 inputs: condition 6e10, and no error from"
        " torch.linalg.solve.",
    ),
    Rule(
        "unstable-denominator",
        "update algebra",
        "trigger",
        _denominator,
        "Go back to the weights of before that edit. Compute the key and u = C⁻¹k from the same prompts (r-ROME), add a"
        " ridge to C, and refuse an edit whose uᵀk is below a tenth of its usual share of ‖u‖‖k‖.",
        "ROME's update is (v* − v₀)uᵀ / (uᵀk). If u and k come from different averages of prompts, uᵀk may be near zero"
        " or negative, and a single edit then disables the model.",
        "|uᵀk| / (‖u‖‖k‖) below 6e-4, which no covariance that float32 can invert gives; or a tenth of its own median,"
        " with the first bad edit within three. Where a failed solve explains it, that is named instead.",
        "The original ROME code used the key averaged over prefixes for u and the bare prompt's key to divide by"
        " (Rebuilding ROME, arXiv 2403.07175).",
    ),
    Rule(
        "null-space-wrong",
        "update algebra",
        "trigger",
        _null_space,
        "Compute AlphaEdit's projection from a covariance divided by its number of tokens, and choose"
        " nullspace_threshold (2e-2 is the default) so that it keeps the leading directions of ordinary keys: look at"
        " editor.null_space_share before the first edit.",
        "AlphaEdit projects its update onto directions in which ordinary keys are small. A covariance that was not"
        " normalised, or a wrong threshold, makes that all directions, or none.",
        "A share of free directions of at least 99% in a run that drifts, or of at most a tenth; low confidence where"
        " edits still move the weights.",
        "Second moments summed, not averaged, over 100,000 tokens: no eigenvalue is below the threshold.",
    ),
    Rule(
        "target-pinned",
        "update algebra",
        "trigger",
        _clamp,
        "Look at the clamp first (clamp_norm_factor is 4 in ROME, 0.75 in MEMIT) and at the search's loss. If the clamp"
        " is as published, stop the stream there: fewer edits per layer, more layers (MEMIT), or an earlier one.",
        "ROME and MEMIT search for a value v* within a norm clamp around v₀. Where the clamp is too small, or earlier"
        " edits have bent the model, no such value gives the answer, and each edit writes the largest that it may.",
        "Every step of the search, the first included, ends on the clamp, at three quarters of eight edits in a row or"
        " more, and most steps at the others; from before the first bad edit. That most steps do is usual.",
        "ROME with a clamp of a tenth of ‖v₀‖: no edit says what it should, and nothing else looks odd.",
    ),
    Rule(
        "gradient-lost-before-step",
        "update algebra",
        "trigger",
        _lost_before_step,
        "Look at what stands between backward() and step(). clip_grad_norm_ multiplies every gradient by limit / ‖g‖"
        " over all of them: find the layer, watched or not, whose gradient has a NaN (error_if_nonfinite=True raises"
        " there), skip that request, and clip only what is edited. Else a scale, or an average over processes.",
        "One NaN in one gradient makes ‖g‖ NaN, and clipping by it makes all of them NaN, those too that were sound.",
        "A gradient that is finite when the first backward of an edit has ended, and is not when the optimizer steps"
        " with it.",
        "clip_grad_norm_(model.parameters(), 1.0) where an embedding that nobody watches has a NaN in its gradient.",
    ),
)
