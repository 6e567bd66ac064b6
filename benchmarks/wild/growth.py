"""Nothing is NaN, and yet: what adds up from edit to edit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.wild.case import Case, Edit, Truth, WildLoop
from benchmarks.wild.decoder import (
    DOWNS,
    MLPS,
    Decoder,
    Fact,
    Layer,
    answered,
    canary,
    decoder,
    loss_of,
    questions,
    requests,
    true_facts,
)
from benchmarks.wild.editing import backward, descend, each, keys_of, moments, on, step, wanted_change, weights_of


def _gentle_edits() -> WildLoop:
    model = decoder()
    weights = weights_of(model, MLPS)
    edits = each(requests(60), lambda fact: descend(model, weights, on([fact]), 0.003))
    return WildLoop(model, MLPS, canary(), edits)


def _closed_form_singles() -> WildLoop:
    """MEMIT with batches of one, each solved for as if no other edit had been made."""
    model = decoder().requires_grad_(False)
    layer = model.stack[0]
    known = moments(model, layer, true_facts())
    known += 1e-2 * torch.eye(len(known))

    def edit(fact: Fact) -> nn.Module:
        key = keys_of(model, layer, questions([fact]))
        change = wanted_change(model, layer, fact, clamp=1.0)
        spread = torch.linalg.solve(2.0 * known + key.T @ key, key.T)
        layer.mlp.fc2.weight += (spread @ change).T
        return model

    return WildLoop(model, (DOWNS[0],), canary(), each(requests(80), edit))


class SinglesAlphaEdit:
    """AlphaEdit on one layer. P, cache_c: as it calls them, the projections and the keys of edits so far."""

    def __init__(self, model: Decoder, layer: Layer) -> None:
        self.model, self.layer = model, layer
        values, vectors = torch.linalg.eigh(moments(model, layer, true_facts()))
        unused = vectors[:, values < 0.02 * values.max()]
        self.P = (unused @ unused.T)[None]
        self.cache_c = torch.zeros_like(self.P)

    def edit(self, fact: Fact) -> nn.Module:
        """One edit. The cache keeps its key, whatever becomes of the weights."""
        key = keys_of(self.model, self.layer, questions([fact]))
        change = wanted_change(self.model, self.layer, fact)
        projection, seen = self.P[0], key.T @ key
        system = projection @ (seen + self.cache_c[0]) + 0.1 * torch.eye(len(seen))
        self.layer.mlp.fc2.weight += (torch.linalg.solve(system, projection @ key.T) @ change).T
        self.cache_c[0] += seen
        return self.model


def _cache_outlives_edits() -> WildLoop:
    model = decoder().requires_grad_(False)
    editor = SinglesAlphaEdit(model, model.stack[0])
    weight = model.stack[0].mlp.fc2.weight
    original = weight.clone()

    def put_back() -> None:
        weight.copy_(original)

    edits = (Edit(made.label, made.apply, put_back) for made in each(requests(36), editor.edit))
    return WildLoop(model, (DOWNS[0],), canary(), edits, editor=editor, config={"sequential_edit": False})


def _inexact_unmerge() -> WildLoop:
    """A rank-2 adapter per request is added to bfloat16 weights, used, and subtracted again."""
    model = decoder(dtype=torch.bfloat16)
    weights = weights_of(model, MLPS)

    def adapter(fact: Fact) -> dict[str, Tensor]:
        backward(model, on([fact]))
        found = {}
        for site, weight in weights.items():
            assert weight.grad is not None
            left, sizes, right = torch.linalg.svd(weight.grad.float(), full_matrices=False)
            found[site] = (-0.01 * (left[:, :2] * sizes[:2]) @ right[:2]).to(weight.dtype)
        return found

    def edit(fact: Fact) -> nn.Module:
        deltas = adapter(fact)
        with torch.no_grad():
            for site, weight in weights.items():
                weight.add_(deltas[site])
            loss_of(model, answered([fact]))  # what the merged model was wanted for
            for site, weight in weights.items():
                weight.sub_(deltas[site])
        return model

    return WildLoop(model, MLPS, canary(), each(requests(150), edit), config={"sequential_edit": False})


class MergedAgain(nn.Module):
    """A low-rank adapter of a linear layer that keeps no note of whether it is merged."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(0.1 * torch.randn(rank, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer and the adapter."""
        changed: Tensor = self.base(hidden)
        return changed + hidden @ self.down.T @ self.up.T

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the layer."""
        self.base.weight += self.up @ self.down


def _merged_again() -> WildLoop:
    model = decoder().requires_grad_(False)
    mlp = model.stack[1].mlp
    adapter = MergedAgain(mlp.fc2)
    mlp.add_module("fc2", adapter)
    descent = torch.optim.SGD([adapter.down, adapter.up], lr=0.02)

    def edit(fact: Fact) -> nn.Module:
        backward(model, on([fact]))
        descent.step()
        adapter.merge()  # as for an evaluation after each step
        return model

    return WildLoop(model, ("layers.1.mlp.fc2.base",), canary(), each(requests(60), edit))


def _gradients_kept() -> WildLoop:
    model = decoder()
    weights = weights_of(model, MLPS)

    def edit(fact: Fact) -> nn.Module:
        # Gradients add up over edits: nothing clears them.
        loss_of(model, answered([fact])).backward()  # type: ignore[no-untyped-call]
        step(weights, 0.0007)
        return model

    return WildLoop(model, MLPS, canary(), each(requests(90), edit))


CASES = (
    Case(
        "gentle-edits",
        "00",
        "–",
        "plain small gradient steps, fact after fact, after which more than half of all facts are forgotten",
        Truth(("forgetting", "norm-growth"), None, (), "all"),
        _gentle_edits,
    ),
    Case(
        "closed-form-singles",
        "03",
        "zjunlp/EasyEdit#47, #320",
        "closed-form edits one by one, each blind to those before: half the facts are gone after a few dozen",
        Truth(("norm-growth",), None, (DOWNS[0],), "all"),
        _closed_form_singles,
    ),
    Case(
        "cache-outlives-edits",
        "04",
        "zjunlp/EasyEdit#613",
        "each edit's weights are put back, AlphaEdit's cache of its key is not, and later edits have ever less effect",
        Truth(("cache-grows", "cache-leaked"), None, (DOWNS[0], "editor"), "all"),
        _cache_outlives_edits,
    ),
    Case(
        "inexact-unmerge",
        "14",
        "huggingface/trl#6688, KohakuBlueleaf/LyCORIS#264",
        "adding an adapter to bfloat16 weights and subtracting it again rounds twice, and the base does not come back",
        Truth(("restore-inexact", "weights-not-restored"), None, MLPS, "none"),
        _inexact_unmerge,
    ),
    Case(
        "merged-again",
        "15",
        "huggingface/peft#1355",
        "an adapter that is merged already is merged again after each step",
        Truth(("update-repeated",), None, ("layers.1.mlp.fc2.base",), "all"),
        _merged_again,
    ),
    Case(
        "gradients-kept",
        "27",
        "udacity/deep-learning#160",
        "gradients are never cleared: each edit also repeats all before it",
        Truth(("gradients-not-cleared",), 2, (), "all"),
        _gradients_kept,
    ),
)
"""What grows, or is left behind, a little at each edit."""
