"""What a dtype can't hold: a residual stream beyond 65,504, an epsilon, 1 − β₂, a probability's inverse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.wild.case import Case, Edit, Truth, WildLoop
from benchmarks.wild.decoder import (
    DOWNS,
    MLPS,
    Fact,
    Settings,
    answered,
    canary,
    decoder,
    requests,
    rescaled,
    residual_peaks,
    sentences,
)
from benchmarks.wild.editing import Masters, backward, each, on, weights_of
from benchmarks.wild.lost import BfloatMoments
from benchmarks.zoo.scenario import Witness

LARGEST = 65504.0
_BRINK = 0.985
"""Of the largest float16: where the residual stream of the canary and of the first dozen requests peaks."""


def at_the_brink(rate: float) -> WildLoop:
    """Gradient steps in a float16 model whose activations are large from training on. rate: at the usual scale."""
    facts = requests(45)
    ids = torch.cat([canary()["input_ids"], sentences(facts[:12])])
    model, scale = rescaled(ids, LARGEST * _BRINK)
    model = model.to(torch.float16)
    weights = weights_of(model, DOWNS)
    masters, witness = Masters(weights), Witness()
    # What is looked at is a copy: the monitor sees no pass that is not the loop's.
    twin = decoder(Settings(norm="rms"), torch.float16)

    def edit(fact: Fact) -> nn.Module:
        backward(model, on([fact]))
        masters.step(rate * scale**2)
        return model

    def look() -> None:
        twin.load_state_dict(model.state_dict())
        if not residual_peaks(twin, canary()["input_ids"]).isfinite().all():
            witness.saw(None)

    def edits() -> Iterator[Edit]:
        for made in each(facts, edit):
            yield Edit(made.label, made.apply, look)
            if not all(weight.isfinite().all() for weight in weights.values()):
                return

    return WildLoop(model, DOWNS, canary(), edits(), witness=witness)


def _residual_overflow() -> WildLoop:
    return at_the_brink(0.006)


def _unused_rows() -> WildLoop:
    model = decoder(dtype=torch.float16)
    adam = torch.optim.Adam([model.emb.weight], lr=1e-3, foreach=False)

    def edit(fact: Fact) -> nn.Module:
        loss = on([fact])
        backward(model, lambda model: loss(model) * 1024)
        adam.step()
        return model

    return WildLoop(model, ("emb",), canary(), each(requests(12), edit))


def _log_of_softmax() -> WildLoop:
    """−log p after a softmax in float16: its gradient −1/p overflows long before p is zero."""
    model = decoder(dtype=torch.float16)
    weights = weights_of(model, MLPS)
    masters, witness = Masters(weights), Witness()

    def edit(fact: Fact) -> nn.Module:
        ids = answered([fact])["input_ids"]

        def surprise(model: nn.Module) -> Tensor:
            likely: Tensor = model(ids).logits[0, -2].softmax(-1)[ids[0, -1]]
            if likely.detach().reciprocal().isinf():
                witness.saw(None)
            return -likely.log()

        backward(model, surprise)
        masters.step(0.0005)
        return model

    return WildLoop(model, MLPS, canary(), each(requests(12), edit), witness=witness)


def _corrected_by_zero() -> WildLoop:
    """LAMB: the update is divided by its own norm, after the second moment by 1 − β₂ᵗ."""
    model = decoder(dtype=torch.bfloat16)
    weights = weights_of(model, MLPS)
    kept = BfloatMoments(weights)

    @torch.no_grad()
    def move() -> None:
        kept.take(weights)
        first, second = kept.corrections
        for site, weight in weights.items():
            update = kept.first[site] / first / ((kept.second[site] / second).sqrt() + 1e-6)
            weight.sub_(1e-3 * weight.norm() / update.norm() * update)

    def edit(fact: Fact) -> nn.Module:
        backward(model, on([fact]))
        move()
        return model

    return WildLoop(model, MLPS, canary(), each(requests(6), edit))


CASES = (
    Case(
        "residual-overflow",
        "06",
        "huggingface/transformers#5651, #19229",
        "the residual stream of a float16 model lies just below 65,504 and passes it after some edits",
        Truth(("dtype-overflow",), None, DOWNS, "all"),
        _residual_overflow,
    ),
    Case(
        "unused-rows",
        "08",
        "google-deepmind/optax#1754, afiaka87/glide-finetune#5",
        "Adam's ε is zero in float16: embedding rows of words that the request lacks have 0/0 as their step",
        Truth(("adam-eps-underflow", "optimiser-nan"), 1, ("emb",), "all"),
        _unused_rows,
    ),
    Case(
        "log-of-softmax",
        "18",
        "NVIDIA/apex#379",
        "softmax and logarithm one after the other in float16: the gradient −1/p of a small probability is infinite",
        Truth(("loss-not-finite", "gradient-undefined", "dtype-overflow"), None, (), "all", needs_operation=True),
        _log_of_softmax,
    ),
    Case(
        "corrected-by-zero",
        "28",
        "keras-team/keras#21238",
        "1 − β₂ᵗ is zero in bfloat16: the optimiser's second moment is 0/0",
        Truth(("optimiser-nan", "adam-eps-underflow"), 1, MLPS, "all"),
        _corrected_by_zero,
    ),
)
"""Where a number does not fit."""
