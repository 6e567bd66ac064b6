"""Weights that edits make shorter or longer, whatever the edits are about."""

from __future__ import annotations

from stabilitylab.analysis.causes.evidence import Evidence, Place, Way
from stabilitylab.analysis.causes.growth import ALIGNED, MANY, SMALL, TRIED
from stabilitylab.analysis.causes.rule import Claim, Rule
from stabilitylab.analysis.words import number


def _decayed(evidence: Evidence) -> Claim | None:
    found = evidence.of("weight-shrunk")
    way = None if found is None else next((way for way in evidence.ways if way.site == found.site), None)
    if found is None or way is None or evidence.lone_entry:
        return _pulled_in(evidence)
    # One edit that sets it to next to nothing is no decay: no step took a quarter of the norm that it had then.
    if way.edits < MANY or way.largest > SMALL * (found.value + way.drift):
        return None
    return Claim(
        f"{way.edits} edits have worn down the weight of {found.site}, none of them by more than"
        f" {number(way.largest)}: each takes a share of the weight away, whatever its request was.",
        "medium",
        Place(found.edit, found.metric, found.site),
    )


def _pulled_in(evidence: Evidence) -> Claim | None:
    """The same before it is worn down: all that has become of a weight is that it is shorter."""
    way = _furthest(evidence, [way for way in evidence.ways if way.inwards >= ALIGNED])
    if way is None:
        return None
    return Claim(
        f"{_brought(way)} {way.inwards:.0%} of its distance from the original is that: each takes a share of the weight"
        " away, whatever its request was.",
        "medium",
        Place(1, "weight.norm", way.site),
    )


def _inflated(evidence: Evidence) -> Claim | None:
    """All that has become of a weight is that it is longer."""
    way = _furthest(evidence, [way for way in evidence.ways if way.outwards >= ALIGNED])
    if way is None:
        return None
    return Claim(
        f"{_brought(way)} its distance from the original points along the original weight (cosine {way.outwards:.2f}):"
        " each multiplies the weight by more than 1, whatever its request was.",
        "medium",
        Place(1, "weight.norm", way.site),
    )


def _furthest(evidence: Evidence, ways: list[Way]) -> Way | None:
    """Of these, the one that several small steps took furthest, in a run that went astray."""
    if not evidence.is_past("drifting") or evidence.lone_entry:
        return None
    slow = [
        way
        for way in ways
        if way.edits >= TRIED and way.drift >= SMALL * way.original
        if way.largest <= SMALL * max(way.original, way.norm)
    ]
    return max(slow, key=lambda way: way.drift / way.original, default=None)


def _brought(way: Way) -> str:
    return (
        f"{way.edits} edits have brought the norm of {way.site} from {number(way.original)} to {number(way.norm)}, and"
    )


RULES = (
    Rule(
        "weights-decayed",
        "growth",
        "trigger",
        _decayed,
        "See whether the optimizer decays the weights that are edited (weight_decay, times the learning rate, is the"
        " share that each step takes), or a penalty on the weights' norm does; set it to 0 for edits, and penalise the"
        " distance from the original weights instead. Go back to before the weights had lost half of their norm.",
        "Weight decay pulls towards zero, and not towards the weights as they were trained. A rate that is harmless"
        " over one training is run through again at each edit.",
        "A weight's norm at a tenth of what it was when first read, after ten edits or more of which none moved it by"
        " more than a quarter of its norm. Or, where the model's answers leave the original's, a weight that five edits"
        " or more have moved by a quarter of its norm, none of them by as much, and four fifths of that distance made"
        " it shorter.",
        "SGD with weight_decay=8 and a learning rate of 0.01: each step takes a twelfth.",
    ),
    Rule(
        "weights-inflated",
        "growth",
        "trigger",
        _inflated,
        "See what multiplies the weights that are edited: averages whose coefficients add up to more than 1, a model"
        " that is merged with itself, a negative weight decay, a scale that is applied again at each edit. Divide by"
        " the sum of the coefficients; and go back to before the weights had grown by a quarter.",
        "A weight that each edit multiplies by more than 1 grows like compound interest, and so do the outputs of its"
        " layer, whatever the edits were about.",
        "A weight that five edits or more have moved by a quarter of its norm, none of them by a quarter of what it has"
        " now, while the model's answers leave the original's or values grow; and W − W₀ points along W₀, with a cosine"
        " of four fifths or more.",
        "An average of a weight with itself whose coefficients are 1 and 0.1: each edit makes it a tenth longer.",
    ),
)
