"""Loops of a hundred edits and more with nothing wrong: every alarm here is a false one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.algebra import PROMPTS, SEARCH, rome_of
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.finetune import Finetune
from stabilitylab.editors.grace import Grace
from stabilitylab.editors.layers import edited_layers, last_mlp_layers
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.memit import Memit
from stabilitylab.editors.regularized import regularized
from stabilitylab.testbed.mend_data import edit_batch, shipped

_PRECISIONS = ("fp16", "fp32", "bf16")


def _malmen(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model(_PRECISIONS[seed % 3])
    malmen = shipped(Malmen, model)
    return Loop(model, malmen.sites, foreign.digit_canary(), foreign.digit_steps(malmen.edit, seed), editor=malmen)


def _mend_singles(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model(_PRECISIONS[seed % 3])
    mend = foreign.mend_of(model, floor=True)
    steps = foreign.digit_steps(mend.edit, seed, between=foreign.undo(model, mend.sites))
    return Loop(model, mend.sites, foreign.digit_canary(), steps, editor=mend)


def _mend_ball(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model(_PRECISIONS[seed % 2])
    limited = regularized(foreign.mend_of(model, floor=True), ball=0.1)
    return Loop(model, limited.sites, foreign.digit_canary(), foreign.digit_steps(limited.edit, seed), editor=limited)


def _grace(seed: int, **variant: Any) -> Loop:
    model, _ = foreign.word_model(seed)
    grace = Grace.for_model(model, batch_of=PROMPTS.edit_batch, steps=12)
    return Loop(model, grace.sites, words.canary(), foreign.word_steps(grace.edit, seed), editor=grace)


def _finetune(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model("fp32")
    sites = last_mlp_layers(model, 1)
    tuner = Finetune(sites, batch_of=edit_batch, constraint="frobenius", radius=2e-3, learning_rate=2e-4, steps=3)
    return Loop(model, sites, foreign.digit_canary(), foreign.digit_steps(tuner.edit, seed), editor=tuner)


def _finetune_words(seed: int, **variant: Any) -> Loop:
    model, sites = foreign.word_model(seed)
    tuner = Finetune(sites[-1:], batch_of=PROMPTS.edit_batch, constraint="linf", learning_rate=1e-3, steps=3)
    return Loop(model, sites, words.canary(), foreign.word_steps(tuner.edit, seed), editor=tuner)


def _rome_singles(seed: int, **variant: Any) -> Loop:
    model, _ = foreign.word_model(seed)
    rome = rome_of(model)
    steps = foreign.word_steps(rome.edit, seed, between=foreign.undo(model, rome.sites))
    return Loop(model, rome.sites, words.canary(), steps, editor=rome)


def _memit_singles(seed: int, **variant: Any) -> Loop:
    model, _ = foreign.word_model(seed)
    memit = Memit.for_model(model, locate=PROMPTS.located, layers=[0, 1], search=SEARCH)
    memit.prepare(model, PROMPTS, seed=0)
    steps = foreign.word_steps(memit.edit, seed, between=foreign.undo(model, memit.sites))
    return Loop(model, memit.sites, words.canary(), steps, editor=memit)


def _rescaled(seed: int, **variant: Any) -> Loop:
    """Small edits, between which a ReLU's two matrices trade norm: large drift, and the function stays what it was."""
    model = foreign.digit_model("fp32")
    sites = last_mlp_layers(model, 1)
    factor = 1.0 + float(foreign.draw(seed, "rescaled").uniform(0.01, 0.02)) * (1 if seed % 2 else -1)
    layers = dict(model.named_modules())

    @torch.no_grad()
    def edit(model: nn.Module, record: Any) -> nn.Module:
        foreign.descend(model, sites[1:], edit_batch(record), 1e-3)
        up, down = (edited_layers(model, [site])[0] for site in sites)
        up.parameter.mul_(factor)
        layers[sites[0]].bias.mul_(factor)
        down.parameter.div_(factor)
        return model

    return Loop(model, sites, foreign.digit_canary(), foreign.digit_steps(edit, seed))


def _spikes(seed: int, **variant: Any) -> Loop:
    """A loop that looks after itself: now and then an edit is ten times as large, and is taken back."""
    model, sites = foreign.word_model(seed)
    draw, witness = foreign.draw(seed, "spikes"), Witness()
    large = {int(edit) for edit in 10 + 15 * np.arange(6) + draw.integers(0, 12, size=6)}
    kept: list[Any] = []

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        kept[:] = [foreign.undo(model, sites)] if witness.edit in large else []
        rate = 0.02 if witness.edit in large else 0.002
        return foreign.descend(model, sites, words.batch([fact], answered=True), rate, 2)

    def between(model: nn.Module) -> None:
        for restore in kept:
            restore(model)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed, between=between), witness)


def _healthy(name: str, summary: str, editor: str, model: str, make: Any) -> Scenario:
    return Scenario(name, None, None, "static", summary, editor, model, make)


HEALTHY = (
    _healthy("healthy-malmen", "all edits are solved for together", "MALMEN", "digits, fp16, fp32 or bf16", _malmen),
    _healthy("healthy-mend-singles", "each is taken back", "MEND", "digits, fp16, fp32 or bf16", _mend_singles),
    _healthy("healthy-mend-ball", "weights stay within a tenth of ‖W₀‖", "MEND", "digits, fp16 or fp32", _mend_ball),
    _healthy("healthy-grace", "no weight moves", "GRACE", "words", _grace),
    _healthy("healthy-finetune", "small steps in a small ball", "FT", "digits, fp32", _finetune),
    _healthy("healthy-finetune-words", "small steps at one matrix", "FT-L", "words", _finetune_words),
    _healthy("healthy-rome-singles", "each is taken back", "ROME", "words", _rome_singles),
    _healthy("healthy-memit-singles", "each is taken back", "MEMIT", "words", _memit_singles),
    _healthy(
        "healthy-large-drift",
        "small edits; a ReLU's two matrices trade norm, and the function stays",
        "gradient steps",
        "digits, fp32",
        _rescaled,
    ),
    _healthy(
        "healthy-spikes", "six edits are ten times as large, and are taken back", "gradient steps", "words", _spikes
    ),
)
