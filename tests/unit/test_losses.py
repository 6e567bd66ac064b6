"""The model's own loss inside an edit: the first, the last, and what the loop's objective makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from tests.loops import make_model

LOSS, LAST, WEIGHT = "logits.loss", "logits.loss_last", "logits.loss_weight"


class Answering(nn.Module):
    """Gives logits and a loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Tensor, as_dict: bool = False) -> Any:
        logits = self.net(x)
        given = {"loss": logits.square().mean(), "logits": logits}
        return given if as_dict else SimpleNamespace(**given)


def readings(folder: Path, edit: Callable[[Answering, Tensor], object]) -> dict[str, float]:
    """What one edit shows of its losses."""
    torch.manual_seed(0)
    model = Answering()
    with sl.attach(model, "net.*", folder / "run", announce=False) as monitor, monitor.edit():
        edit(model, torch.randn(4, 8))
    row = sl.load(folder / "run").edits[-1].row.readings
    return {metric: float(row[metric, "model"][0]) for metric in (LOSS, LAST, WEIGHT) if (metric, "model") in row}


def plain(model: Answering, x: Tensor) -> None:
    model(x).loss.backward()


def in_a_dict(model: Answering, x: Tensor) -> None:
    (0.5 * model(x, as_dict=True)["loss"]).backward()


def up(model: Answering, x: Tensor) -> None:
    (-model(x).loss).backward()


def retaining(model: Answering, x: Tensor) -> None:
    forget, retain = model(x).loss, model(-x).loss
    (3.0 * retain - 2.0 * forget).backward()


def accumulating(model: Answering, x: Tensor) -> None:
    for row in x:
        (model(row[None]).loss / len(x)).backward()


def infinite(model: Answering, x: Tensor) -> None:
    (model(x).loss * torch.tensor(3e38) * 10.0).backward()


def nan_then_sound(model: Answering, x: Tensor) -> None:
    (model(x).loss * float("nan")).backward()
    model(x).loss.backward()


def of_its_own(model: Answering, x: Tensor) -> None:
    model(x).logits.abs().mean().backward()


def without_gradients(model: Answering, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def differentiated_by_torch(model: Answering, x: Tensor) -> None:
    torch.autograd.grad(4.0 * model(x).loss, list(model.parameters()))


@pytest.mark.parametrize(
    ("edit", "weight"),
    [
        (plain, 1.0),
        (in_a_dict, 0.5),
        (up, -1.0),
        (retaining, -2.0),
        (accumulating, 0.25),
        (infinite, float("inf")),
        (nan_then_sound, float("nan")),
        (differentiated_by_torch, 4.0),
        (of_its_own, None),
        (without_gradients, None),
    ],
)
def test_what_the_objective_weighs_the_loss_with(
    tmp_path: Path, edit: Callable[[Answering, Tensor], object], weight: float | None
) -> None:
    found = readings(tmp_path, edit)
    assert LOSS in found
    assert found.get(WEIGHT) == (None if weight is None else pytest.approx(weight, nan_ok=True))


def test_the_last_loss_is_told_beside_the_first_and_not_where_there_is_one(tmp_path: Path) -> None:
    given: list[float] = []

    def descend(model: Answering, x: Tensor) -> None:
        for _ in range(3):
            loss = model(x).loss
            given.append(float(loss.detach()))
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
                loss.zero_()  # what the loop does with it afterwards is its own

    found = readings(tmp_path, descend)
    assert (found[LOSS], found[LAST]) == (pytest.approx(given[0]), pytest.approx(given[2]))
    assert LAST not in readings(tmp_path / "once", plain)


def test_a_backward_after_the_edit_is_not_heard(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    found = readings(tmp_path, lambda model, x: kept.append(model(x).loss))
    kept[0].backward()
    assert LOSS in found
    assert WEIGHT not in found
