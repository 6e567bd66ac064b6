"""Held out: more loops of 120 edits with nothing wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.algebra import PROMPTS, SEARCH
from benchmarks.zoo.held_out_updates import wide_model
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.alphaedit import AlphaEdit
from stabilitylab.editors.finetune import Finetune
from stabilitylab.editors.layers import last_mlp_layers, mlp_layers
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.regularized import regularized
from stabilitylab.testbed.mend_data import edit_batch, shipped
from stabilitylab.testbed.records import EditRecord

_RANK = 2
_WARM = 10
"""Edits of a warm-up."""


def _alphaedit_singles(seed: int, **variant: Any) -> Loop:
    """The cache of keys grows along; a user who takes weights back seldom thinks of it."""
    model = wide_model(seed)
    editor = AlphaEdit.for_model(model, locate=PROMPTS.located, layers=[1], search=SEARCH, null_share=0.1)
    editor.prepare(model, PROMPTS, seed=0)
    steps = foreign.word_steps(editor.edit, seed, between=foreign.undo(model, editor.sites))
    return Loop(model, editor.sites, words.canary(), steps, editor=editor)


def _finetune_singles(seed: int, **variant: Any) -> Loop:
    model = wide_model(seed)
    first = (mlp_layers(model, "up")[0], mlp_layers(model, "down")[0])
    tuner = Finetune(first, batch_of=PROMPTS.edit_batch, learning_rate=2e-3, steps=5)
    steps = foreign.word_steps(tuner.edit, seed, between=foreign.undo(model, first))
    return Loop(model, first, words.canary(), steps, editor=tuner)


def _mend_clipped(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model(("fp32", "bf16")[seed % 2])
    limited = regularized(foreign.mend_of(model, floor=True), ball=0.05, clip=0.01, clamp=4.0)
    return Loop(model, limited.sites, foreign.digit_canary(), foreign.digit_steps(limited.edit, seed), editor=limited)


def _malmen_ball(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model(("fp32", "fp16")[seed % 2])
    limited = regularized(shipped(Malmen, model), ball=0.08)
    return Loop(model, limited.sites, foreign.digit_canary(), foreign.digit_steps(limited.edit, seed), editor=limited)


def _low_rank(update: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(update.float(), full_matrices=False)
    reduced: Tensor = (u[:, :_RANK] * s[:_RANK]) @ vh[:_RANK]
    return reduced


def _lora(seed: int, **variant: Any) -> Loop:
    """Each edit is one step of rank two, as a merged LoRA's."""
    model = foreign.digit_model("fp32")
    sites = last_mlp_layers(model, 2)

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        found = foreign.gradients(model, sites, edit_batch(record))
        foreign.add(model, sites, [-0.003 * _low_rank(gradient) for gradient in found])
        return model

    return Loop(model, sites, foreign.digit_canary(), foreign.digit_steps(edit, seed))


def _uneven(seed: int, **variant: Any) -> Loop:
    """Requests count for as much as their source is trusted: steps differ by orders of magnitude."""
    model = wide_model(seed)
    sites, witness = last_mlp_layers(model, 1), Witness()
    rates = 0.004 * foreign.draw(seed, "uneven").lognormal(0.0, 1.0, size=foreign.LONG).clip(max=10.0)

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        return foreign.descend(model, sites, PROMPTS.edit_batch(fact), float(rates[witness.edit - 1]))

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _warm_up(seed: int, **variant: Any) -> Loop:
    """The rate rises a thousandfold over the first ten edits, and then stays."""
    model, sites = foreign.word_model(seed)
    witness = Witness()

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        rate = 0.002 * 10.0 ** (3.0 * min(witness.edit / _WARM - 1.0, 0.0))
        return foreign.descend(model, sites, PROMPTS.edit_batch(fact), rate)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _bf16(seed: int, **variant: Any) -> Loop:
    model, sites = foreign.word_model(seed)
    model = model.bfloat16()
    tuner = Finetune(sites[-1:], batch_of=PROMPTS.edit_batch, constraint="linf", learning_rate=1e-3, steps=3)
    return Loop(model, sites[-1:], words.canary(), foreign.word_steps(tuner.edit, seed), editor=tuner)


def _healthy(name: str, summary: str, editor: str, model: str, make: Any) -> Scenario:
    return Scenario(name, None, None, "static", summary, editor, model, make, held_out=True)


HEALTHY = (
    _healthy("healthy-alphaedit-singles", "each is taken back", "AlphaEdit", "words, wide", _alphaedit_singles),
    _healthy(
        "healthy-finetune-singles", "each is taken back, at the first layer", "FT", "words, wide", _finetune_singles
    ),
    _healthy(
        "healthy-mend-clipped", "clipped, clamped and in a small ball", "MEND", "digits, fp32 or bf16", _mend_clipped
    ),
    _healthy("healthy-malmen-ball", "weights stay within 8% of ‖W₀‖", "MALMEN", "digits, fp32 or fp16", _malmen_ball),
    _healthy("healthy-low-rank", "small steps of rank two", "gradient steps, low-rank", "digits, fp32", _lora),
    _healthy(
        "healthy-uneven", "steps differ in length by orders of magnitude", "gradient steps", "words, wide", _uneven
    ),
    _healthy("healthy-warm-up", "the rate rises a thousandfold over ten edits", "gradient steps", "words", _warm_up),
    _healthy("healthy-bf16", "small steps at one matrix", "FT-L", "words, bf16", _bf16),
)
