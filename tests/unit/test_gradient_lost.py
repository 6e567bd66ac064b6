"""A gradient that is sound after the backward and lost when the optimizer steps with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitylab as sl
from tests.loops import CANARY, make_model

Between = Callable[[nn.Module], object]


def clipped(model: nn.Module) -> object:
    """All gradients, by a norm that is not finite: one that nobody watches has a NaN."""
    other = model.get_parameter("0.bias")
    assert other.grad is not None
    other.grad[0] = torch.nan
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def scaled(model: nn.Module) -> object:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(torch.inf)
    return None


def diagnosis_of(tmp_path: Path, between: Between, lost_at: int) -> sl.Diagnosis:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.attach(model, "3", tmp_path / "run", canary=CANARY, announce=False) as monitor:
        for number in range(1, 7):
            inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(number))
            with monitor.edit():
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                if number == lost_at:
                    between(model)
                optimizer.step()
    return sl.load(tmp_path / "run").diagnosis()


@pytest.mark.parametrize("lost_at", [1, 4])
@pytest.mark.parametrize("between", [clipped, scaled])
def test_what_stands_between_backward_and_step_is_named(tmp_path: Path, between: Between, lost_at: int) -> None:
    found = diagnosis_of(tmp_path, between, lost_at)
    assert (found.cause, found.confidence) == ("gradient-lost-before-step", "high")
    assert (found.first_bad_edit, found.first_bad_site) == (lost_at, "3")
    assert "optimiser-nan" not in {link.cause for link in found.causes}


def test_what_comes_out_of_the_backward_like_that_is_not_laid_on_it(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.attach(model, "3", tmp_path / "run", canary=CANARY, announce=False) as monitor, monitor.edit():
        (model(torch.randn(2, 5, 8)).square().mean() * torch.nan).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert sl.load(tmp_path / "run").diagnosis().cause == "loss-not-finite"
