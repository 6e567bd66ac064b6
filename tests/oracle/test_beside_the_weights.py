"""What editors keep beside the weights: codebooks, side memories, null spaces, caches of keys, against naive code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.probes.codebook import (
    Codebook,
    CodebookHits,
    CodebookPass,
    HitShare,
    query_of,
    reduce_codebook,
    reduce_hits,
)
from stabilitylab.probes.null_space import KeyCache, KeyCachePass, NullSpace, NullSpacePass, trace_of
from stabilitylab.probes.side_memory import SideMemory, SideMemoryPass, reduce_side_memory
from tests.numbers import DTYPES, numpy64, random, seeds

SPOILT = [math.nan, math.inf, -math.inf]
scales = st.sampled_from([1e-3, 1.0, 1e3])


def norm(values: np.ndarray) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.reshape(-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, n=st.integers(0, 9), width_in=st.integers(1, 12), width_out=st.integers(1, 12))
def test_codebook(dtype: torch.dtype, seed: int, n: int, width_in: int, width_out: int) -> None:
    keys, values = random(seed, n, width_in, dtype=dtype), random(seed + 1, n, width_out, dtype=dtype)
    radii = random(seed + 2, n, 1).abs()
    found = Codebook().compute(CodebookPass.from_host(reduce_codebook(keys, values, radii).numpy()))
    assert found["editor.keys"] == n
    if n == 0:
        assert set(found) == {"editor.keys"}
        return
    eps = numpy64(radii).reshape(-1)
    assert (found["editor.radius_min"], found["editor.radius_max"]) == (eps.min(), eps.max())
    assert found["editor.radius_mean"] == pytest.approx(sum(eps) / n)
    assert found["editor.key_norm"] == pytest.approx(max(norm(row) for row in numpy64(keys)))
    assert found["editor.value_norm"] == pytest.approx(max(norm(row) for row in numpy64(values)))


@pytest.mark.parametrize("value", SPOILT)
def test_a_codebook_that_is_not_finite(value: float) -> None:
    keys, values, radii = random(0, 3, 2), random(1, 3, 2), torch.ones(3)
    keys[1, 0] = values[2, 1] = radii[0] = value
    found = Codebook().compute(CodebookPass.from_host(reduce_codebook(keys, values, radii).numpy()))
    assert not math.isfinite(found["editor.key_norm"])
    assert not math.isfinite(found["editor.value_norm"])
    assert not math.isfinite(found["editor.radius_mean"])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, batch=st.integers(0, 5), n=st.integers(0, 6), width=st.integers(1, 8))
def test_hits(dtype: torch.dtype, seed: int, batch: int, n: int, width: int) -> None:
    query, keys = random(seed, batch, width, dtype=dtype), random(seed + 1, n, width, dtype=dtype)
    radii = random(seed + 2, n, 1, scale=2.0).abs()
    found = HitShare().compute(CodebookHits.from_host(reduce_hits(query, keys, radii).numpy()))
    if batch == 0:
        assert found == {}
        return
    hits, undecided = 0, 0
    for q in numpy64(query):
        distances = [norm(q - k) for k in numpy64(keys)]
        if distances:
            nearest = int(np.argmin(distances))
            radius = float(radii[nearest])
            undecided += abs(distances[nearest] - radius) < 1e-4
            hits += distances[nearest] <= radius
    assert abs(found["editor.hit_share"] * batch - hits) <= undecided + 1e-9


def test_closed_forms_of_hits() -> None:
    keys, radii = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[1.0], [5.0]])
    query = torch.tensor([[0.0, 1.0], [4.0, 0.0], [6.0, 0.0], [math.nan, 0.0]])
    # On the rim; nearest to a ball that is too small, though not inside the other either; inside; nowhere.
    assert reduce_hits(query, keys, radii).tolist() == [2.0, 4.0]
    # EasyEdit splits the radii of two equal keys into 0 and a little less than 0: a key that not even itself hits.
    assert reduce_hits(keys[:1], keys[:1], torch.tensor([-1e-5])).tolist() == [0.0, 1.0]
    assert reduce_hits(keys[:1], keys[:1], torch.tensor([0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("token", "expected"), [(-1, 3), (0, 0), (2, 2), (3, 3), (9, 3)])
def test_the_row_that_is_looked_up(token: int, expected: int) -> None:
    entered = torch.arange(8.0).reshape(2, 4, 1)
    row = entered[:, expected]
    assert torch.equal(query_of(entered, token), row)
    assert torch.equal(query_of(entered, torch.tensor(token)), row)


def test_an_input_without_positions_can_not_be_looked_up() -> None:
    for shape in ((3,), (2, 0, 3), (2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"expected \[batch, tokens, inputs\]"):
            query_of(torch.ones(*shape), -1)


def test_the_tokens_of_one_list_are_one_row() -> None:
    entered = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(query_of(entered, 1), entered[1:2])
    assert torch.equal(query_of(entered, torch.tensor(-1)), entered[3:])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 20), columns=st.integers(1, 20), count=st.integers(1, 3), scale=scales)
def test_side_memory(dtype: torch.dtype, seed: int, rows: int, columns: int, count: int, scale: float) -> None:
    original = random(seed, rows, columns, dtype=dtype)
    sides = [random(seed + 1 + i, rows, columns, dtype=dtype, scale=scale) for i in range(count)]
    packed = reduce_side_memory(sides, original).numpy()
    found = SideMemory().compute(SideMemoryPass.from_host(packed, 7))
    drifts = [norm(numpy64(side) - numpy64(original)) for side in sides]
    assert found["editor.side_norm"] == pytest.approx(max(norm(numpy64(side)) for side in sides), rel=1e-9)
    assert found["editor.side_drift"] == pytest.approx(max(drifts), rel=1e-9)
    assert found["editor.side_memories"] == 7
    if norm(numpy64(original)):
        assert found["editor.side_ratio"] == pytest.approx(max(drifts) / norm(numpy64(original)), rel=1e-9)


def test_closed_forms_of_a_side_memory() -> None:
    weight = torch.full((700, 900), 2.0)  # several chunks
    packed = reduce_side_memory([weight.clone(), weight + 3], weight)
    assert packed.tolist() == pytest.approx([2 * math.sqrt(630_000), 5 * math.sqrt(630_000), 3 * math.sqrt(630_000)])
    zero = SideMemory().compute(
        SideMemoryPass.from_host(reduce_side_memory([torch.ones(2)], torch.zeros(2)).numpy(), 0)
    )
    assert "editor.side_ratio" not in zero
    for value in SPOILT:
        spoilt = reduce_side_memory([torch.tensor([1.0, value]), torch.ones(2)], torch.ones(2))
        assert not math.isfinite(spoilt[2])
    with pytest.raises(ValueError, match="of the same shape"):
        reduce_side_memory([torch.ones(3)], torch.ones(2))
    with pytest.raises(ValueError, match="at least one"):
        reduce_side_memory([], torch.ones(2))


@given(seed=seeds, width=st.integers(1, 20), kept=st.integers(0, 20))
def test_null_space(seed: int, width: int, kept: int) -> None:
    kept = min(kept, width)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    projection = basis[:, :kept] @ basis[:, :kept].T
    seen = NullSpacePass.from_host(trace_of(torch.tensor(projection), mean=True).numpy())
    assert NullSpace().compute(seen)["editor.null_space_share"] == pytest.approx(kept / width, abs=1e-9)


@given(seed=seeds, keys=st.integers(0, 10), width=st.integers(1, 12))
def test_key_cache(seed: int, keys: int, width: int) -> None:
    held = random(seed, keys, width)
    seen = KeyCachePass.from_host(trace_of(held.T @ held).numpy())
    expected = sum(norm(key) ** 2 for key in numpy64(held))
    assert KeyCache().compute(seen)["editor.cache_energy"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
