"""What tests of dry edits share: a plain edit, and whether a model is as it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stabilitylab.record.run import Run
from tests.loops import edit_once

REQUESTS = [f"request {number}" for number in range(30)]


def edit(model: nn.Module, request: object) -> None:
    edit_once(model, rate=0.01)


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    for name, tensor in now.items():
        assert tensor.numpy().tobytes() == before[name].numpy().tobytes(), name


def kinds(run: Run) -> list[str]:
    return [note.kind for note in run.notes]


class Model(nn.Module):
    """With a buffer, tied weights, a NaN and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.fc.weight
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.tensor([1.0, -0.0, float("nan")]), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.long))
        self.names = {"of": ["a", "b"]}
        self.head.weight.grad = torch.full((4, 8), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tied(self.fc(x)))
        return out
