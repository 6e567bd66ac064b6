"""Mechanisms that no rule is to know: here "unknown" is the right cause."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.layers import edited_layers


def _bit_flip(seed: int, **variant: Any) -> Loop:
    """A memory error between two edits: the highest bit of one weight's exponent."""
    model, sites = foreign.word_model(seed)
    witness, draw = Witness(), foreign.draw(seed, "bit-flip")
    strikes, at = int(draw.integers(8, 60)), int(draw.integers(len(sites)))

    @torch.no_grad()
    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        foreign.descend(model, sites, words.batch([fact], answered=True), 0.005)
        if witness.edit == strikes:
            weight = edited_layers(model, sites)[at].parameter.view(-1)
            place = int(weight.abs().argmax())
            bits = weight[place : place + 1].view(torch.int32)
            bits.bitwise_xor_(1 << 30)
            witness.saw(sites[at])
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _sign_flipped(seed: int, **variant: Any) -> Loop:
    """The gradient is climbed: what an edit should say becomes ever less likely."""
    model, sites = foreign.word_model(seed)
    rate = float(foreign.draw(seed, "sign-flipped").uniform(0.3, 0.6))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        return foreign.descend(model, sites, words.batch([fact], answered=True), -rate, 3)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), onset=1)


def _misplaced(seed: int, **variant: Any) -> Loop:
    """An index that is one off: each layer gets the update that was made for the other of its shape."""
    model, sites = foreign.word_model(seed)
    rate = float(foreign.draw(seed, "misplaced").uniform(0.2, 0.4))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        for _ in range(4):
            found = foreign.gradients(model, sites, words.batch([fact], answered=True))
            foreign.add(model, sites, [-rate * gradient for gradient in (*found[2:], *found[:2])])
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), onset=1)


def _transposed(seed: int, **variant: Any) -> Loop:
    """The update of a square matrix is added transposed, and nothing complains."""
    model: nn.Module = words.model_of("llama", words.number_of(seed, seed))
    sites = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.2.self_attn.o_proj")
    rate = float(foreign.draw(seed, "transposed").uniform(1.0, 1.6))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        for _ in range(4):
            found = foreign.gradients(model, sites, words.batch([fact], answered=True))
            foreign.add(model, sites, [-rate * gradient.T for gradient in found])
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), onset=1)


SCENARIOS = (
    Scenario(
        "bit-flip",
        None,
        "bit-flip",
        "jump",
        "a memory error flips the highest exponent bit of the largest weight of one layer",
        "gradient steps",
        "words",
        _bit_flip,
        known=False,
    ),
    Scenario(
        "sign-flipped",
        None,
        "sign-flipped",
        "exponential",
        "the loss is climbed instead of descended",
        "gradient steps",
        "words",
        _sign_flipped,
        known=False,
    ),
    Scenario(
        "update-misplaced",
        None,
        "update-misplaced",
        "exponential",
        "each layer gets the update that was made for another of the same shape",
        "gradient steps",
        "words",
        _misplaced,
        known=False,
    ),
    Scenario(
        "update-transposed",
        None,
        "update-transposed",
        "exponential",
        "square attention matrices get their updates transposed",
        "gradient steps",
        "words, Llama",
        _transposed,
        known=False,
    ),
)
