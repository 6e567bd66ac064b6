"""What a trace proves of a cause, in an edit whose gradients nobody read: the first one, before sites are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from tests.loops import CANARY, make_model

Loss = Callable[[Tensor], Tensor]


def diagnosis_of(tmp_path: Path, loss: Loss, *, model: nn.Module | None = None, scale: float = 0.01) -> sl.Diagnosis:
    """Of a loop whose sites are found by its first edit, which steps by scale · g · (‖g‖ / ‖g‖)."""
    model = model or make_model()
    parameters = list(model.parameters())
    with sl.attach(model, run=tmp_path / "run", canary=CANARY, trace=True, announce=False) as monitor:
        for _ in range(4):
            with monitor.edit():
                gradients = torch.autograd.grad(loss(model(torch.randn(2, 5, 8))), parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        found = torch.zeros_like(parameter) if gradient is None else gradient
                        size = scale * found.norm()
                        parameter -= found * size / size
    return sl.load(tmp_path / "run").diagnosis()


def test_a_loss_that_sends_nan_back_is_not_the_steps_fault(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, lambda logits: torch.log(logits * 0).sum())
    assert (found.verdict, found.first_nonfinite_edit) == ("non-finite", 1)
    assert (found.cause, found.confidence) == ("loss-not-finite", "medium")
    assert found.operation is not None
    assert found.operation.went_back


def test_a_step_that_divides_0_by_0_is_still_the_steps(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, lambda logits: logits.square().mean(), scale=0.0)
    assert (found.cause, found.first_nonfinite_edit) == ("optimiser-nan", 1)
    assert found.operation is not None
    assert not found.operation.went_back


class Root(nn.Module):
    """√0 · x."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x * 0) + x


def test_a_layers_own_backward_is_not_the_losss_fault(tmp_path: Path) -> None:
    model = nn.Sequential(*make_model(), Root())
    found = diagnosis_of(tmp_path, lambda logits: logits.square().mean(), model=model)
    assert found.first_nonfinite_edit == 1
    assert found.operation is not None
    assert (found.operation.module, found.operation.went_back) == ("4", True)
    assert found.cause not in ("loss-not-finite", "optimiser-nan")


@pytest.mark.parametrize("sites", ["0", "3"])
def test_what_the_model_held_before_an_edit_is_named_where_the_edit_took_it_in(tmp_path: Path, sites: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.attach(model, sites, tmp_path / "run", canary=CANARY, trace=True, announce=False) as monitor:
        for number in range(1, 5):
            if number == 3:
                with torch.no_grad():
                    model[3].weight[0, 0] = torch.nan
            with monitor.edit():
                optimizer.zero_grad()
                model(torch.randn(2, 5, 8)).square().mean().backward()
                optimizer.step()
    found = sl.load(tmp_path / "run").diagnosis()
    assert found.first_nonfinite_edit == 3
    assert (found.cause == "state-spoilt") is (sites == "0")
    if sites == "0":
        assert found.first_bad_site == "3.weight"
