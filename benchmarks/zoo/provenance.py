"""What a loop believes about its weights and references, and is wrong about."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo import foreign, words
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.finetune import Finetune
from stabilitylab.editors.grace import Grace
from stabilitylab.editors.mend import Mend


def _not_restored(seed: int, **variant: Any) -> Loop:
    """ "Single" edits whose loop keeps no copy of the weights: nothing is ever put back."""
    model, sites = foreign.word_model(seed)
    tuner = Finetune(sites, batch_of=words.WordPrompts().edit_batch, learning_rate=0.005, steps=6)
    witness = Witness()
    witness.saw(sites[0], at=1)
    steps = foreign.word_steps(tuner.edit, seed)
    return Loop(
        model, sites, words.canary(), steps, witness, editor=tuner, config={"sequential_edit": False}, also=sites[1:]
    )


def _partly_restored(seed: int, **variant: Any) -> Loop:
    """The copies that are put back are of one layer fewer than were edited."""
    model = foreign.digit_model(("fp32", "fp16")[seed % 2])
    mend: Mend = foreign.mend_of(model, floor=True)
    forgotten = mend.sites[seed // 2 % len(mend.sites)]
    restore = foreign.undo(model, [site for site in mend.sites if site != forgotten])
    witness = Witness()
    witness.saw(forgotten, at=1)
    steps = foreign.digit_steps(mend.edit, seed, between=restore)
    config = {"sequential_edit": False}
    return Loop(model, mend.sites, foreign.digit_canary(), steps, witness, editor=mend, config=config)


def _reference_edited(seed: int, **variant: Any) -> Loop:
    """A run that goes on where another ended: the references are of a model that was edited already."""
    model, _ = foreign.word_model(seed)
    grace = _grace(model)
    for fact in words.stream(seed + 1, int(foreign.draw(seed, "reference-edited").integers(5, 20))):
        model = grace.edit(model, fact)
    witness = Witness()
    witness.saw(f"{grace.sites[0]}.layer", at=0)
    steps = foreign.word_steps(grace.edit, seed, 30)
    sites = tuple(f"{site}.layer" for site in grace.sites)  # inside the adapter that is there by now
    return Loop(model, sites, words.canary(), steps, witness, editor=grace, also=grace.sites)


def _grace(model: Any) -> Grace:
    return Grace.for_model(model, batch_of=words.WordPrompts().edit_batch, steps=12)


SCENARIOS = (
    Scenario(
        "not-restored",
        1,
        "weights-not-restored",
        "exponential",
        "edits that are meant to be single ones, on weights that nobody puts back",
        "FT",
        "words",
        _not_restored,
    ),
    Scenario(
        "partly-restored",
        1,
        "weights-not-restored",
        "super-exponential",
        "single edits of four layers, of which three are put back",
        "MEND",
        "digits, fp16 or fp32",
        _partly_restored,
    ),
    Scenario(
        "reference-edited",
        13,
        "reference-edited",
        "static",
        "the monitor, and every original, is taken from a model that was edited before",
        "GRACE",
        "words",
        _reference_edited,
    ),
)
