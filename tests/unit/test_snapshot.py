"""The snapshot that dry edits go back to, by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from stabilitylab.watching.snapshot import RandomStates, take
from tests.dry_edits import Model, assert_same, state
from tests.loops import CANARY, make_model


def test_a_snapshot_names_what_differs() -> None:
    model = Model()
    snapshot = take({"": model})
    assert snapshot.differences() == []
    with torch.no_grad():
        model.fc.weight[0, 0] += 1
        model.frozen[1] = 0.0  # it was -0.0
    model.seen = model.seen.clone()  # the same bits in another tensor: who holds the old one would see no change
    assert set(snapshot.differences()) == {"", "fc.weight", "frozen"}
    assert snapshot.put_back() == []
    assert model.tied.weight is model.fc.weight


class PlusOne(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


OTHER_WAYS: dict[str, Callable[[nn.Module], object]] = {
    "cast": lambda model: model.half(),
    "moved": lambda model: model.to("meta"),
    "parametrised": lambda model: register_parametrization(model[0], "weight", PlusOne()),
    "overridden": lambda model: setattr(model[0], "forward", lambda x: x),
    "replaced": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(16, 8))),
    "given other memory": lambda model: setattr(model[0].weight, "data", torch.zeros(2, 2)),
}


@pytest.mark.parametrize("how", OTHER_WAYS)
def test_other_ways_to_change_a_layer_are_undone(how: str) -> None:
    model = make_model().eval()
    before, parameters, said = state(model), list(model.parameters()), model(CANARY)
    snapshot = take({"": model})
    OTHER_WAYS[how](model)
    assert snapshot.differences()
    assert snapshot.put_back() == []
    assert_same(model, before)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(CANARY), said)


def test_each_generator_goes_on_from_where_it_was() -> None:
    own: list[Any] = [np.random.default_rng(1), random.Random(2), np.random.RandomState(3), torch.Generator()]

    def draw() -> list[float]:
        first = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
        return [*first, own[0].random(), own[1].random(), own[2].rand(), float(torch.rand((), generator=own[3]))]

    states = RandomStates(own)
    first = draw()
    assert first != draw()
    states.put_back()
    assert draw() == first
