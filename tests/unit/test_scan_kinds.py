"""A scan of live models of every kind: tied, pruned, quantised, offloaded, compiled; what can't be read is named."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import stabilitylab as sl
from stabilitylab.errors import UsageError
from stabilitylab.watching import attaching

IDS = torch.tensor([[0, 1, 2], [2, 3, 4]])


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids))
        return out


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def tied() -> tuple[nn.Module, str, str]:
    return Tied(), "head", "embed.weight"


def pruned() -> tuple[nn.Module, str, str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.random_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    return model, "0", "0.weight_orig"


def parametrised() -> tuple[nn.Module, str, str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model, "0", "0.parametrizations.weight.original"


@pytest.mark.parametrize("make", [tied, pruned, parametrised])
def test_a_site_is_found_whatever_its_weight_is_kept_as(tmp_path: Path, make: Any) -> None:
    model, site, tensor = make()
    figures = sl.scan(model, site).figures
    assert [each.name for each in figures.tensors if each.is_site] == [tensor]
    assert all(each.spectral_norm is not None for each in figures.tensors if each.is_site)
    with sl.attach(model, site, tmp_path / "run", scan=True, announce=False):
        pass
    assert sl.load(tmp_path / "run").manifest["scan"]["sites"] == list(figures.sites)


def test_what_can_t_be_read_is_named_and_the_rest_is_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    model.register_buffer("sparse", torch.eye(4).to_sparse())
    model.register_buffer("whole", torch.ones(4, 4, dtype=torch.int8))
    figures = sl.scan(model).figures
    assert {each.name for each in figures.tensors} == {"0.weight", "0.bias"}
    assert figures.skipped.keys() == {"1.weight", "1.bias", "sparse", "whole"}
    assert "meta" in figures.skipped["1.weight"]
    assert "sparse" in figures.skipped["sparse"]


def test_a_model_of_nothing_that_can_be_read_says_why() -> None:
    with pytest.raises(UsageError, match="meta device"):
        sl.scan(nn.Linear(2, 2, device="meta"))
    with pytest.raises(UsageError, match="holds no tensor"):
        sl.scan(nn.ReLU())


def test_a_canary_that_is_not_finite_costs_the_trials_and_nothing_else() -> None:
    model = Tied()
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan

    def edit(edited: nn.Module, _: object) -> None:
        with torch.no_grad():
            edited.get_parameter("embed.weight").add_(0.01)

    scanned = sl.scan(model, canary=IDS, apply=edit, requests=range(8), precision="fp16")
    assert {caution.rule for caution in scanned.of_urgency("fatal")} == {"nonfinite-weight", "nonfinite-activation"}
    assert not scanned.figures.capacities
    assert "not finite" in scanned.figures.skipped["how far layers can be moved"]
    assert scanned.figures.precisions[0].updates


def test_requests_need_a_function_that_edits() -> None:
    with pytest.raises(UsageError, match="without apply="):
        sl.scan(Tied(), requests=[1])


def test_a_compiled_model_is_compiled_no_more_often_than_without_a_scan() -> None:
    def graphs(scanned: bool) -> int:
        torch._dynamo.reset()
        stats: Counter[str] = torch._dynamo.utils.counters["stats"]
        stats.clear()
        compiled = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="eager")
        compiled(torch.ones(2, 4))
        if scanned:
            figures = sl.scan(compiled, canary=torch.ones(2, 4), precision="bf16").figures
            assert "compiled" in figures.skipped["what the canary makes of the layers"]
            assert "compiled" in str(figures.precisions[0].error)
        compiled(torch.ones(2, 4))
        return stats["unique_graphs"]

    assert graphs(True) == graphs(False) + CANARY_GRAPHS


CANARY_GRAPHS = 0 if hasattr(torch.compiler, "set_stance") else 1
"""Before torch 2.6 the canary can't be run uncompiled: without gradients, it is another call to the compiler."""


def test_a_scan_that_fails_stops_no_loop_and_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ArithmeticError("bug of ours")

    monkeypatch.setattr(attaching, "figures", broken)
    model = Tied()
    with sl.attach(model, "embed", tmp_path / "run", scan=True, announce=False) as monitor, monitor.edit():
        pass
    run = sl.load(tmp_path / "run")
    assert len(run.edits) == 2
    assert [note.kind for note in run.notes if "bug of ours" in note.says] == ["scan-off"]


def test_a_canary_that_replays_leaves_the_rest_of_the_scan(tmp_path: Path) -> None:
    with sl.attach(Tied(), "embed", tmp_path / "run", scan=True, canary="replay", announce=False):
        pass
    assert sl.load(tmp_path / "run").manifest["scan"]["tensors"]


def test_layers_that_give_a_single_number_are_passed_over() -> None:
    class Loss(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits.mean()

    class WithLoss(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.loss = Loss()

        def forward(self, input_ids: Tensor) -> Tensor:
            logits = super().forward(input_ids)
            self.loss(logits)
            return logits

    layers = {each.layer for each in sl.scan(WithLoss(), canary=IDS).figures.activations}
    assert layers == {"embed", "head"}
