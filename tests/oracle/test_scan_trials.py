"""A second implementation of what a dtype would do to each entry, and of the step at which a canary is lost."""

from __future__ import annotations

import math
import struct
from typing import Final

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from stabilitylab.acting.scanning.answers import original_of
from stabilitylab.acting.scanning.capacity import RESOLUTION, capacities, first_lost
from stabilitylab.acting.scanning.precision import PrecisionCount, dtype_called
from stabilitylab.watching.sites import find_sites

LIMIT: Final = 4.0
"""Nats."""


def rounded(value: float, name: str) -> float:
    """To nearest, ties to even, entry by entry, from float32."""
    if name == "float16":
        try:
            return float(struct.unpack("<e", struct.pack("<e", value))[0])
        except OverflowError:
            return math.copysign(math.inf, value)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if name == "bfloat16" and math.isfinite(value):
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_counts_agree_with_rounding_entry_by_entry(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.empty(40, 50).uniform_(-14, 8, generator=generator)
    weight = torch.randn(40, 50, generator=generator) * 10**exponents
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 3.4e38, 1e-40, math.inf, math.nan, 2049.0]
    weight.view(-1)[: len(special)] = torch.tensor(special)
    update = weight * 10 ** torch.empty(40, 50).uniform_(-9, 1, generator=generator)
    update[20:, ::3] = 0.0
    update.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    count = PrecisionCount(dtype_called(name))
    count.add(weight)
    count.add_update(weight, update)
    found = count.result()

    values, changes = weight.flatten().tolist(), update.flatten().tolist()
    after = [rounded(value, name) for value in values]
    pairs = [(kept, change) for kept, change in zip(after, changes, strict=True) if change and math.isfinite(kept)]
    with np.errstate(over="ignore"):
        sums = [float(np.float32(kept) + np.float32(change)) for kept, change in pairs]
    assert found.entries == 2000
    assert found.overflowing == sum(
        math.isfinite(old) and not math.isfinite(new) for old, new in zip(values, after, strict=True)
    )
    assert found.vanishing == sum(old != 0 and new == 0 for old, new in zip(values, after, strict=True))
    assert found.updates == len(pairs)
    assert found.swallowed == sum(rounded(total, name) == kept for total, (kept, _) in zip(sums, pairs, strict=True))
    assert 0 < found.swallowed < found.updates
    largest = max(abs(value) for value in values if math.isfinite(value))
    assert found.headroom_bits == pytest.approx(math.log2(torch.finfo(dtype_called(name)).max / largest))


class Table(nn.Module):
    """Two answers to each token: logits are a column of its weight, looked up."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.words = nn.Linear(weight.shape[1], 2, bias=False)
        with torch.no_grad():
            self.words.weight.copy_(weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(input_ids, self.words.in_features).to(self.words.weight.dtype)
        logits: Tensor = self.words(one_hot)
        return logits


def divergence(margin: float, moved: float) -> float:
    """KL in nats between two choices whose logits are `margin` and `moved` apart: in closed form."""
    chance = 1 / (1 + math.exp(-margin))

    def log_chance(apart: float) -> float:
        return float(-np.logaddexp(0.0, -apart))

    return chance * (log_chance(margin) - log_chance(moved)) + (1 - chance) * (log_chance(-margin) - log_chance(-moved))


@pytest.mark.parametrize("size", [1e-3, 0.7, 40.0])
def test_the_step_is_where_the_closed_form_crosses_the_limit(size: float) -> None:
    margins = [3.0, 2.5, 4.0]
    weight = torch.tensor([margins, [0.0, 0.0, 0.0]])
    model = Table(weight)
    directions = [[-1.0, -1.0, -1.0], [-0.2, -1.5, 0.0], [1.0, 1.0, -2.0]]
    updates = [size * torch.tensor([direction, [0.0, 0.0, 0.0]]) for direction in directions]
    (site,) = find_sites(model, "words")
    (found,) = capacities(model, original_of(model, torch.tensor([[0], [1], [2]])), {site: updates}, limit=LIMIT)

    def crossing(direction: list[float]) -> float:
        def over(step: float) -> float:
            moved = [margin + step * size * each for margin, each in zip(margins, direction, strict=True)]
            return sum(map(divergence, margins, moved)) / len(margins) - LIMIT

        return float(brentq(over, 0.0, 1e6 / size))

    steps = sorted(map(crossing, directions))
    within = 2 ** (RESOLUTION / 2) * (1 + 1e-5)  # float32 forms the logits
    for expected, measured in zip(steps, [found.low, found.steps, found.high], strict=True):
        assert expected / within <= measured <= expected * within
    assert found.updates == 3
    norms = sorted(size * math.hypot(*direction) for direction in directions)
    assert found.update_norm == pytest.approx(norms[1])


@pytest.mark.parametrize("start", [-25, -3, 0, 4, 25])
@pytest.mark.parametrize("crossing", [3e-6, 0.11, 1.0, 1.7, 500.0, 9e5])
def test_a_crossing_is_found_from_wherever_the_search_starts(crossing: float, start: int) -> None:
    tried: list[float] = []

    def is_lost(step: float) -> bool:
        tried.append(step)
        return step >= crossing

    found = first_lost(is_lost, start)
    assert abs(math.log2(found / crossing)) <= RESOLUTION / 2
    assert len(tried) <= 2 + abs(max(-19, min(19, start)) - math.log2(crossing)) + math.log2(1 / RESOLUTION) + 1
