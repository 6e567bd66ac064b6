"""AlphaEdit's projection and update: preserved keys get nothing, earlier edits are kept, and the cache is its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.editors.alphaedit import AlphaEdit, null_space, projected_update
from stabilitylab.editors.memit import ridge_update
from stabilitylab.editors.target_value import Search
from stabilitylab.watching.editor_parts import find_key_caches, find_projections
from tests.key_value import MODELS, Texts, average, caught, changed, hooks, llama, locate, loss, matrix, requests, state

SEARCH = Search(steps=25, lr=1.0, kl=0.0, decay=0.0, clamp=50.0, enough=0.05)
FEW = {"batches": 1, "rows": 2, "width": 7}
"""So few tokens of ordinary text that their keys leave a null space."""


def prepared(model: nn.Module, **settings: Any) -> AlphaEdit:
    chosen = {"search": SEARCH, "layers": [1, 2], "null_share": 1e-5, **settings}
    editor = AlphaEdit.for_model(model, locate=locate, **chosen)
    editor.prepare(model, Texts(**FEW), seed=0)
    return editor


def drawn(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]


def test_p_projects_onto_what_is_orthogonal_to_every_preserved_key() -> None:
    (preserved,) = drawn((24, 10))
    projection = null_space(preserved @ preserved.T / 10, 1e-6)
    torch.testing.assert_close(projection @ projection, projection)
    torch.testing.assert_close(projection, projection.T)
    assert float(projection.trace()) == pytest.approx(14)
    basis = torch.linalg.qr(preserved).Q
    torch.testing.assert_close(projection, torch.eye(24, dtype=torch.float64) - basis @ basis.T)
    assert float((projection @ preserved).norm()) < 1e-10 * float(preserved.norm())


@pytest.mark.parametrize("n", [1, 4])
def test_the_update_annihilates_preserved_keys_and_is_the_ridge_solution_inside_the_null_space(n: int) -> None:
    """With a basis N of the null space: min ‖Δ K₁ − R‖² + ‖Δ K_p‖² + w ‖Δ‖² over Δ = Δ' Nᵀ, by `lstsq`."""
    preserved, earlier, keys, residual = drawn((24, 10), (24, 5), (24, n), (16, n))
    projection = null_space(preserved @ preserved.T / 10, 1e-6)
    weight = 0.7
    solved = projected_update(projection, earlier @ earlier.T, keys, residual, weight)
    values, vectors = torch.linalg.eigh(preserved @ preserved.T)
    basis = vectors[:, values < 1e-6]
    tall = torch.cat([keys.T @ basis, earlier.T @ basis, weight**0.5 * torch.eye(14, dtype=torch.float64)])
    wanted = torch.cat([residual.T, torch.zeros(5 + 14, 16, dtype=torch.float64)])
    inside = torch.linalg.lstsq(tall, wanted).solution.T
    torch.testing.assert_close(solved.update, inside @ basis.T, atol=1e-10, rtol=1e-8)
    assert float((solved.update @ preserved).norm()) < 1e-10 * float(solved.update.norm() * preserved.norm())
    torch.testing.assert_close(solved.system @ solved.solution, solved.right_side)
    # Eq. 14 as it is written.
    identity = torch.eye(24, dtype=torch.float64)
    inverse = torch.linalg.inv(earlier @ earlier.T @ projection + keys @ keys.T @ projection + weight * identity)
    torch.testing.assert_close(solved.update, residual @ keys.T @ projection @ inverse, atol=1e-10, rtol=1e-8)


def test_the_null_space_holds_no_more_than_was_asked_for() -> None:
    (keys,) = drawn((24, 300))
    moment = (keys * torch.linspace(0.1, 3, 24, dtype=torch.float64)[:, None]) @ keys.T / 300
    moment = (moment + moment.T) / 2 + 3 * torch.eye(24, dtype=torch.float64)
    values = torch.linalg.eigvalsh(moment)
    for kept in (0, 1, 7, 23, 24):
        most = float(values[:kept].sum()) * (1 + 1e-9)
        assert float(null_space(moment, most).trace()) == pytest.approx(kept, abs=1e-9)


def test_with_nothing_to_preserve_it_is_the_ridge_solution() -> None:
    keys, residual = drawn((24, 3), (16, 3))
    identity = torch.eye(24, dtype=torch.float64)
    found = projected_update(identity, torch.zeros_like(identity), keys, residual, 0.7)
    torch.testing.assert_close(found.update, ridge_update(0.7 * identity, keys, residual).update)


@pytest.mark.parametrize("family", MODELS)
def test_an_edit_answers_the_keys_of_ordinary_text_as_before(family: str) -> None:
    model = MODELS[family]()
    editor = prepared(model, l2=1e-4)
    assert editor.P is not None
    torch.testing.assert_close(editor.P @ editor.P, editor.P, atol=1e-5, rtol=0)
    assert all(0 < float(matrix_.trace()) < 24 for matrix_ in editor.P)
    twin = copy.deepcopy(model).eval()
    located = locate(requests(1)[0])
    random = torch.get_rng_state()
    editor.edit(model, requests(1)[0])
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(model) == 0
    assert changed(state(twin), model) == {f"{site}.weight" for site in editor.sites}
    assert loss(model, located) < loss(twin, located)
    (text,) = Texts(**FEW).texts()
    for site in editor.sites:
        keys = caught(twin, text, site)[0][text["attention_mask"].bool()]
        update = editor.reports[site].update
        assert update is not None
        update = update if update.shape == (16, 24) else update.T
        assert float((update @ keys.T).norm()) < 1e-5 * float(update.norm() * keys.norm())
        moved = matrix(model, site) - matrix(twin, site)
        assert float((moved - update).norm()) < 1e-5 * float(update.norm())


def test_the_cache_is_the_sum_over_edited_keys_and_each_editors_own() -> None:
    model = llama()
    editor, other = prepared(model), prepared(model)
    sums = torch.zeros(2, 24, 24, dtype=torch.float64)
    for asked in (requests(1)[0], requests(3)[1:]):
        editor.edit(model, asked)
        for request in asked if isinstance(asked, list) else [asked]:
            located = locate(request)
            for place, site in enumerate(editor.sites):
                # In the edited model: a layer's keys hang on earlier layers only.
                keys = average(caught(model.eval(), located.batch, site)[0][torch.arange(3), located.subject])
                sums[place] += torch.outer(keys, keys)
    assert editor.cache_c is not None
    torch.testing.assert_close(editor.cache_c.double(), sums, atol=1e-4 * float(sums.abs().max()), rtol=0)
    assert other.cache_c is not None
    assert not other.cache_c.any()
    assert list(find_projections(editor)) == ["P.0", "P.1"]
    assert list(find_key_caches(editor)) == ["cache_c.0", "cache_c.1"]
    editor.prepare(model, Texts(**FEW), seed=0)
    assert not editor.cache_c.any()


def test_what_an_earlier_edit_wrote_is_kept_better_with_the_cache() -> None:
    keys, residual, later, wanted = drawn((24, 2), (16, 2), (24, 2), (16, 2))
    later = keys + 0.3 * later
    identity = torch.eye(24, dtype=torch.float64)
    none = torch.zeros_like(identity)
    first = projected_update(identity, none, keys, residual, 1e-3).update
    left = wanted - first @ later
    forgetful = first + projected_update(identity, none, later, left, 1e-3).update
    mindful = first + projected_update(identity, keys @ keys.T, later, left, 1e-3).update
    missed = [float((update @ keys - residual).norm()) for update in (mindful, forgetful)]
    assert missed[0] < 0.5 * missed[1]
