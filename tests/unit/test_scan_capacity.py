"""How far a layer can be moved until the canary is lost: which updates are tried, the ends, and that nothing stays."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.acting.scanning.answers import Original, original_of
from stabilitylab.acting.scanning.capacity import MOST_OCTAVES, capacities, first_lost
from stabilitylab.analysis.limits import KL_COLLAPSED
from stabilitylab.errors import UsageError
from stabilitylab.record.scanned import CapacityScan
from stabilitylab.watching.sites import find_sites

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])


class Small(nn.Module):
    """Two layers between words and logits, with dropout, and a buffer that each forward in training counts up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 8)
        self.unused = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.drop(torch.relu(self.first(self.embed(input_ids))))
        logits: Tensor = self.head(self.second(hidden))
        return logits


def tried(
    model: nn.Module, name: str, updates: Sequence[Tensor], original: Original | None = None, **given: Any
) -> CapacityScan:
    (site,) = find_sites(model, name)
    asked = original or original_of(model, IDS)
    (found,) = capacities(model, asked, {site: updates}, limit=KL_COLLAPSED, **given)
    return found


def noise(model: nn.Module, name: str, count: int, size: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = model.get_parameter(f"{name}.weight").shape
    return [size * torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_model_and_random_numbers_are_as_before(dtype: torch.dtype) -> None:
    model = Small().to(dtype).train()
    with torch.no_grad():
        model.unused.weight[0, :2] = torch.tensor([math.nan, -0.0])
    bits = {
        name: tensor.view(torch.uint8).clone() if tensor.dim() else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    states = torch.get_rng_state(), random.getstate()
    kept = dict(model.named_parameters())
    gradient = model.first.weight.grad = torch.ones_like(model.first.weight)
    found = tried(model, "first", noise(model, "first", 2))
    assert 0 < found.steps < math.inf
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor, bits[name]), name
    assert dict(model.named_parameters()) == kept
    assert model.first.weight.grad is gradient
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_layer_without_effect_takes_any_number() -> None:
    model = Small()
    found = tried(model, "unused", noise(model, "unused", 2))
    assert (found.steps, found.low, found.high) == (math.inf, math.inf, math.inf)


def test_twice_the_update_is_half_the_steps() -> None:
    model = Small()
    one = tried(model, "second", noise(model, "second", 1, 0.1))
    two = tried(model, "second", noise(model, "second", 1, 0.2))
    assert one.steps == pytest.approx(2 * two.steps)
    assert two.update_norm == pytest.approx(2 * one.update_norm)


def test_at_most_eight_updates_are_tried_the_first_and_the_last_among_them() -> None:
    model = Small()
    everything = noise(model, "first", 12)
    found = tried(model, "first", everything)
    assert found.updates == 8
    ends = [tried(model, "first", [everything[n]]).steps for n in (0, 11)]
    assert found.low <= min(ends) * 2**0.125
    assert found.high >= max(ends) / 2**0.125
    assert found.low <= found.steps <= found.high


def test_an_overflow_on_the_way_is_a_loss() -> None:
    model = Small().to(torch.float16)
    with torch.no_grad():
        model.head.weight.zero_()  # the answer would never change
        model.head.bias.zero_()
    huge = [torch.full((16, 16), 1000.0)]
    found = tried(model, "second", huge)
    assert found.steps < 66  # 65504 is the end of float16


def test_sites_without_an_update_are_left_out_and_progress_is_told() -> None:
    model = Small()
    first, second, unused = find_sites(model, ["first", "second", "unused"])
    told: list[tuple[int, int]] = []
    found = capacities(
        model,
        original_of(model, IDS),
        {first: noise(model, "first", 2), second: noise(model, "second", 1), unused: []},
        limit=KL_COLLAPSED,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [capacity.site for capacity in found] == ["first", "second"]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_model_that_answers_nonsense_before_any_edit_is_told() -> None:
    model = Small()
    original = original_of(model, IDS)
    assert original.is_sound
    with torch.no_grad():
        model.head.bias[3] = math.nan
    with pytest.raises(UsageError, match="not finite before any edit"):
        tried(model, "first", noise(model, "first", 1), original_of(model, IDS))


def test_what_the_model_raises_passes_through_after_all_was_put_back() -> None:
    model = Small()
    original = original_of(model, IDS)
    before = model.first.weight.detach().clone()

    def breaks(module: nn.Module, args: object) -> None:
        raise RuntimeError("the user's own")

    handle = model.second.register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match="the user's own"):
        tried(model, "first", noise(model, "first", 1), original)
    handle.remove()
    assert torch.equal(model.first.weight, before)


def test_where_every_step_is_lost_it_is_the_smallest() -> None:
    assert first_lost(lambda step: True) == 2.0**-MOST_OCTAVES
    assert first_lost(lambda step: False) == math.inf
