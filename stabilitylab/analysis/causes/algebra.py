"""How the update was made: what it was divided by, solved from, cut to and projected with."""

from __future__ import annotations

from typing import Final

from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.words import number

SOON: Final = 3
"""Edits within which a fallen denominator must show in what follows."""

_WEIGHTS: Final = frozenset({"update.norm", "weight.max_abs", "weight.headroom_bits", "weight.nonfinite"})


def _denominator(evidence: Evidence) -> Claim | None:
    found, begins = evidence.of("denominator-near-zero"), evidence.begins
    if found is not None and begins is not None and found.edit <= begins + SOON:
        return Claim(
            f"the update of {found.site} at edit {found.edit} was divided by a uᵀk of only {number(found.value)}"
            f" ‖u‖‖k‖: it is {number(1.0 / found.value) if found.value else 'infinitely many'} times what the same"
            " change of value needs along the key.",
            "high",
        )
    fell = evidence.of("denominator-fell")
    if fell is not None and begins is not None and fell.edit <= begins <= fell.edit + SOON:
        return Claim(
            f"what the update of {fell.site} is divided by fell to {number(fell.value)} ‖u‖‖k‖ at edit {fell.edit}, a"
            f" tenth of its usual size, and trouble began at edit {begins}.",
            "medium",
        )
    return None


def _solve(evidence: Evidence) -> Claim | None:
    failed = evidence.of("solve-failed")
    if failed is not None:
        return Claim(
            f"the editor's solve for {failed.site} at edit {failed.edit} left {failed.value:.0%} of its right side"
            " unanswered, with a system too ill-conditioned for its dtype.",
            "high",
        )
    ill, bad = evidence.of("ill-conditioned", "covariance-singular"), evidence.first_bad
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
        )
    if nothing is not None and evidence.of("never-moved", "update-swallowed", "clamp-pinned") is not None:
        return Claim(
            f"the projection at {nothing.site} leaves {nothing.value:.2%} of the input directions free: there is no"
            " room for an edit.",
            "medium",
        )
    return None


def _clamp(evidence: Evidence) -> Claim | None:
    found, begins = evidence.of("clamp-pinned"), evidence.begins
    if found is None or begins is None or found.start > begins:
        return None
    return Claim(
        f"since edit {found.start} the search for the value to write at {found.site} ends on its norm clamp in every"
        " edit: it no longer finds a value that the model accepts, and writes the largest that it may.",
        "medium",
    )


RULES = (
    Rule(
        "unstable-denominator",
        "update algebra",
        _denominator,
        "Go back to the weights of before that edit. Compute the key and u = C⁻¹k from the same prompts (r-ROME), add a"
        " ridge to C, and refuse an edit whose uᵀk is below a tenth of its usual share of ‖u‖‖k‖.",
        "ROME's update is (v* − v₀)uᵀ / (uᵀk). If u and k come from different averages of prompts, uᵀk may be near zero"
        " or negative, and a single edit then disables the model.",
        "|uᵀk| / (‖u‖‖k‖) below 6e-4, which no covariance that float32 can invert gives; or a tenth of its own median,"
        " with trouble within three edits.",
        "The original ROME code used the key averaged over prefixes for u and the bare prompt's key to divide by"
        " (Rebuilding ROME, arXiv 2403.07175).",
    ),
    Rule(
        "singular-solve",
        "update algebra",
        _solve,
        "Solve in float64, add a ridge (a larger mom2_update_weight in MEMIT, a larger L2 in AlphaEdit, λ in MALMEN)"
        " and estimate the covariance from more tokens than the layer has inputs.",
        "A system that is singular to working precision is solved without an exception; the answer is noise of any"
        " size.",
        "A condition past 1e7 together with a residual of at least 1% of the right side; the condition alone, where the"
        ' weights are what first goes bad, gives a low confidence. Both are measured at probes="deep".',
        "A covariance from 300 tokens for a layer of 1,536 inputs: condition 6e10, and no error from"
        " torch.linalg.solve.",
    ),
    Rule(
        "null-space-wrong",
        "update algebra",
        _null_space,
        "Compute AlphaEdit's projection from a covariance divided by its number of tokens, and choose"
        " nullspace_threshold (2e-2 is the default) so that it keeps the leading directions of ordinary keys: look at"
        " editor.null_space_share before the first edit.",
        "AlphaEdit projects its update onto directions in which ordinary keys are small. A covariance that was not"
        " normalised, or a wrong threshold, makes that all directions, or none.",
        "A share of free directions of at least 99% in a run that drifts, or of at most 1% where nothing is written.",
        "Second moments summed, not averaged, over 100,000 tokens: no eigenvalue is below the threshold.",
    ),
    Rule(
        "target-pinned",
        "update algebra",
        _clamp,
        "Stop the stream there. Fewer edits per layer, more layers (MEMIT), or an earlier one; a larger"
        " clamp_norm_factor only makes the writes larger.",
        "ROME and MEMIT search for a value v* within a norm clamp around v₀. In a model that earlier edits have"
        " bent, no such value gives the answer any more, and each edit writes the largest value that it may.",
        "Steps that end on the clamp at five edits in a row, from before anything else left its range.",
        "ROME with an identity covariance on SmolLM2: from some edit on every search ends on the clamp.",
    ),
)
