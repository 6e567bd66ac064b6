"""ROME's closed form against `lstsq`, and what an edit does to small models of several families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.editors.at_token import shifted, still
from stabilitylab.editors.base import Located
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.rome import Rome, rank_one_update
from stabilitylab.editors.target_value import Search, TargetValue, target_value
from stabilitylab.errors import SiteError, UsageError
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


def prepared(model: nn.Module, **settings: Any) -> Rome:
    editor = Rome.for_model(model, locate=locate, **{"search": SEARCH, **settings})
    editor.prepare(model, Texts(), seed=0)
    return editor


def test_the_update_is_the_smallest_that_brings_the_value_as_measured_on_ordinary_keys() -> None:
    """min ‖Δ C^½‖_F with Δ k = v − W k: with Δ' = Δ C^½ the least-norm solution of Δ' (C^-½ k) = v − W k."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(24, 200, dtype=torch.float64, generator=generator)
    covariance = keys @ keys.T / 200
    key, shift = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (24, 16))
    update, direction = rank_one_update(covariance, key, shift)
    values, vectors = torch.linalg.eigh(covariance)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    least = torch.linalg.lstsq((inverse @ key)[None], shift[None], driver="gelsd").solution.T
    torch.testing.assert_close(update @ root, least, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(update @ key, shift)
    torch.testing.assert_close(covariance @ direction, key)
    assert torch.linalg.matrix_rank(update) == 1


@pytest.mark.parametrize("family", MODELS)
def test_an_edit_writes_its_value_at_its_key_and_nothing_else_moves(family: str) -> None:
    model = MODELS[family]()
    editor = prepared(model)
    (site,) = editor.sites
    before, located = state(model), locate(requests(1)[0])
    old = matrix(model, site)
    model_before = copy.deepcopy(model).eval()
    training, flags, random = model.training, [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    assert editor.edit(model, requests(1)[0]) is model
    assert changed(before, model) == {f"{site}.weight"}
    assert model.training == training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(model) == 0

    entered, left = caught(model_before, located.batch, site)
    rows = torch.arange(len(located.subject))
    key = average(entered[rows, located.subject])
    report = editor.reports[site]
    torch.testing.assert_close(report.key, key, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(report.initial_value, average(left[rows, located.subject]), atol=1e-5, rtol=1e-5)
    moved = matrix(model, site) - old
    wanted = report.target_value - report.initial_value
    torch.testing.assert_close(moved @ key, wanted, atol=1e-5 * float(wanted.norm()), rtol=0)
    # Against the closed form in other words: Δ = δ kᵀC⁻¹ / (kᵀC⁻¹k).
    inverse = torch.linalg.inv(editor.known().padded(site, editor.ridge))
    torch.testing.assert_close(
        moved, torch.outer(wanted, inverse @ key) / (key @ inverse @ key), atol=1e-4 * float(moved.norm()), rtol=0
    )
    weight: Any = model.get_submodule(site).weight
    torch.testing.assert_close((weight - before[f"{site}.weight"]).double(), report.update, atol=1e-6, rtol=1e-5)
    assert loss(model, located) < 0.5 * loss(model_before, located)


@pytest.mark.parametrize("family", MODELS)
def test_the_wanted_answer_is_given_after_the_edit(family: str) -> None:
    model = MODELS[family]()
    editor = prepared(model)
    asked = requests(3)
    assert not any(answered(model, locate(request)) for request in asked)
    for request in asked:
        editor.edit(model, request)
        assert answered(model, locate(request))


def test_with_one_row_the_edited_model_is_the_shifted_one() -> None:
    """Where all rows have one key, the edit does at that token exactly what the shift did during the search."""
    model = llama().eval()

    def locate_bare(request: Any) -> Located:
        full = locate(request)
        words = int(full.batch["attention_mask"][0].sum())
        return Located({name: value[:1, :words] for name, value in full.batch.items()}, full.subject[:1])

    editor = Rome.for_model(model, locate=locate_bare, search=SEARCH)
    editor.prepare(model, Texts(), seed=0)
    request = requests(1)[0]
    located = locate_bare(request)
    (site,) = editor.sites
    twin = copy.deepcopy(model)
    editor.edit(model, request)
    report = editor.reports[site]
    assert report.target_value is not None
    assert report.initial_value is not None
    at = int(located.subject)
    with torch.no_grad():
        edited = model(**located.batch).logits[0, at]
        plain = twin(**located.batch).logits[0, at]
        with shifted(twin, site, located.subject, report.target_value - report.initial_value):
            expected = twin(**located.batch).logits[0, at]
    # Earlier tokens, which the last one attends to, have other keys, and are answered a little otherwise too.
    assert float((edited - expected).norm()) < 0.2 * float((plain - expected).norm())


def search(model: nn.Module, site: str, located: Located, settings: Search) -> TargetValue:
    with still(model):
        return target_value(model, site, 16, located, settings)


def test_the_search_lowers_the_loss_inside_its_clamp_and_counts_the_hits() -> None:
    model = llama()
    site = Rome.for_model(model, locate=locate).sites[0]
    located = locate(requests(1)[0])
    free = search(model, site, located, SEARCH)
    assert free.losses[0] == pytest.approx(loss(model, located), rel=1e-5)
    assert free.losses[-1] < SEARCH.enough
    assert free.clamp_hits == 0
    assert len(free.losses) < SEARCH.steps
    tight = search(model, site, located, Search(steps=10, lr=5.0, clamp=0.5))
    assert len(tight.losses) == tight.clamp_hits == 10
    assert float(tight.shift.norm()) == pytest.approx(0.5 * float(tight.initial.norm()), rel=1e-5)
    assert tight.losses[-1] < tight.losses[0]
    with pytest.raises(UsageError, match="at least 1"):
        Search(steps=0)


def test_what_is_kept_is_kept_better_with_a_weight_on_it() -> None:
    model = llama().eval()
    site = Rome.for_model(model, locate=locate).sites[0]
    located = locate(requests(1)[0])
    assert located.kept is not None
    assert located.kept_subject is not None

    def divergence(shift: Tensor) -> float:
        with torch.no_grad():
            before = model(**located.kept).logits[:, -1].double().log_softmax(-1)
            with shifted(model, site, located.kept_subject, shift):
                now = model(**located.kept).logits[:, -1].double().log_softmax(-1)
        return float((before.exp() * (before - now)).sum())

    careless, careful = (search(model, site, located, Search(steps=20, kl=kl, decay=0.0)) for kl in (0.0, 30.0))
    assert divergence(careful.shift) < 0.5 * divergence(careless.shift)


def test_the_first_step_goes_against_autograds_gradient() -> None:
    """Adam's first step is the learning rate in each unit, against the sign of the gradient of the summed outputs."""
    model = llama().eval()
    site = Rome.for_model(model, locate=locate).sites[0]
    located = locate(requests(1)[0])
    one = search(model, site, located, Search(steps=1, lr=1e-3, kl=0.0, decay=0.0, clamp=100.0))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = model.get_submodule(site).register_forward_hook(keep)
    model(**located.batch).loss.backward()
    handle.remove()
    gradient = seen[0].grad
    assert gradient is not None
    summed = gradient[torch.arange(3), located.subject].sum(dim=0)
    torch.testing.assert_close(one.shift, -1e-3 * summed.sign().double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_weights_are_edited_by_a_wide_update(family: str, dtype: torch.dtype) -> None:
    model = MODELS[family]().to(dtype)
    editor = prepared(model)
    (site,) = editor.sites
    old, located = matrix(model, site), locate(requests(1)[0])
    was = loss(copy.deepcopy(model), located)
    editor.edit(model, requests(1)[0])
    layer = edited_layers(model, [site])[0]
    report = editor.reports[site]
    assert report.update is not None
    assert report.update.dtype == torch.float64
    assert layer.parameter.dtype == dtype
    exact = old + layer.as_held(report.update)
    rounding = torch.finfo(dtype).eps * (exact.abs() + old.abs() + layer.as_held(report.update).abs())
    assert ((matrix(model, site) - exact).abs() <= rounding + 1e-7).all()
    assert loss(model, located) < 0.5 * was


def test_nothing_is_left_on_the_model_when_an_edit_fails() -> None:
    model = llama()
    editor = prepared(model)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]

    def broken(request: Any) -> Located:
        good = locate(request)
        return Located({**good.batch, "labels": good.batch["labels"][:, :-1]}, good.subject)

    editor.locate = broken
    with pytest.raises(ValueError, match="batch_size"):
        editor.edit(model, requests(1)[0])
    assert not changed(before, model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert hooks(model) == 0
    nowhere = Rome({"model.layers.7.mlp.down_proj": (16, 24)}, locate=locate)
    with pytest.raises(SiteError, match=r"model\.layers\.7"):
        nowhere.prepare(model, Texts(), seed=0)


def test_a_model_that_is_broken_already_gives_an_edit_of_nan_and_no_error() -> None:
    model = llama()
    editor = prepared(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)  # type: ignore[union-attr]
    editor.edit(model, requests(1)[0])
    assert matrix(model, editor.sites[0]).isnan().all()
