"""The denominator and the value of rank-one updates, against naive implementations that share no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes.rank_one import (
    ClampHits,
    Denominator,
    TargetValue,
    UpdateDenominator,
    ValueClamp,
    ValueRatio,
    reduce_denominator,
    reduce_target,
)
from tests.numbers import DTYPES, numpy64, random, seeds

SPOILT = [math.nan, math.inf, -math.inf]
scales = st.sampled_from([1e-3, 1.0, 1e3])


def norm(values: np.ndarray) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.reshape(-1)))


def denominator(key: Tensor, direction: Tensor) -> dict:
    seen = Denominator.from_host(reduce_denominator(key, direction).numpy())
    return dict(UpdateDenominator().compute(seen))


def value_ratio(target: Tensor, initial: Tensor) -> dict:
    return dict(ValueRatio().compute(TargetValue.from_host(reduce_target(target, initial).numpy())))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, edits=st.integers(0, 5), width=st.integers(1, 30), scale=scales)
def test_denominator(dtype: torch.dtype, seed: int, edits: int, width: int, scale: float) -> None:
    shape = (edits, width) if edits else (width,)
    key, direction = random(seed, *shape, dtype=dtype, scale=scale), random(seed + 1, *shape, dtype=dtype)
    found = denominator(key, direction)
    pairs = list(zip(numpy64(key).reshape(-1, width), numpy64(direction).reshape(-1, width), strict=True))
    products = [sum(a * b for a, b in zip(k, u, strict=True)) for k, u in pairs]
    sizes = [norm(k) * norm(u) for k, u in pairs]
    ratios = [abs(p) / s if s else 0.0 for p, s in zip(products, sizes, strict=True)]
    worst = int(np.argmin(ratios))
    assert found["editor.denominator"] == pytest.approx(products[worst], rel=1e-9, abs=1e-12 * max(sizes))
    if sizes[worst]:
        assert found["editor.denominator_ratio"] == pytest.approx(ratios[worst], rel=1e-9, abs=1e-12)
    else:
        assert "editor.denominator_ratio" not in found


def test_closed_forms_of_the_denominator() -> None:
    orthogonal = denominator(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert orthogonal == {"editor.denominator": 0.0, "editor.denominator_ratio": 0.0}
    assert denominator(torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])) == {
        "editor.denominator": -50.0,
        "editor.denominator_ratio": 1.0,
    }
    assert denominator(torch.zeros(3), torch.ones(3)) == {"editor.denominator": 0.0}
    huge = denominator(torch.full((2,), 3e38), torch.full((2,), 3e38))
    assert huge["editor.denominator_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("value", SPOILT)
def test_a_denominator_that_is_not_finite_wins(value: float) -> None:
    key, direction = random(0, 4, 3), random(1, 4, 3)
    key[2, 1] = value
    assert not math.isfinite(denominator(key, direction)["editor.denominator"])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, edits=st.integers(0, 5), width=st.integers(1, 30), scale=scales)
def test_value_ratio(dtype: torch.dtype, seed: int, edits: int, width: int, scale: float) -> None:
    shape = (edits, width) if edits else (width,)
    target, initial = random(seed, *shape, dtype=dtype, scale=scale), random(seed + 1, *shape, dtype=dtype)
    pairs = zip(numpy64(target).reshape(-1, width), numpy64(initial).reshape(-1, width), strict=True)
    sizes = [(norm(after), norm(before)) for after, before in pairs]
    if all(before for _, before in sizes):
        expected = max(after / before for after, before in sizes)
        assert value_ratio(target, initial)["editor.value_ratio"] == pytest.approx(expected, rel=1e-9)


def test_closed_forms_of_the_value_ratio() -> None:
    assert value_ratio(torch.tensor([6.0, 8.0]), torch.tensor([0.0, 5.0])) == {"editor.value_ratio": 2.0}
    assert value_ratio(torch.ones(2), torch.zeros(2)) == {}
    assert value_ratio(torch.zeros(2), torch.zeros(2)) == {}
    assert value_ratio(torch.tensor([[1.0], [9.0]]), torch.tensor([[1.0], [3.0]])) == {"editor.value_ratio": 3.0}
    assert value_ratio(torch.tensor([math.inf]), torch.ones(1)) == {"editor.value_ratio": math.inf}
    assert math.isnan(value_ratio(torch.tensor([[math.nan], [9.0]]), torch.ones(2, 1))["editor.value_ratio"])


@pytest.mark.parametrize("reduce", [reduce_denominator, reduce_target])
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (3,)), ((0,), (0,)), ((), ()), ((1, 2, 3), (1, 2, 3))])
def test_vectors_that_do_not_fit_are_refused(reduce: object, shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected \[width\] or \[edits, width\]"):
        reduce(torch.ones(shapes[0]), torch.ones(shapes[1]))


def test_clamp_hits_are_passed_on() -> None:
    assert ValueClamp().compute(ClampHits(17.0)) == {"editor.clamp_hits": 17.0}
