"""Layers whose weight is computed anew: from one other parameter, which then is watched under the layer's name, or
from it and others, where what comes out is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

import stabilitylab as sl
from stabilitylab.errors import SiteError
from stabilitylab.watching.sites import find_sites, locate


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def pruned(layer: nn.Linear) -> nn.Parameter:
    prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    return layer.weight_orig  # type: ignore[return-value]


def parametrised(layer: nn.Linear) -> nn.Parameter:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer.parametrizations.weight.original  # type: ignore[index, union-attr, return-value]


@pytest.mark.parametrize("how", [pruned, parametrised])
def test_the_parameter_behind_the_weight_is_watched_under_the_layers_name(
    tmp_path: Path, how: Callable[[nn.Linear], nn.Parameter]
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    behind = how(model[0])
    (site,) = find_sites(model, "0")
    found = locate(model, site)
    assert site.name == "0"
    assert found is not None
    assert found[0] is model[0]
    assert found[1] is behind
    with sl.attach(model, ["0", "2"], tmp_path / "run", announce=False) as monitor:
        for _ in range(2):
            with monitor.edit():
                before = behind.detach().clone()
                model.zero_grad()
                model(torch.randn(3, 6)).square().mean().backward()
                with torch.no_grad():
                    behind.add_(0.1)
    run = sl.load(tmp_path / "run")
    assert run.series("update.norm", "0")[2] == pytest.approx(float((behind.detach() - before).norm()), rel=1e-5)
    assert run.series("activation.max_abs", "0")[1] > 0
    assert behind.grad is not None
    assert run.series("gradient.norm", "0")[2] == pytest.approx(float(behind.grad.norm()), rel=1e-5)
    assert "0" not in run.sites_of("gradient.spectrum")  # what enters and leaves the layer is another weight's
    assert "2" in run.sites_of("gradient.spectrum")


def test_without_sites_what_an_edit_moves_of_them_is_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    behind = pruned(model[1])
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor, monitor.edit(), torch.no_grad():
        behind.add_(1.0)
    assert sl.load(tmp_path / "run").manifest["sites"] == ["1"]


def test_weight_norm_has_two_parameters_which_are_found_under_their_own_names_too() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    names = [site.name for site in find_sites(model, "0.*original*")]
    assert names == ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    assert all(locate(model, site) is not None for site in find_sites(model, "0.*"))
    (whole,) = find_sites(model, "0")
    assert whole.shape == (3, 4)


class LowRank(nn.Module):
    """LoRA as it is written without a library. Counts its forwards in a buffer, and draws random numbers to train."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(rows, 2)), nn.Parameter(torch.randn(2, columns))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        self.forwards += 1
        return weight + self.left @ self.dropout(self.right)


class Gate(nn.Module):
    """A learned factor a row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(rows, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def low_rank(layer: nn.Module, rows: int, columns: int) -> None:
    parametrize.register_parametrization(layer, "weight", LowRank(rows, columns))


def gated(layer: nn.Module, rows: int, columns: int) -> None:
    parametrize.register_parametrization(layer, "weight", Gate(rows))


def doubled_and_low_rank(layer: nn.Module, rows: int, columns: int) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())
    low_rank(layer, rows, columns)


def weight_normed(layer: nn.Module, rows: int, columns: int) -> None:
    parametrizations.weight_norm(layer)


def weight_normed_by_a_hook(layer: nn.Module, rows: int, columns: int) -> None:
    nn.utils.weight_norm(layer)


ADDED = [low_rank, gated, doubled_and_low_rank, weight_normed, weight_normed_by_a_hook]
Add = Callable[[nn.Module, int, int], None]


def computing(add: Add, conv1d: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 6) if conv1d else nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    add(model[0], *((6, 5) if conv1d else (5, 6)))
    return model


def weight_of(model: nn.Sequential) -> Tensor:
    """What the first layer computes with in evaluation."""
    if "weight_g" in model[0]._parameters:  # `weight` is that of the last forward, and can't be copied
        return torch.nn.functional.normalize(model[0].weight_v.detach()) * model[0].weight_g.detach()  # type: ignore[operator]
    twin = copy.deepcopy(model).eval()
    weight: Tensor = twin[0].weight
    return weight.detach()


def edits(model: nn.Sequential, of: Callable[[], AbstractContextManager[object]] = nullcontext) -> list[Tensor]:
    """Three steps of an optimizer with what the weight is made of besides; the weight before and after each."""
    moving = [
        tensor
        for name, tensor in model.named_parameters()
        if name.startswith(("0.parametrizations.weight.", "0.weight_")) and not name.endswith("original")
    ]
    optimizer = torch.optim.SGD(moving, lr=0.5)
    seen = [weight_of(model)]
    for _ in range(3):
        x = torch.randn(3, 6)
        with of():
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        seen.append(weight_of(model))
    return seen


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("add", ADDED)
def test_a_weight_with_parameters_of_its_own_beside_the_original_is_watched_as_it_comes_out(
    tmp_path: Path, add: Add, conv1d: bool
) -> None:
    model = computing(add, conv1d)
    with sl.attach(model, "0", tmp_path / "run", announce=False) as monitor:
        seen = edits(model, monitor.edit)
    run = sl.load(tmp_path / "run")
    for number, (before, after) in enumerate(pairwise(seen), start=1):
        assert run.series("update.norm", "0")[number] == pytest.approx(float((after - before).norm()), rel=1e-5)
        assert run.series("drift.norm", "0")[number] == pytest.approx(float((after - seen[0]).norm()), rel=1e-5)
    assert run.series("gradient.source", "0")[1] == 4  # of parts
    assert run.series("gradient.norm", "0")[1] > 0
    assert run.diagnosis().landed == "all"


@pytest.mark.parametrize("add", ADDED)
def test_to_watch_it_changes_nothing(tmp_path: Path, add: Add) -> None:
    plain, watched = computing(add), computing(add)
    heard: list[str] = []
    for name, model in (("plain", plain), ("watched", watched)):
        for part in model.modules():
            part.register_forward_hook(lambda *_, name=name: heard.append(name))
    torch.manual_seed(1)
    edits(plain)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with sl.attach(watched, "0", tmp_path / "run", announce=False) as monitor:
        edits(watched, monitor.edit)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(mine, own)
        for mine, own in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert all(part.training for part in watched.modules())
    assert heard.count("watched") == heard.count("plain")


def test_it_is_a_site_by_its_name_and_its_parts_are_where_they_are_named() -> None:
    model = computing(low_rank)
    assert [site.name for site in find_sites(model, "0")] == ["0"]
    assert [site.name for site in find_sites(model, "*")] == ["0", "0.bias", "2", "2.bias"]
    assert [site.name for site in find_sites(model, "*.left")] == ["0.parametrizations.weight.0.left"]
    assert [site.name for site in find_sites(model, "*.original")] == ["0.parametrizations.weight.original"]


def test_the_parts_of_a_weight_that_a_hook_makes() -> None:
    model = computing(weight_normed_by_a_hook)
    assert [site.name for site in find_sites(model, "*")] == ["0", "0.bias", "2", "2.bias"]
    assert [site.name for site in find_sites(model, "*_g")] == ["0.weight_g"]


@pytest.mark.parametrize("add", [low_rank, weight_normed_by_a_hook])
def test_without_sites_what_an_edit_moves_is_the_layer(tmp_path: Path, add: Add) -> None:
    model = computing(add)
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor:
        edits(model, monitor.edit)
    assert sl.load(tmp_path / "run").manifest["sites"] == ["0"]


def test_parts_that_come_and_go_within_a_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    before = weight_of(model)
    with sl.attach(model, "0", tmp_path / "run", announce=False) as monitor:
        with monitor.edit(), torch.no_grad():
            gated(model[0], 5, 6)
            model[0].parametrizations.weight[0].factor.mul_(3)  # type: ignore[index, union-attr, operator]
        with monitor.edit():
            parametrize.remove_parametrizations(model[0], "weight")
    run = sl.load(tmp_path / "run")
    assert run.series("update.norm", "0")[1] == pytest.approx(2 * float(before.norm()), rel=1e-5)
    assert run.series("update.norm", "0")[2] == 0


def test_what_a_transform_refers_to_is_not_copied(tmp_path: Path) -> None:
    class Whole:
        def __deepcopy__(self, memo: object) -> Whole:
            raise RuntimeError("of the whole model")

    class Referring(Gate):
        def __init__(self, rows: int) -> None:
            super().__init__(rows)
            self.calls = 0
            self.seen: list[int] = []
            self.whole = Whole()

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            return super().forward(weight)

    model = nn.Sequential(nn.Linear(6, 5))
    parametrize.register_parametrization(model[0], "weight", Referring(5))
    gate: Any = model[0].parametrizations.weight[0]  # type: ignore[index, union-attr]
    calls = gate.calls
    with sl.attach(model, "0", tmp_path / "run", announce=False) as monitor, monitor.edit(), torch.no_grad():
        gate.factor.mul_(2)
    assert (gate.calls, gate.seen) == (calls, list(range(1, calls + 1)))
    assert sl.load(tmp_path / "run").series("update.norm", "0")[1] > 0


def test_what_cannot_be_computed_is_told(tmp_path: Path) -> None:
    class Broken(Gate):
        def forward(self, weight: Tensor) -> Tensor:
            if self.training:
                return super().forward(weight)
            raise RuntimeError("no evaluation")

    model = nn.Sequential(nn.Linear(6, 5))
    parametrize.register_parametrization(model[0], "weight", Broken(5))
    with pytest.raises(SiteError, match="no evaluation"):
        sl.attach(model, "0", tmp_path / "run", announce=False)
