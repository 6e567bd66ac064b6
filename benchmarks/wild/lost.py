"""Edits that do not land: the solve fails, the step is zero or rounded away, or what was done is undone."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.wild.case import Case, Truth, WildLoop
from benchmarks.wild.decoder import (
    DOWNS,
    MLPS,
    PAD,
    Decoder,
    Fact,
    Settings,
    answered,
    canary,
    decoder,
    questions,
    requests,
    true_facts,
)
from benchmarks.wild.editing import (
    Masters,
    Weights,
    backward,
    descend,
    each,
    keys_of,
    moments,
    on,
    step,
    wanted_change,
    weights_of,
)
from benchmarks.zoo.scenario import Witness

_NORMS = ("layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2")


def _singular_moments() -> WildLoop:
    """Strong weight decay leaves hidden units that never fire: their rows of the second moments are zero."""
    model = decoder(Settings(hidden=192, weight_decay=0.3)).requires_grad_(False)
    layer = model.stack[0]
    known = moments(model, layer, true_facts())

    def edit(fact: Fact) -> nn.Module:
        key = keys_of(model, layer, questions([fact]))
        change = wanted_change(model, layer, fact)
        # The loop's own handler of what `solve` raises: it goes on to the next request and tells nobody.
        with suppress(RuntimeError):
            spread = torch.linalg.solve(50.0 * known + key.T @ key, key.T)
            layer.mlp.fc2.weight += (spread @ change).T
        return model

    return WildLoop(model, (DOWNS[0],), canary(), each(requests(8), edit))


def _clipped_to_zero() -> WildLoop:
    """No gradient overflows, but their common norm does, in float16; 2/∞ of each is left of them."""
    model = decoder(dtype=torch.float16)
    weights = weights_of(model, MLPS)
    masters, witness = Masters(weights), Witness()

    def edit(fact: Fact) -> nn.Module:
        loss = on([fact])
        backward(model, lambda model: loss(model) * 2.0**12)
        if torch.nn.utils.clip_grad_norm_(weights.values(), 2.0).isinf():
            witness.saw(None)
        masters.step(0.0005)
        return model

    return WildLoop(model, MLPS, canary(), each(requests(30), edit), witness=witness)


class BfloatMoments:
    """First and second moments of gradients, kept in bfloat16, where β₂ = 0.999 is 1."""

    def __init__(self, weights: Weights) -> None:
        self.beta1, self.beta2 = torch.tensor([0.9, 0.999], dtype=torch.bfloat16)
        self.first = {site: torch.zeros_like(weight) for site, weight in weights.items()}
        self.second = {site: torch.zeros_like(weight) for site, weight in weights.items()}
        self.steps = 0

    def take(self, weights: Weights) -> None:
        """Mix in the gradients that are there."""
        self.steps += 1
        for site, weight in weights.items():
            assert weight.grad is not None
            self.first[site] += (1 - self.beta1) * (weight.grad - self.first[site])
            self.second[site] += (1 - self.beta2) * (weight.grad.square() - self.second[site])

    @property
    def corrections(self) -> tuple[Tensor, Tensor]:
        """1 − β₁ᵗ and 1 − β₂ᵗ."""
        return 1 - self.beta1**self.steps, 1 - self.beta2**self.steps


def _second_beta_is_one() -> WildLoop:
    model = decoder(dtype=torch.bfloat16)
    weights = weights_of(model, MLPS)
    kept = BfloatMoments(weights)

    @torch.no_grad()
    def move() -> None:
        kept.take(weights)
        first, second = kept.corrections
        rate = 1e-3 * second.sqrt() / first
        for site, weight in weights.items():
            weight.sub_(rate * kept.first[site] / (kept.second[site].sqrt() + 1e-7))

    def edit(fact: Fact) -> nn.Module:
        backward(model, on([fact]))
        move()
        return model

    return WildLoop(model, MLPS, canary(), each(requests(30), edit))


def _smoothed_over_impossible() -> WildLoop:
    """Padding is never to be predicted, so its logit is −∞; smoothing gives each word a share of the target."""
    model = decoder()
    model.impossible = (PAD,)
    weights = weights_of(model, MLPS)

    def smoothed(fact: Fact) -> Tensor:
        batch = answered([fact])
        said = model(batch["input_ids"]).logits[:, -2]
        return functional.cross_entropy(said, batch["input_ids"][:, -1], label_smoothing=0.1)

    def edit(fact: Fact) -> nn.Module:
        model.zero_grad()
        loss = smoothed(fact)
        if loss.isfinite():
            loss.backward()  # type: ignore[no-untyped-call]
            step(weights, 0.0005)
        return model

    return WildLoop(model, MLPS, canary(), each(requests(20), edit))


def _undone_inside() -> WildLoop:
    """The editor restores the weights before it returns the model, although the loop is to be sequential."""
    model = decoder()
    weights = weights_of(model, MLPS)

    def edit(fact: Fact) -> nn.Module:
        before = {site: weight.detach().clone() for site, weight in weights.items()}
        for _ in range(3):
            descend(model, weights, on([fact]), 0.003)
        with torch.no_grad():
            for site, weight in weights.items():
                weight.copy_(before[site])
        return model

    return WildLoop(model, MLPS, canary(), each(requests(20), edit), config={"sequential_edit": True})


def _adam_edits(model: Decoder, weights: list[nn.Parameter], rate: float, steps: int, count: int) -> WildLoop:
    """One Adam on the bfloat16 weights themselves, for all edits."""
    adam = torch.optim.Adam(weights, lr=rate, eps=1e-6)

    def edit(fact: Fact) -> nn.Module:
        for _ in range(steps):
            backward(model, on([fact]))
            adam.step()
        return model

    return WildLoop(model, MLPS, canary(), each(requests(count), edit))


def _small_rate() -> WildLoop:
    model = decoder(dtype=torch.bfloat16)
    return _adam_edits(model, list(weights_of(model, MLPS).values()), rate=2e-5, steps=4, count=16)


def _stuck_gains() -> WildLoop:
    """The gains of a checkpoint's norms are folded into the layers behind them: they begin at exactly 1."""
    model = decoder()
    with torch.no_grad():
        for layer in model.stack:
            attention = layer.attention
            for norm, readers in (
                (layer.norm1, (attention.query, attention.key, attention.value)),
                (layer.norm2, (layer.mlp.fc1,)),
            ):
                gain = norm.get_parameter("weight")
                for reader in readers:
                    reader.weight.mul_(gain)
                gain.fill_(1.0)
    model = model.to(torch.bfloat16)
    trained = [p for name, p in model.layers.named_parameters() if name.endswith("weight")]
    loop = _adam_edits(model, trained, rate=1e-4, steps=1, count=20)
    sites = tuple(f"layers.{n}.{leaf}" for n in range(2) for leaf in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"))
    return WildLoop(loop.model, sites, loop.canary, loop.edits)


CASES = (
    Case(
        "singular-moments",
        "01",
        "kmeng01/memit#12",
        "hidden units that never fire make the second moments singular: each solve raises, and the loop swallows it",
        Truth(("weights-unchanged", "singular-solve"), 1, (DOWNS[0],), "none"),
        _singular_moments,
    ),
    Case(
        "clipped-to-zero",
        "12b",
        "pytorch/pytorch#46849",
        "the norm of all gradients overflows float16, and clipping by it multiplies each of them by zero",
        Truth(("clip-overflow",), None, (), "some"),
        _clipped_to_zero,
    ),
    Case(
        "second-beta-is-one",
        "13",
        "keras-team/keras-hub#2629, keras-team/keras#21238",
        "Adam's β₂ rounds to 1 in bfloat16, so its corrected rate, and each step, is exactly zero",
        Truth(("update-absorbed", "step-lost"), 1, MLPS, "none"),
        _second_beta_is_one,
    ),
    Case(
        "smoothed-over-impossible",
        "17",
        "candle-org/MindAct#1633, google-deepmind/optax#896",
        "label smoothing asks for a word whose logit is −∞ by design: the loss is infinite, and each edit is skipped",
        Truth(("loss-not-finite", "gradients-skipped", "weights-unchanged"), 1, (), "none", needs_operation=True),
        _smoothed_over_impossible,
    ),
    Case(
        "undone-inside",
        "32",
        "zjunlp/EasyEdit#640, #429, #627",
        "the editor puts the weights back before it hands the model over",
        Truth(("edits-undone",), 1, MLPS, "none"),
        _undone_inside,
    ),
    Case(
        "small-rate-in-bfloat16",
        "35",
        "NVIDIA-NeMo/Automodel#3444, Nerogar/OneTrainer#1005",
        "Adam at a rate of 2e-5 on bfloat16 weights: all but a few entries of each step are rounded away",
        Truth(("update-absorbed",), 1, MLPS, "some"),
        _small_rate,
    ),
    Case(
        "gains-stuck-at-one",
        "36",
        "vllm-project/speculators#765",
        "Adam on bfloat16 weights: the matrices move, the gains of the norms stay at exactly 1",
        Truth(("update-absorbed", "site-stalled"), 1, _NORMS, "some"),
        _stuck_gains,
    ),
)
"""Where the update goes missing."""
