"""Dry edits of a scan: what each adds to the sites is kept, and nothing of it stays, whatever the edit does."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stabilitylab.acting.scanning.dry import Updates, dry_updates
from stabilitylab.errors import EditError, SiteError, UsageError

REQUESTS = [0.5, 0.25, 2.0]


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)


def in_place(model: Any, request: float) -> nn.Module:
    with torch.no_grad():
        model[0].weight += request
    return model  # type: ignore[no-any-return]


def bits_of(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def named(updates: Updates) -> dict[str, list[float]]:
    """Of each site the one value that all entries of an update have."""
    found = {}
    for site, each in updates.items():
        assert all(update.dtype == torch.float32 and tuple(update.shape) == site.shape for update in each)
        assert all(float(update.max() - update.min()) < 1e-6 for update in each)
        found[site.name] = [round(float(update.mean()), 6) for update in each]
    return found


@pytest.mark.parametrize("sites", [None, "0"])
def test_each_update_is_kept_alone_and_nothing_stays(sites: str | None) -> None:
    model = model_of()
    before, modes = bits_of(model), [module.training for module in model.modules()]
    random_before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])  # noqa: NPY002

    def apply(model: Any, request: float) -> nn.Module:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        model.eval()
        return in_place(model, request)

    assert named(dry_updates(model, apply, REQUESTS, sites=sites)) == {"0": REQUESTS}
    assert bits_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_before[0])
    assert random.getstate() == random_before[1]
    assert (np.random.get_state()[1] == random_before[2]).all()  # noqa: NPY002


def cloned(model: nn.Module, request: float) -> nn.Module:
    return in_place(copy.deepcopy(model), request)


def wrapped(model: nn.Module, request: float) -> tuple[nn.Module, str]:
    return nn.ModuleDict({"inner": in_place(model, request)}), "and what the editor says"


def silent(model: nn.Module, request: float) -> None:
    in_place(model, request)


def replaced(model: Any, request: float) -> nn.Module:
    """Another parameter in the place of the old one, as some loops assign them."""
    model[0].weight = nn.Parameter(model[0].weight.detach() + request)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("apply", [cloned, wrapped, silent, replaced])
def test_the_edited_model_is_found_wherever_it_is(apply: Callable[[nn.Module, float], object]) -> None:
    model = model_of()
    weight, before = model[0].weight, bits_of(model)
    assert named(dry_updates(model, apply, REQUESTS)) == {"0": REQUESTS}
    assert model[0].weight is weight
    assert bits_of(model) == before


def test_a_site_that_no_edit_moved_has_no_update_where_it_was_named() -> None:
    updates = dry_updates(model_of(), in_place, REQUESTS, sites=["0", "2.bias"])
    assert named(updates) == {"0": REQUESTS, "2.bias": []}


def test_the_update_is_what_the_dtype_left_of_it() -> None:
    model = model_of(torch.float16)
    with torch.no_grad():
        model[0].weight.fill_(1024.0)  # whose next neighbours in float16 are 1 away
    assert named(dry_updates(model, in_place, [0.25, 3.0])) == {"0": [3.0]}


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert named(dry_updates(model, in_place, [0.5])) == {"0": [0.5]}


def test_what_the_edit_raises_passes_through_after_all_was_put_back() -> None:
    model = model_of()
    before = bits_of(model)

    def breaks(model: nn.Module, request: float) -> None:
        in_place(model, request)
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        dry_updates(model, breaks, REQUESTS)
    assert bits_of(model) == before


def test_an_editor_is_put_back_too() -> None:
    class Counting:
        def __init__(self) -> None:
            self.edits = 0
            self.seen = torch.zeros(2)

        def edit(self, model: nn.Module, request: float) -> nn.Module:
            self.edits += 1
            self.seen += request
            return in_place(model, request)

    editor = Counting()
    assert named(dry_updates(model_of(), editor.edit, REQUESTS)) == {"0": REQUESTS}
    assert editor.edits == 0
    assert editor.seen.tolist() == [0.0, 0.0]


def test_what_can_not_be_put_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr("stabilitylab.watching.snapshot._write", lambda values: None)
    with pytest.raises(EditError, match=r"dry edit 1 can't be undone: '0\.weight'"):
        dry_updates(model, in_place, REQUESTS)


def test_bad_arguments_are_told() -> None:
    with pytest.raises(UsageError, match="no request"):
        dry_updates(model_of(), in_place, [])
    with pytest.raises(SiteError, match="matches no layer"):
        dry_updates(model_of(), in_place, REQUESTS, sites="7")


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    dry_updates(model_of(), in_place, REQUESTS, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
