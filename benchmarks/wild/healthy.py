"""Loops with nothing wrong that look as if there were: every alarm here is a false one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.wild.case import Case, Edit, Truth, WildLoop
from benchmarks.wild.decoder import (
    MLPS,
    UPS,
    Fact,
    canary,
    decoder,
    questions,
    requests,
    rescaled,
    seeded,
    true_facts,
)
from benchmarks.wild.editing import Masters, backward, descend, each, on, step, weights_of
from benchmarks.wild.overflow import LARGEST, at_the_brink


def _scaler_skips() -> WildLoop:
    """A dynamic loss scale: doubled after eight sound steps, halved (and the step skipped) when it overflows."""
    model = decoder(dtype=torch.float16)
    weights = weights_of(model, MLPS)
    masters = Masters(weights)
    scale, sound = 2.0**17, 0

    def edit(fact: Fact) -> nn.Module:
        nonlocal scale, sound
        loss = on([fact])
        backward(model, lambda model: loss(model) * scale)
        if all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights.values()):
            masters.step(0.0005 / scale)
            sound += 1
            scale *= 2.0 if sound % 8 == 0 else 1.0
        else:
            scale, sound = scale / 2, 0
        return model

    return WildLoop(model, MLPS, canary(), each(requests(36), edit))


def _gradient_converges() -> WildLoop:
    """The same six facts again and again, clipped to a norm of 1."""
    model = decoder()
    weights = weights_of(model, MLPS)
    facts = requests(6)

    def edit() -> nn.Module:
        backward(model, on(facts))
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        step(weights, 0.03)
        return model

    edits = (Edit(f"six facts, time {number}", edit) for number in range(1, 121))
    return WildLoop(model, MLPS, canary(), edits)


def _clamped_residual() -> WildLoop:
    """T5's guard: the residual stream is clamped a little below the largest float16, and is so from the start."""
    model, _ = rescaled(questions(true_facts()), 1.04 * LARGEST)
    for layer in model.stack:
        layer.limit = LARGEST - 1000
    model = model.to(torch.float16)
    weights = weights_of(model, UPS)
    masters = Masters(weights)

    def edit(fact: Fact) -> nn.Module:
        backward(model, on([fact]))
        masters.step(0.0005)
        return model

    return WildLoop(model, MLPS, canary(), each(requests(36), edit))


class LowRank(nn.Module):
    """A linear layer with an adapter whose second matrix begins at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer and the adapter."""
        changed: Tensor = self.base(hidden) + self.lora_B(self.lora_A(hidden))
        return changed


def _adapter_begins_at_zero() -> WildLoop:
    model = decoder().requires_grad_(False)
    with seeded(1):
        for layer in model.stack:
            mlp = layer.mlp
            first, second = LowRank(mlp.fc1), LowRank(mlp.fc2)
            mlp.add_module("fc1", first)
            mlp.add_module("fc2", second)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def edit(fact: Fact) -> nn.Module:
        backward(model, on([fact]))
        adam.step()
        return model

    sites = tuple(f"{site}.{part}" for site in MLPS for part in ("lora_A", "lora_B"))
    return WildLoop(model, sites, canary(), each(requests(60), edit))


class Normalised(nn.Module):
    """A classifier whose first layer's scale does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.fc2 = nn.Linear(64, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.fc2(functional.relu(self.norm(self.fc1(inputs))))
        return logits


def _gradient_rises() -> WildLoop:
    """Weight decay shrinks a weight under a norm: its gradient grows as 1/‖W‖ while the loss converges."""
    with seeded(0):
        inputs = torch.randn(600, 16)
        classes = (inputs @ torch.randn(16, 8)).argmax(-1)
        model = Normalised()
    with torch.no_grad():
        model.fc1.weight.mul_(6)

    def loss_on(rows: Tensor | slice) -> Tensor:
        return functional.cross_entropy(model(inputs[rows]), classes[rows])

    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        backward(model, lambda _: loss_on(slice(None)))
        adam.step()
    descent = torch.optim.SGD([model.fc1.weight], lr=0.02, weight_decay=0.6)

    def edit(number: int) -> nn.Module:
        rows = torch.randint(0, len(inputs), (32,), generator=torch.Generator().manual_seed(number))
        backward(model, lambda _: loss_on(rows))
        descent.step()
        return model

    edits = (Edit(f"batch {number}", partial(edit, number)) for number in range(160))
    return WildLoop(model, ("fc1",), lambda model: model(inputs[:32]), edits)


def _warm_restarts() -> WildLoop:
    """The rate falls from 8e-4 to 1e-7 along a cosine, and begins anew every 24 edits."""
    model = decoder()
    weights = weights_of(model, MLPS)
    lowest, highest, period = 1e-7, 8e-4, 24

    def edits() -> Iterator[Edit]:
        for place, fact in enumerate(requests(96)):
            height = 0.5 * (1 + math.cos(math.pi * (place % period) / period))
            rate, loss = lowest + (highest - lowest) * height, on([fact])
            yield Edit(fact.label, partial(descend, model, weights, loss, rate))

    return WildLoop(model, MLPS, canary(), edits())


def _constant_sink() -> WildLoop:
    return at_the_brink(0.0005)


def _healthy(name: str, number: str, reference: str, summary: str, make: Callable[[], WildLoop]) -> Case:
    return Case(name, number, reference, summary, Truth((), None, (), "some" if number == "41" else "all"), make)


CASES = (
    _healthy(
        "scaler-skips",
        "41",
        "facebookresearch/swav#47, microsoft/Swin-Transformer#47",
        "a dynamic loss scale overflows now and then, skips that step and is halved",
        _scaler_skips,
    ),
    _healthy(
        "gradient-converges",
        "42",
        "TIGER-AI-Lab/VLM2Vec#137",
        "the gradient falls by orders of magnitude as a handful of facts is learned",
        _gradient_converges,
    ),
    _healthy(
        "clamped-residual",
        "44",
        "huggingface/transformers#9487",
        "the residual stream of a float16 model touches its clamp at 64,504 from the first pass on",
        _clamped_residual,
    ),
    _healthy(
        "adapter-begins-at-zero",
        "45",
        "microsoft/LoRA#42",
        "LoRA's B begins at zero: A has no gradient at first, B leaps from nothing, and the base never moves",
        _adapter_begins_at_zero,
    ),
    _healthy(
        "gradient-rises",
        "46",
        "allenai/OLMo#596",
        "weight decay under a norm: the gradient rises fivefold over the whole run while the loss stays low",
        _gradient_rises,
    ),
    _healthy(
        "warm-restarts",
        "47",
        "xinntao/EDVR#92",
        "a cosine schedule with restarts: the rate leaps from 1e-7 to its peak, on purpose",
        _warm_restarts,
    ),
    _healthy(
        "constant-sink",
        "48",
        "huggingface/transformers#9487, #5651",
        "activations at one token lie 1.5% below the largest float16 and stay there",
        _constant_sink,
    ),
)
"""Nothing wrong in any of them."""
