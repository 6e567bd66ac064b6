"""Edits that add up or feed one another, and models that are dead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from stabilitylab.analysis.causes.evidence import Evidence, Place, Way
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.words import number
from stabilitylab.record.readings import MODEL_SITE

FEEDBACK_FACTOR: Final = 10.0
RAISED: Final = 3.0
"""Times the usual, from which on a learning rate, and an update, are others than before."""
USUALLY: Final = 0.8
"""Share of a run's edits that makes their size its own, not an accident."""
TRIED: Final = 5
"""Edits from which it can be said whether they reach what they ask for."""
SELDOM: Final = 0.05
"""Share of edits that reach what they ask for, below which an editor gets nowhere: it has another fault."""
SMALL: Final = 0.25
"""An update of more than a quarter of its weight is no small one."""
OUTWEIGHED: Final = 0.5
"""Distance from the original weight, as a share of its norm, at which edits weigh as much as half of training."""
SUM: Final = 4.0
"""Times the largest update, from which the distance is the work of many."""
ALIGNED: Final = 0.8
"""Distance as a share of the sum of all updates, from which they point one way; edits of their own give 1/√edits."""
GROWN: Final = 2.0
COMMON: Final = 1.05
"""A factor within which layers have one rate."""
OUTGROWN: Final = 3.0
MANY: Final = 10
"""Edits, at least, that a slow accumulation takes."""


def _feedback(evidence: Evidence) -> Claim | None:
    growth, latest = evidence.growth, evidence.latest
    if growth is None or growth.least < FEEDBACK_FACTOR:
        return None
    grown = None if latest is None else Place(growth.last_edit, "update.norm", latest.update_site)
    return Claim(
        f"each edit fed the next: from edit {growth.first_edit} to {growth.last_edit} the editor's normalised input"
        f" grew {number(growth.input_factor)}-fold and the update it made {number(growth.update_factor)}-fold.",
        "high",
        link=grown,
    )


def _too_large(evidence: Evidence) -> Claim | None:
    return _raised(evidence) or _raised_by_hand(evidence) or _all_too_large(evidence)


def _raised(evidence: Evidence) -> Claim | None:
    """A learning rate that was raised, or grew, and the updates with it."""
    here = evidence.step
    if here is None or here.rate is None or not evidence.is_past("drifting") or evidence.lone_entry:
        return None
    if here.rate_factor < RAISED or here.update_factor < RAISED:
        return None
    # Where updates grew by much more than the rate, it is gradients that did.
    if math.log(here.rate_factor) < 0.5 * math.log(here.update_factor):
        return None
    return Claim(
        f"the learning rate was {number(here.rate)} at edit {here.edit}, {number(here.rate_factor)} times that of the"
        f" first edits, and the largest update {number(here.update_factor)} times theirs.",
        "high",
        Place(here.edit, "gradient.learning_rate", here.update_site, here.rate),
    )


def _raised_by_hand(evidence: Evidence) -> Claim | None:
    """The same where no optimizer tells its rate: a plain step is as many times the gradient at every layer."""
    here, ways = evidence.step, evidence.ways
    if here is None or here.rate is not None or not evidence.is_past("drifting") or evidence.lone_entry:
        return None
    first, last = _common([way.first_rate for way in ways]), _common([way.last_rate for way in ways])
    if not first or not last or any(way.stepped for way in ways):
        return None
    raised, grown = last / first, max(way.last for way in ways) / max(way.first for way in ways)
    if raised < RAISED or grown < RAISED or math.log(raised) < 0.5 * math.log(grown):
        return None
    # Gradients that nobody clears add up to as many times one of them as there were edits.
    if any(way.aligned >= ALIGNED and raised <= COMMON * way.edits for way in ways):
        return None
    return Claim(
        f"the update was {number(first)} times its gradient at every layer in the first edit, as a plain step is, and"
        f" is {number(last)} times it by now: what the gradient is multiplied with, the learning rate, was raised"
        f" {number(raised)}-fold.",
        "high",
    )


def _common(rates: Sequence[float]) -> float:
    """The rate that all of two layers or more have; 0 if there is none."""
    return min(rates) if len(rates) > 1 and 0 < max(rates) <= COMMON * min(rates) else 0.0


def _all_too_large(evidence: Evidence) -> Claim | None:
    here, now, learning = evidence.step, evidence.latest, evidence.learning
    if here is None or now is None or not evidence.is_past("drifting") or evidence.lone_entry or evidence.reported:
        return None
    if now.number < TRIED or now.large < USUALLY * TRIED or here.large < USUALLY * here.number:
        return None
    large = f"{now.large} of {now.number} edits up to edit {now.edit} each moved a weight by at least half of its"
    learned = learning.tried >= TRIED and learning.reached > learning.tried / 2
    if learned and now.large >= USUALLY * now.number:
        reached = f"and most edits reach what they ask for ({learning.reached} of {learning.tried})"
        return Claim(f"{large} original norm, {reached}.", "medium")
    # What moves weights as far without getting anywhere may have another fault: a wrong sign, a wrong place.
    if learned or here.rate is None:
        return None
    return Claim(f"{large} original norm, by an optimizer's steps at a learning rate of {number(here.rate)}.", "low")


def _ascending(evidence: Evidence) -> Claim | None:
    seen = evidence.ascent
    if seen is None or not evidence.is_past("drifting") or evidence.lone_entry:
        return None
    if seen.up < TRIED or seen.up < USUALLY * seen.known or seen.last_loss < GROWN * seen.first_loss:
        return None
    how, link = "which they weigh with less than 0", Place(seen.first_edit, "logits.loss_weight", MODEL_SITE)
    if seen.maximised is not None:
        how = f"by an optimizer that maximises (at {seen.maximised})"
        link = Place(seen.last_edit, "gradient.ascends", seen.maximised, 1.0)
    return Claim(
        f"{seen.up} of {seen.known} edits were steps up the model's own loss, {how}; it was"
        f" {number(seen.first_loss)} at edit {seen.first_edit} and {number(seen.last_loss)} at edit {seen.last_edit}.",
        "medium",
        link=link,
    )


def _accumulated(evidence: Evidence) -> Claim | None:
    here, now, learning = evidence.step, evidence.latest, evidence.learning
    if here is None or now is None or not evidence.is_past("drifting") or evidence.lone_entry:
        return None
    if evidence.crossed is not None or learning.reached < SELDOM * learning.tried:
        return None
    if here.number < MANY or now.largest > SMALL or here.drift_ratio < SUM * here.largest:
        return None
    if now.drift_ratio < OUTWEIGHED or _again(evidence) is not None:
        return None
    return Claim(
        f"{now.number} edits have moved the weight of {now.drift_site} by {number(now.drift_ratio)} times its original"
        f" norm, none of them by more than {number(now.largest)}: together they weigh as much as what was trained.",
        "medium",
    )


def _again(evidence: Evidence) -> tuple[Way, bool] | None:
    """A layer whose updates grow and point the same way; and whether they outgrow their gradients, from a common rate.

    None that an optimizer steps: its momentum, its warm-up, and the two factors of an adapter, which grow together,
    make updates of this look where nothing is repeated.
    """
    growing = [
        way
        for way in evidence.ways
        if way.edits >= MANY and not way.stepped and way.aligned >= ALIGNED and way.last >= GROWN * way.first
    ]
    if not growing or not evidence.is_past("drifting") or evidence.growth is not None:
        return None
    if _raised_by_hand(evidence) is not None:
        return None
    common = _common([way.first_rate for way in evidence.ways if way.first_rate > 0])
    outgrown = all(way.last_rate >= OUTGROWN * way.first_rate for way in growing)
    return max(growing, key=lambda way: way.aligned), common > 0 and outgrown


def _kept_gradients(evidence: Evidence) -> Claim | None:
    carried = evidence.of("gradients-carried")
    if carried is not None:
        return Claim(
            f"since edit {carried.start} the optimizer steps with gradients that it has stepped with before, and to"
            " which each backward adds: each edit makes those before it once more.",
            "high" if evidence.is_past("drifting") else "medium",
            Place(carried.start, carried.metric, carried.site),
        )
    found = _again(evidence)
    if found is None or not found[1]:
        return None
    way = found[0]
    return Claim(
        f"the first update was {number(way.first_rate)} times its gradient at every layer, as a plain step is, and the"
        f" last one at {way.site} is {number(way.last_rate)} times its own; all {way.edits} point the same way: each"
        " edit makes all those before it once more.",
        "medium",
        Place(2, "update.norm", way.site),
    )


def _repeated(evidence: Evidence) -> Claim | None:
    found = _again(evidence)
    if found is None or found[1]:
        return None
    way = found[0]
    return Claim(
        f"the {way.edits} updates of {way.site} all point the same way ({way.aligned:.0%} of their sum is distance),"
        f" and the last is {number(way.last / way.first)} times the first: what was added before is added again.",
        "medium",
        Place(1, "update.norm", way.site),
    )


def _codebook(evidence: Evidence) -> Claim | None:
    canary = evidence.of("canary-moved", "canary-lost", "canary-collapsed", "perplexity-lost")
    if canary is None or evidence.moved or not evidence.codebook:
        return None
    return Claim(
        "no watched weight has moved, so it is the codebook that answers the canary in the model's place since edit"
        f" {canary.start}.",
        "high",
    )


def _dead(evidence: Evidence) -> Claim | None:
    dead = evidence.of("dead")
    if dead is None or evidence.lone_entry or evidence.first_bad is None or evidence.first_bad.rule != "dead":
        return None
    return Claim(
        f"all logits are equal since edit {dead.edit}, with every value finite: the model no longer depends on its"
        " input, and its gradients vanish.",
        "high",
    )


def _no_gradient(evidence: Evidence) -> Claim | None:
    found = evidence.of("zero-gradient")
    if found is None or evidence.is_past("drifting"):
        return None
    return Claim(f"since edit {found.start} the loss sends a gradient of exactly 0 to every watched layer.", "high")


FEEDBACK = (
    Rule(
        "feedback-growth",
        "growth",
        "amplifier",
        _feedback,
        "The editor was trained on the unedited model and is applied to its own results. Restore the weights between"
        " edits, or batch the edits into one update (MALMEN), or keep them outside the weights (GRACE). A norm"
        " constraint on the update or clamped inputs delays the end but costs edit success.",
        "A hypernetwork makes its update from the gradients of the model that it has edited. Larger weights give larger"
        " gradients, those a larger update, and that larger weights.",
        "The largest input of the hypernetwork and its update have both grown at least tenfold over the last 12 or 30"
        " edits, and both trends have a lower confidence bound above zero.",
        "MEND on BLIP2-OPT, edit after edit, without restoring: inputs of 11 and updates of 4 become infinite within 30"
        " edits. With factors from the unedited model the growth is gone.",
    ),
)

REPEATED = (
    Rule(
        "gradients-not-cleared",
        "growth",
        "trigger",
        _kept_gradients,
        "Call optimizer.zero_grad() (or set .grad to None) before each edit's backward pass.",
        "Gradients add up in .grad. Where nothing clears them, each step makes all the steps before it once more.",
        "Three edits in a row whose backwards add to a .grad that a step has used and nobody has written to since; or,"
        " where no optimizer steps, every layer's first update is the same multiple of its gradient, later ones ever"
        " larger multiples, and all point the same way: the distance is four fifths of their sum or more. Edits of"
        " their own give a share of 1/√edits.",
        "A loop of one's own that calls backward and subtracts .grad.",
    ),
    Rule(
        "update-repeated",
        "growth",
        "trigger",
        _repeated,
        "See whether something is added to the weights again at each edit: an adapter that is merged while it is merged"
        " already, a delta that is kept and applied once more. Check a flag before merging, or unmerge first.",
        "A delta that was applied is applied again, and again, with what is new on top.",
        "Updates that grow and all point the same way: the distance is four fifths of their sum or more. Not where an"
        " optimizer steps with the weight, or with an adapter's parts of it: momentum and warm-up look the same.",
        "merge() of an adapter, called for an evaluation after each step.",
    ),
)

ACCUMULATION = (
    Rule(
        "codebook-overreach",
        "growth",
        "amplifier",
        _codebook,
        "Lower GRACE's initial radius (eps), use its \"cold\" replacement only at the answer's tokens, or put the"
        " adapter into a later layer, whose inputs tell requests apart better.",
        "A codebook answers for every input within the radius of a key. Radii that are too large, or a layer whose"
        " inputs look alike, catch inputs that no edit was about.",
        "The canary's predictions change although no watched weight ever moved and a codebook holds keys.",
        "GRACE on the digit model with a radius of 1: the canary moves by one nat after some tens of edits.",
    ),
    Rule(
        "learning-rate-too-high",
        "growth",
        "trigger",
        _too_large,
        "Go back to the original weights. Lower the learning rate or the number of steps (for fine-tuning, a tenth),"
        " constrain the norm of the update to a few per cent of the weight's, and check an update before it is"
        " committed.",
        "An edit that changes a weight by half its norm has replaced what training put there. It mostly succeeds, and"
        " the rest of the model is gone.",
        "The optimizer's rate at the first bad edit is at least three times that of the first edits, and explains at"
        " least half of what updates grew by, in logs; where none steps, and each update is the same multiple of its"
        " gradient at every layer, that multiple is the rate. Or four in five edits, up to the first bad one and after"
        " it, each move a weight by at least half of its original norm, and most edits reach what they ask for: their"
        " gradient falls to a twentieth within them; where they don't, and an optimizer makes them, confidence is low."
        " Needs five edits. A single edit that is out of line has another cause.",
        "Adam at a learning rate of 0.1 on SmolLM2: edit success 100%, perplexity 1.6e5 after the first edit.",
    ),
    Rule(
        "gradient-ascent",
        "growth",
        "trigger",
        _ascending,
        "If the sign is wrong, minimise the loss. If this is to unlearn: nothing bounds the loss from above, so bound"
        " the objective. Stop at the loss of chance (the log of the vocabulary), train on what is to be kept beside it,"
        " or use an objective that levels off (NPO, arXiv 2404.05868); and go back to before the onset edit.",
        "A step down a loss ends where the loss does. A step up has no end: it takes along whatever raises the loss,"
        " and that is mostly what the model knows.",
        "In four of five edits, five or more, the objective weighs the model's own loss with less than 0, or the"
        " optimizer maximises one that doesn't, and that loss has doubled from the first of them to the last. Not where"
        " the loop forms its loss by itself: nothing tells of that.",
        "Unlearning by (-loss).backward(), or by SGD(…, maximize=True), request after request.",
    ),
    Rule(
        "norm-growth",
        "growth",
        "amplifier",
        _accumulated,
        "Edit less per layer: constrain ‖W − W₀‖ (a ball of a quarter to a half of ‖W₀‖), raise the weight on what"
        " is to be preserved (mom2_update_weight), spread edits over more layers, or keep them outside the weights"
        " (GRACE, WISE). Go back to before the onset edit, and retrain or batch from there.",
        "Each edit is harmless; their sum is not.",
        "‖W − W₀‖ comes to half of ‖W₀‖. At the first bad edit it is the work of ten edits or more, four times the"
        " largest of them; none moved a weight by more than a quarter. Not where the editor's inputs are past a limit,"
        " or where hardly any edit's gradient falls within it.",
        "FT within a ball of a tenth of the norm that a weight has by then: the canary is lost between edits 20 and"
        " 90.",
    ),
)

DEAD = (
    Rule(
        "dead-logits",
        "dead",
        "limit",
        _dead,
        "Go back to the weights of before that edit. Lower the edit's learning rate or constrain the norm of its"
        " update; a check for NaN alone will never see this failure.",
        "At weights of 1e18 the logits in float32 become exactly equal, the gradients 0 and the loss ln(vocabulary):"
        " finite and dead.",
        "All logits are equal, before anything is NaN.",
        "Fine-tuning without a norm constraint in float32, whose final LayerNorm keeps every value finite.",
    ),
    Rule(
        "zero-gradient",
        "dead",
        "trigger",
        _no_gradient,
        "See whether the layer's units are all dead (activation.dead_share), whether the loss was detached, and whether"
        " the watched layers lie on its path; go back to the weights of before, and lower the learning rate.",
        "Once every unit behind a layer is dead or saturated, the loss no longer depends on it, and no editor that"
        " needs a gradient can do anything there.",
        "Gradients of exactly 0 at every watched layer at three edits in a row, with a loss above 0.01.",
        "A large edit pushes all biases of a ReLU layer below zero.",
    ),
)
