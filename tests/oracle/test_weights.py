"""What is read of weights, against a naive float64 implementation that shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes.weight_pass import WeightPass, norm_of, reduce_weight, same_bits, same_sample, scan_weight
from stabilitylab.probes.weights import Drift, Update, WeightNorm, WeightRange
from tests.numbers import DTYPES, numpy64, random, seeds


def weight_pass(weight: Tensor, original: Tensor, previous: Tensor) -> WeightPass:
    seen = reduce_weight(weight, original.clone(), previous.clone(), norm_of(original))
    return WeightPass.from_host(seen.packed.numpy(), weight.dtype)


def test_a_pass_leaves_the_weight_behind_and_knows_the_rows_that_moved_most() -> None:
    previous = random(1, 300, 700)
    weight = previous.clone()
    weight[200:203] += 5
    before, original = previous.clone(), previous.clone()
    seen = reduce_weight(weight, original, previous, norm_of(original), want_change=True)
    assert torch.equal(previous, weight)
    assert torch.equal(original, before)
    assert seen.change is not None
    assert seen.change.norm().item() == pytest.approx((weight - before).norm().item(), rel=1e-5)
    assert seen.update == pytest.approx((weight - before).double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e3]))
def test_weights(dtype: torch.dtype, seed: int, rows: int, columns: int, scale: float) -> None:
    weight, original, previous = (random(seed + k, rows, columns, dtype=dtype, scale=scale) for k in range(3))
    seen = weight_pass(weight, original, previous)
    now, first, last = numpy64(weight), numpy64(original), numpy64(previous)
    close = {"rel": 1e-5, "abs": 1e-12 * scale}
    assert Update().compute(seen)["update.norm"] == pytest.approx(np.sqrt(np.sum((now - last) ** 2)), **close)
    assert WeightNorm().compute(seen)["weight.norm"] == pytest.approx(np.sqrt(np.sum(now**2)), **close)
    if np.any(now):
        expected = np.sqrt(np.sum((now - last) ** 2)) / np.sqrt(np.sum(now**2))
        assert Update().compute(seen)["update.ratio"] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    drift = Drift().compute(seen)
    assert drift["drift.norm"] == pytest.approx(np.sqrt(np.sum((now - first) ** 2)), **close)
    if np.any(first):
        expected = np.sqrt(np.sum((now - first) ** 2)) / np.sqrt(np.sum(first**2))
        assert drift["drift.ratio"] == pytest.approx(expected, rel=1e-5)
    extremes = WeightRange().compute(seen)
    largest = np.abs(now).max()
    assert extremes["weight.max_abs"] == largest
    assert extremes["weight.nonfinite"] == 0
    if largest > 0:
        bits = math.log2(torch.finfo(dtype).max) - math.log2(largest)
        assert extremes["weight.headroom_bits"] == pytest.approx(bits, rel=1e-9)


def test_a_weight_of_many_chunks_is_one_weight() -> None:
    weight, original = random(1, 700, 900), random(2, 700, 900)
    seen = weight_pass(weight, original, original)
    expected = np.linalg.norm(numpy64(weight) - numpy64(original))
    assert (seen.drift, seen.update) == (pytest.approx(expected, rel=1e-6), pytest.approx(expected, rel=1e-6))
    assert (seen.low, seen.high) == (weight.min().item(), weight.max().item())


@pytest.mark.parametrize("magnitude", [1e25, 3e38, 1e-30])
def test_norms_neither_overflow_nor_underflow_where_the_values_do_not(magnitude: float) -> None:
    weight = torch.full((50, 50), magnitude, dtype=torch.float32)
    seen = weight_pass(weight, torch.zeros_like(weight), torch.zeros_like(weight))
    assert seen.drift == pytest.approx(50 * magnitude, rel=1e-6)
    assert seen.nonfinite == 0


def test_an_fp16_norm_past_the_range_of_fp16_is_finite() -> None:
    weight = torch.full((64, 64), 60.0, dtype=torch.float16)
    assert weight_pass(weight, torch.zeros_like(weight), weight).norm == pytest.approx(3840)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_are_counted_and_never_dropped(value: float) -> None:
    weight, original = random(1, 30, 20), random(1, 30, 20)
    weight[3, 4] = weight[20, 1] = value
    seen = weight_pass(weight, original, original)
    readings = WeightRange().compute(seen)
    assert readings["weight.nonfinite"] == 2
    assert not math.isfinite(readings["weight.max_abs"])
    assert readings["weight.headroom_bits"] == -math.inf or math.isnan(readings["weight.headroom_bits"])
    assert not math.isfinite(Update().compute(seen)["update.norm"])


def test_a_zero_weight_has_endless_headroom_and_no_ratio() -> None:
    zero = torch.zeros(4, 4)
    seen = weight_pass(zero, zero, zero)
    assert WeightRange().compute(seen)["weight.headroom_bits"] == math.inf
    assert Drift().compute(seen) == {"drift.norm": 0.0}


def test_closed_form_of_headroom() -> None:
    weight = torch.full((3, 3), 2.0**10, dtype=torch.float32)
    bits = WeightRange().compute(weight_pass(weight, weight, weight))["weight.headroom_bits"]
    assert bits == pytest.approx(118, abs=1e-6)  # fp32 ends just below 2^128


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, shape=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_a_scan_needs_no_references_and_agrees(dtype: torch.dtype, seed: int, shape: list[int]) -> None:
    weight = random(seed, *shape, dtype=dtype)
    norm, low, high, nonfinite = scan_weight(weight).tolist()
    now = numpy64(weight)
    assert norm == pytest.approx(np.linalg.norm(now.ravel()), rel=1e-5)
    assert (low, high, nonfinite) == (now.min(), now.max(), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 60), columns=st.integers(1, 60), data=st.data())
def test_a_sample_sees_a_row_that_moved(
    dtype: torch.dtype, seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    weight = random(seed, rows, columns, dtype=dtype)
    other = weight.clone()
    assert same_sample(weight, other)
    other[data.draw(st.integers(0, rows - 1))] += 1
    # The last rows are only touched where a whole cache line of them fits: a matrix of few rows is compared in full.
    touched = (rows * columns - 16) // (columns + 16) + 1
    if columns < 16 or touched >= rows:
        assert not same_sample(weight, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (4, 6)], ids=str)  # of half words, and of whole ones
def test_same_bits(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    left = random(3, *shape, dtype=dtype)
    left[0, 0] = math.nan
    for at in ((0, 1), (2, 3), (shape[0] - 1, shape[1] - 1)):
        right = left.clone()
        assert same_bits(left, right)
        assert same_bits(left.T, right.T)
        right[at] = right[at] * 2
        assert not same_bits(left, right)
        assert not same_bits(left.T, right.T)
    assert not same_bits(torch.zeros(2, dtype=dtype), -torch.zeros(2, dtype=dtype))
