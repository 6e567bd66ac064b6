"""A weight's singular values and subspaces against full decompositions, and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes.absorption import Absorption, AbsorptionPass, reduce_absorption
from stabilitylab.probes.top_singular import SpectralNorm, TopSingular, follow, start_direction, update_direction
from stabilitylab.probes.weight_spectrum import ConditionNumber, WeightSpectrum, gram_of, spectrum_of_weight
from stabilitylab.probes.weight_subspace import (
    LeadingSubspace,
    SubspaceOverlap,
    compare_subspaces,
    leading_subspace,
)
from tests.numbers import DTYPES, numpy64, random, seeds


def measured(weight: Tensor) -> dict[str, object]:
    return dict(ConditionNumber().compute(WeightSpectrum(spectrum_of_weight(weight, gram_of(weight)).numpy())))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_all_singular_values(dtype: torch.dtype, seed: int, rows: int, columns: int) -> None:
    weight = random(seed, rows, columns, dtype=dtype)
    exact = scipy.linalg.svdvals(numpy64(weight))
    found = spectrum_of_weight(weight, gram_of(weight)).numpy()
    large = exact > 1e-6 * exact[0]
    np.testing.assert_allclose(found[large], exact[large], rtol=1e-5)
    if exact[-1] > 1e-6 * exact[0]:
        assert measured(weight)["weight.condition_number"] == pytest.approx(exact[0] / exact[-1], rel=1e-5)


@pytest.mark.parametrize("spread", [2.0, 5.0, 9.0])
def test_ill_conditioned_weights_are_not_left_to_a_gram_matrix(spread: float) -> None:
    left, right = (np.linalg.qr(numpy64(random(k, 40, 40)))[0] for k in (1, 2))
    weight = torch.from_numpy((left * np.logspace(0, -spread, 40)) @ right)
    assert measured(weight)["weight.condition_number"] == pytest.approx(10**spread, rel=1e-5)


def test_condition_in_closed_form() -> None:
    assert measured(torch.diag(torch.tensor([8.0, 4.0, 2.0])))["weight.condition_number"] == pytest.approx(4)
    assert measured(torch.zeros(3, 2)) == {}
    assert measured(torch.diag(torch.tensor([1.0, 0.0])))["weight.condition_number"] == math.inf
    weight = torch.ones(3, 3)
    weight[1, 1] = math.inf
    assert math.isnan(measured(weight)["weight.condition_number"])  # type: ignore[arg-type]


# -- the largest singular value, followed ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_the_start(dtype: torch.dtype, seed: int, rows: int, columns: int) -> None:
    weight = random(seed, rows, columns, dtype=dtype)
    exact = np.linalg.norm(numpy64(weight), 2)
    value, direction = start_direction(weight)
    assert value.item() == pytest.approx(exact, rel=1e-3)
    image = np.linalg.norm(numpy64(weight) @ numpy64(direction))
    assert image == pytest.approx(exact, rel=1e-3)


def followed(weight: Tensor, previous: Tensor, direction: Tensor, hottest: bool) -> tuple[float, Tensor]:
    row = int((weight - previous).double().square().sum(dim=1).argmax())
    change = weight - previous
    update = update_direction(change[row : row + 1] if hottest else change)
    value, found = follow(weight, (direction, update), weight.abs().max())
    return value.item(), found


SPIKES = ["new direction", "one row", "dense", "the same direction", "against it"]


@pytest.mark.parametrize("hottest", [True, False], ids=["rows that moved most", "all rows"])
@pytest.mark.parametrize("kind", SPIKES)
@pytest.mark.parametrize("shape", [(96, 200), (200, 96)], ids=str)
@pytest.mark.parametrize("factor", [0.3, 3.0, 30.0])
def test_right_at_the_edit_of_a_spike(shape: tuple[int, int], kind: str, factor: float, hottest: bool) -> None:
    previous = random(1, *shape, scale=0.02)
    value, direction = start_direction(previous)
    rank_one = torch.outer(random(2, shape[0]), random(3, shape[1]))
    change = {
        "new direction": rank_one,
        "one row": torch.outer(torch.eye(shape[0])[5], random(3, shape[1])),
        "dense": random(4, *shape),
        "the same direction": torch.outer(previous @ direction, direction),
        "against it": -torch.outer(previous @ direction, direction),
    }[kind]
    change = change * (factor * value.item() / torch.linalg.matrix_norm(change, 2))
    weight = previous + change
    exact = np.linalg.norm(numpy64(weight), 2)
    found, _ = followed(weight, previous, direction, hottest)
    assert found == pytest.approx(exact, rel=0.01)


def test_a_direction_that_grows_edit_by_edit_is_not_missed() -> None:
    weight = random(1, 96, 200, scale=0.02)
    value, direction = start_direction(weight)
    step = torch.outer(random(2, 96), random(3, 200))
    step = step * (0.08 * value.item() / torch.linalg.matrix_norm(step, 2))
    for _ in range(40):
        previous, weight = weight, weight + step
        found, direction = followed(weight, previous, direction, hottest=True)
        assert found == pytest.approx(np.linalg.norm(numpy64(weight), 2), rel=0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_of_extreme_size_are_followed(scale: float) -> None:
    previous, weight = random(1, 30, 40, scale=scale), random(2, 30, 40, scale=scale)
    found, _ = followed(weight, previous, torch.ones(40), hottest=True)
    assert found == pytest.approx(np.linalg.norm(numpy64(weight), 2), rel=0.01)


def test_a_weight_that_is_zero_or_lost() -> None:
    assert start_direction(torch.zeros(30, 40))[0] == 0
    assert torch.isnan(start_direction(torch.full((30, 40), math.nan))[0])
    assert SpectralNorm().compute(TopSingular(0.0, 0.0)) == {"weight.spectral_norm": 0.0}
    weight = random(1, 30, 40)
    weight[3, 4] = math.inf
    found, _ = followed(weight, random(1, 30, 40), torch.ones(40), hottest=True)
    assert not math.isfinite(found)


def test_stable_rank_in_closed_form() -> None:
    readings = SpectralNorm().compute(TopSingular(8.0, math.sqrt(84)))
    assert readings["weight.stable_rank"] == pytest.approx(84 / 64)


# -- subspaces ------------------------------------------------------------------------------------------------------


def overlap(original: Tensor, now: Tensor) -> float:
    seen = LeadingSubspace(
        compare_subspaces(leading_subspace(gram_of(original)), leading_subspace(gram_of(now))).numpy()
    )
    value = SubspaceOverlap().compute(seen)["weight.subspace_overlap"]
    assert isinstance(value, float)
    return value


@given(seed=seeds, rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_overlap(seed: int, rows: int, columns: int) -> None:
    weight = random(seed, rows, columns) * torch.logspace(0, -2, columns)
    other = weight + 0.3 * random(seed + 1, rows, columns)
    count = min(8, rows, columns)
    bases = []
    for matrix in (numpy64(weight), numpy64(other)):
        wide = matrix if rows <= columns else matrix.T
        bases.append(np.linalg.svd(wide, full_matrices=False)[0][:, :count])
    expected = np.sum((bases[0].T @ bases[1]) ** 2) / count
    assert overlap(weight, other) == pytest.approx(expected, abs=1e-3)
    assert overlap(weight, weight) == pytest.approx(1, abs=1e-6)


def test_overlap_in_closed_form() -> None:
    falling = torch.diag(torch.logspace(2, -2, 60))
    assert overlap(falling, 5 * falling) == pytest.approx(1)
    assert overlap(falling, falling.flip(0, 1)) == pytest.approx(0, abs=1e-9)
    half = falling.clone()
    half[range(4, 8), range(4, 8)] = 0  # four of the leading eight are gone
    assert overlap(falling, half) == pytest.approx(0.5)
    assert math.isnan(overlap(falling, torch.full((60, 60), math.nan)))


# -- what the dtype swallows ----------------------------------------------------------------------------------------


def swallowed(update: Tensor, weight: Tensor, previous: Tensor) -> dict[str, object]:
    packed = reduce_absorption(update, weight, previous)
    return dict(Absorption().compute(AbsorptionPass.from_host(packed.numpy())))


@given(seed=seeds, scale=st.sampled_from([1e-5, 1e-3, 1e-2, 1.0]))
def test_swallowed_share(seed: int, scale: float) -> None:
    previous = random(seed, 9, 7, dtype=torch.bfloat16)
    update = random(seed + 1, 9, 7, scale=scale)
    update[:2] = 0
    weight = (previous.float() + update).to(torch.bfloat16)
    meant = [(i, j) for i in range(9) for j in range(7) if update[i, j] != 0]
    lost = [at for at in meant if weight[at].item() == previous[at].item()]
    assert swallowed(update, weight, previous) == {"update.swallowed_share": len(lost) / len(meant)}
    assert swallowed(update.T, weight, previous) == swallowed(update, weight, previous)


def test_bfloat16_swallows_what_is_too_small_for_it() -> None:
    ones = torch.ones(3, 4, dtype=torch.bfloat16)
    change = torch.full((3, 4), 0.003)
    assert swallowed(change, (ones.float() + change).to(torch.bfloat16), ones) == {"update.swallowed_share": 1.0}
    assert swallowed(torch.zeros(3, 4), ones, ones) == {}
    with pytest.raises(ValueError, match=r"\[5\]; expected \[3, 4\]"):
        reduce_absorption(torch.ones(5), ones, ones)
