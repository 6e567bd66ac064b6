"""Layers whose weight is computed anew from another parameter: that one is watched, under the layer's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import stabilitylab as sl
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


def test_weight_norm_has_two_parameters_under_their_own_names() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    names = [site.name for site in find_sites(model, "0.*weight*")]
    assert names == ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    assert all(locate(model, site) is not None for site in find_sites(model, "0.*"))
