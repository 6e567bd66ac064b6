"""MEMIT's solve against `lstsq`, Sherman and Morrison's formula and ROME; its layers against a naive second loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.editors.at_token import block_of
from stabilitylab.editors.layers import mlp_layers
from stabilitylab.editors.memit import Memit, ridge_update
from stabilitylab.editors.rome import rank_one_update
from stabilitylab.editors.target_value import Search
from stabilitylab.errors import SiteError
from tests.key_value import (
    MODELS,
    Texts,
    answered,
    average,
    caught,
    changed,
    hooks,
    llama,
    locate,
    loss,
    matrix,
    requests,
    state,
)

SEARCH = Search(steps=25, lr=1.0, kl=0.0, decay=0.0, clamp=50.0, enough=0.05)


def prepared(model: nn.Module, layers: list[int], **settings: Any) -> Memit:
    editor = Memit.for_model(model, locate=locate, layers=layers, **{"search": SEARCH, **settings})
    editor.prepare(model, Texts(), seed=0)
    return editor


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(C [24, 24], K₁ [24, n], R [16, n])."""
    generator = torch.Generator().manual_seed(1)
    ordinary = torch.randn(24, 200, dtype=torch.float64, generator=generator)
    keys, residual = (torch.randn(size, n, dtype=torch.float64, generator=generator) for size in (24, 16))
    return ordinary @ ordinary.T / 200, keys, residual


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_solve_is_the_stacked_least_squares_problem(n: int) -> None:
    """min ‖Δ K₁ − R‖² + λ ‖Δ C^½‖², as one tall system for `lstsq`."""
    covariance, keys, residual = drawn(n)
    weight = 3.0
    solved = ridge_update(weight * covariance, keys, residual)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.sqrt() @ vectors.T
    tall = torch.cat([keys.T, weight**0.5 * root])
    wanted = torch.cat([residual.T, torch.zeros(24, 16, dtype=torch.float64)])
    torch.testing.assert_close(solved.update, torch.linalg.lstsq(tall, wanted).solution.T, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(solved.system @ solved.solution, solved.right_side)


def test_one_edit_of_one_layer_is_romes_update_but_for_the_share_that_is_preserved() -> None:
    """Sherman–Morrison: (λC + kkᵀ)⁻¹k = (λC)⁻¹k / (1 + kᵀ(λC)⁻¹k)."""
    covariance, keys, residual = drawn(1)
    key = keys[:, 0]
    for weight in (1e-6, 3.0, 500.0):
        solved = ridge_update(weight * covariance, keys, residual)
        rome, _ = rank_one_update(weight * covariance, key, residual[:, 0])
        strength = float(key @ torch.linalg.inv(covariance) @ key) / weight
        torch.testing.assert_close(solved.update, rome * strength / (1 + strength), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("together", [1, 3])
def test_each_layer_writes_its_share_of_what_is_still_missing(family: str, together: int) -> None:
    model = MODELS[family]()
    editor = prepared(model, [0, 1, 2])
    asked = requests(together)
    twin = copy.deepcopy(model).eval()
    random = torch.get_rng_state()
    assert editor.edit(model, asked if together > 1 else asked[0]) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(model) == 0
    assert changed(state(twin), model) == {f"{site}.weight" for site in editor.sites}

    last = editor.sites[-1]
    targets = editor.reports[last].target_value
    assert targets is not None
    for place, site in enumerate(editor.sites):
        keys, missing = [], []
        for number, request in enumerate(asked):
            located = locate(request)
            rows = torch.arange(3)
            keys.append(average(caught(twin, located.batch, site)[0][rows, located.subject]))
            stream = average(caught(twin, located.batch, block_of(last))[1][rows, located.subject])
            missing.append((targets[number] - stream) / (3 - place))
        k, r = torch.stack(keys, dim=1), torch.stack(missing, dim=1)
        weighted = editor.preservation * 24 * editor.known().padded(site, editor.ridge)
        naive = r @ k.T @ torch.linalg.inv(weighted + k @ k.T)
        moved = matrix(model, site) - matrix(twin, site)
        torch.testing.assert_close(moved, naive, atol=1e-4 * float(naive.norm()), rtol=0)
        weight: Any = twin.get_submodule(site).weight
        weight.data.copy_(model.get_submodule(site).weight)
        report = editor.reports[site]
        assert report.update is not None
        assert report.update.shape == weight.shape
        assert report.key is not None
        torch.testing.assert_close(report.key.T, k, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_the_wanted_answers_are_given_after_an_edit_of_several_layers(family: str) -> None:
    model = MODELS[family]()
    editor = prepared(model, [1, 2], preservation=1e-3)
    asked = requests(2)
    assert not any(answered(model, locate(request)) for request in asked)
    editor.edit(model, asked)
    assert all(answered(model, locate(request)) for request in asked)


def test_more_preservation_changes_less() -> None:
    moved, losses = [], []
    for preservation in (0.01, 1.0, 100.0):
        model = llama()
        editor = prepared(model, [1, 2], preservation=preservation)
        before = matrix(model, editor.sites[0])
        editor.edit(model, requests(1)[0])
        moved.append(float((matrix(model, editor.sites[0]) - before).norm()))
        losses.append(loss(model, locate(requests(1)[0])))
    assert moved[0] > moved[1] > moved[2] > 0
    assert losses[0] < losses[1] < losses[2]


def test_half_precision_weights_are_edited() -> None:
    model = llama().half()
    editor = prepared(model, [1, 2])
    was = loss(copy.deepcopy(model), locate(requests(1)[0]))
    editor.edit(model, requests(1)[0])
    assert all(parameter.dtype == torch.float16 for parameter in model.parameters())
    assert loss(model, locate(requests(1)[0])) < 0.5 * was


def test_default_layers_lie_before_the_middle_of_a_deep_decoder_and_leave_a_short_one_some() -> None:
    model = llama()
    assert Memit.for_model(model, locate=locate).sites == tuple(mlp_layers(model, "down").values())[:2]
    assert block_of("transformer.h.5.mlp.c_proj") == "transformer.h.5"
    with pytest.raises(SiteError, match="no numbered decoder layer"):
        block_of("lm_head")
