"""Held out: more mechanisms that no rule is to know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.algebra import PROMPTS
from benchmarks.zoo.held_out_updates import wide_model
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.at_token import block_of
from stabilitylab.editors.layers import edited_layers, last_mlp_layers, mlp_layers

_LEVELS = 15
"""Of int5, on each side of zero."""


def _careful(model: nn.Module, sites: tuple[str, ...], fact: words.Fact) -> nn.Module:
    return foreign.descend(model, sites, PROMPTS.edit_batch(fact), 0.005)


@torch.no_grad()
def _exchange(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def _exchanged(seed: int, **variant: Any) -> Loop:
    """A resume that counts the layers from the other end puts the first and the last into each other's place."""
    model = wide_model(seed)
    up, down = (list(mlp_layers(model, which).values()) for which in ("up", "down"))
    sites = (up[0], down[0], up[-1], down[-1])
    witness, resumes = Witness(), int(foreign.draw(seed, "exchanged").integers(8, 60))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        if witness.edit == resumes:
            witness.saw(sites[0])
            first, last = (model.get_submodule(block_of(site)) for site in (sites[0], sites[-1]))
            for one, other in zip(first.parameters(), last.parameters(), strict=True):
                _exchange(one, other)
        return _careful(model, sites, fact)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness, also=sites[1:])


def _shifted(seed: int, **variant: Any) -> Loop:
    """A resume has a tokenizer with one more word at its front: the embedding's rows are one place off."""
    model, sites = foreign.word_model(seed)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    witness, resumes = Witness(), int(foreign.draw(seed, "shifted").integers(8, 60))

    @torch.no_grad()
    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        if witness.edit == resumes:
            witness.saw(None)
            embedding.copy_(embedding.roll(1, dims=0))
        return _careful(model, sites, fact)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _gain(seed: int, **variant: Any) -> Loop:
    """Parameters are chosen by a part of their name, which the last norm's gain has too: it is descended with them."""
    model, sites = foreign.word_model(seed)
    gain = next(module for name, module in model.named_modules() if name in {"model.norm", "transformer.ln_f"}).weight
    assert isinstance(gain, nn.Parameter)
    rate, original, witness = float(foreign.draw(seed, "gain").uniform(0.5, 1.0)), gain.detach().clone(), Witness()

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        gain.requires_grad_(True)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(foreign.model_loss(model, PROMPTS.edit_batch(fact)), gain)
        gain.requires_grad_(False).sub_(rate * found)
        if float((gain - original).norm()) > float(original.norm()) / 2:
            witness.saw(None)  # none of the watched layers has anything
        return _careful(model, sites, fact)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness, onset=1)


def _requantised(seed: int, **variant: Any) -> Loop:
    """After each edit weights are stored as int5 by max / 15 and read back by max / 16: they shrink edit by edit."""
    model: nn.Module = words.model_of("llama", words.number_of(seed, seed // 2))
    sites = last_mlp_layers(model, 2)
    layers = model.get_submodule(block_of(sites[0]).rpartition(".")[0])
    matrices = [parameter for parameter in layers.parameters() if parameter.dim() == 2]
    last, witness = edited_layers(model, sites)[-1], Witness()
    original = float(last.matrix.norm())

    @torch.no_grad()
    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        _careful(model, sites, fact)
        for matrix in matrices:  # the norms' gains stay
            most = matrix.abs().amax(dim=1, keepdim=True)
            matrix.copy_((matrix * _LEVELS / most).round() * most / (_LEVELS + 1))
        if float(last.matrix.norm()) < original / 2:
            witness.saw(last.name)
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness, onset=1, also=sites[:-1])


def _momentum(seed: int, **variant: Any) -> Loop:
    """One optimiser for all edits with a momentum of 0.98: each edit goes on with what fifty others wanted."""
    model = wide_model(seed)
    sites = last_mlp_layers(model, 2)
    weights = [layer.parameter for layer in edited_layers(model, sites)]
    rate = float(foreign.draw(seed, "momentum").uniform(0.02, 0.04))
    descent = torch.optim.SGD(weights, lr=rate, momentum=0.98)

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        for weight, found in zip(weights, foreign.gradients(model, sites, PROMPTS.edit_batch(fact)), strict=True):
            weight.grad = found
        descent.step()
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), onset=1)


SCENARIOS = (
    Scenario(
        "layers-exchanged",
        None,
        "layers-exchanged",
        "jump",
        "a resume puts the first and the last layer into each other's place",
        "gradient steps",
        "words, wide",
        _exchanged,
        known=False,
        held_out=True,
    ),
    Scenario(
        "embedding-shifted",
        None,
        "embedding-shifted",
        "jump",
        "a resume has one more word at the tokenizer's front: the embedding's rows are one place off",
        "gradient steps",
        "words",
        _shifted,
        known=False,
        held_out=True,
    ),
    Scenario(
        "gain-edited",
        None,
        "gain-edited",
        "exponential",
        "the last norm's gain is edited along, at a rate that suits no gain",
        "gradient steps",
        "words",
        _gain,
        known=False,
        held_out=True,
    ),
    Scenario(
        "requantised",
        None,
        "requantised",
        "exponential",
        "after each edit weights are stored as int5 and read back with another scale: they shrink",
        "gradient steps",
        "words, Llama",
        _requantised,
        known=False,
        held_out=True,
    ),
    Scenario(
        "momentum-kept",
        None,
        "momentum-kept",
        "exponential",
        "one optimiser for all edits with a momentum of 0.98: each edit goes on with what earlier ones wanted",
        "SGD with momentum",
        "words, wide",
        _momentum,
        known=False,
        held_out=True,
    ),
)
