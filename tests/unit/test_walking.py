"""The walk over a model against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from stabilitylab.watching import walking


class Shared(nn.Module):
    """Modules and tensors that are met twice, children that are missing, buffers that nobody saves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.again = self.first
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.first[0].weight  # type: ignore[assignment]
        self.none = None
        self.register_module("missing", None)
        self.register_parameter("absent", None)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("same", self.mask)
        self.register_buffer("both", self.tied.weight.detach())


def test_everything_comes_in_torchs_order() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))  # type: ignore[no-untyped-call]
    for model in (Shared(), nn.Linear(2, 2), nn.Sequential(), scripted, nn.Sequential(scripted, Shared())):
        assert walking.modules_of(model) == list(model.modules())
        assert walking.named_modules_of(model) == list(model.named_modules())
        named = walking.named_modules_of(model)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        found = walking.named_tensors_of(named)
        assert [name for name, _ in found] == [name for name, _ in tensors]
        assert all(left is right for (_, left), (_, right) in zip(found, tensors, strict=True)) or model is scripted


def test_a_walk_goes_on_from_another() -> None:
    model, met = Shared(), set[nn.Module]()
    met.add(model.tied)
    expected = list(model.named_modules({model.tied}, "editor"))
    assert walking.named_modules_of(model, "editor", met) == expected
    assert walking.named_modules_of(model, "editor", met) == []
