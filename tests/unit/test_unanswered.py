"""Layers whose own calls are never seen, and weights that belong to no product: what is measured of them is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import stabilitylab as sl
from stabilitylab.record.note_kinds import LAYER_SILENT


def said(run: Path) -> list[str]:
    return [note.says for note in sl.load(run).notes if note.kind == LAYER_SILENT]


def test_of_layers_under_vmap_it_is_said_once_why_nothing_was_seen_inside(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, {"0.weight": weight}, (x[None],))
        return out.pow(2).mean()

    with sl.attach(model, "[01]", tmp_path / "run") as monitor:
        for _ in range(2):
            with monitor.edit():
                each = vmap(grad(loss), in_dims=(None, 0))(model[0].weight.detach(), torch.randn(3, 4))
                model[0].weight.data -= 0.1 * each.mean(0)
    (says,) = said(tmp_path / "run")
    assert says.startswith("0: ")  # layer 1 was not edited
    assert "vmap" in says


def test_a_fused_operation_that_takes_the_weights_is_said(tmp_path: Path) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "out": nn.Linear(8, 2)})
    model.forward = lambda x: model["out"](attention(x, x, x)[0])  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sl.attach(model, ["*out_proj", "out"], tmp_path / "run", announce=False) as monitor:
        for _ in range(4):
            with monitor.edit():
                optimizer.zero_grad()
                model(torch.randn(2, 3, 8)).pow(2).mean().backward()
                optimizer.step()
    (says,) = said(tmp_path / "run")
    assert says.startswith("attention.out_proj: ")
    assert "fused" in says
    series = sl.load(tmp_path / "run").series("gradient.norm", "attention.out_proj")
    assert series[-1] == pytest.approx(float(attention.out_proj.weight.grad.norm()))


def test_of_layers_that_answer_nothing_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with sl.attach(model, "0", tmp_path / "run") as monitor:
        for _ in range(5):
            with monitor.edit(), torch.no_grad():
                model(torch.randn(2, 4))
                model[0].weight += 0.01
    assert not said(tmp_path / "run")


class Experts(nn.Module):
    """The weights of all experts in one tensor, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.down_proj)


@pytest.mark.parametrize(
    ("layer", "site"),
    [(Experts(), "layer.down_proj"), (nn.Embedding(5, 4), "layer"), (nn.Linear(4, 4), "layer.bias")],
    ids=["experts", "embedding", "bias"],
)
def test_a_weight_that_belongs_to_no_product_has_the_norm_of_its_gradient(
    tmp_path: Path, layer: nn.Module, site: str
) -> None:
    model: Any = nn.ModuleDict({"layer": layer, "out": nn.Linear(4, 2)})
    model.forward = lambda x: model["out"](layer(x))
    x = torch.tensor([1, 4, 2]) if isinstance(layer, nn.Embedding) else torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sl.attach(model, site, tmp_path / "run", announce=False) as monitor:
        for _ in range(3):
            with monitor.edit():
                optimizer.zero_grad()
                model(x).pow(2).mean().backward()
                optimizer.step()
    run, weight = sl.load(tmp_path / "run"), dict(model.named_parameters())
    truth = weight.get(site, weight.get(f"{site}.weight")).grad
    assert run.series("gradient.norm", site)[-1] == pytest.approx(float(truth.norm()), rel=1e-6)
    assert not run.sites_of("gradient.spectrum")
    assert monitor.diagnosis().verdict == "stable"
