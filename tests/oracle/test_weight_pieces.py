"""The pass over a weight that is a base and a product of few columns, in one sweep and by pieces, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes import native_scan
from stabilitylab.probes.native_scan import LowRankSum, makes_as_torch, sweep_sum, weight_pass
from stabilitylab.probes.weight_pass import WeightPass, norm_of, same_bits
from stabilitylab.probes.weight_pieces import InPieces, reduce_pieces, scan_pieces

BASES = [torch.float32, torch.float16, torch.bfloat16]
SCALES = [1.0, 2.0, 0.3]
LOST = [math.nan, -math.nan, math.inf, -math.inf]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def merged(made: LowRankSum) -> Tensor:
    """By torch, in the order in which PEFT merges."""
    product = made.left @ made.right
    return made.base + (product if made.scale == 1 else product * made.scale)


def in_pieces(made: LowRankSum, rows: int = 16) -> InPieces:
    def make() -> Iterator[Tensor]:
        yield from torch.split(merged(made), rows)

    return InPieces((made.base.shape[0], made.base.shape[1]), torch.float32, make, made)


def a_sum(seed: int, rows: int, columns: int, rank: int, dtype: torch.dtype, scale: float = 1.0) -> LowRankSum:
    torch.manual_seed(seed)
    base, left, right = torch.randn(rows, columns).to(dtype), torch.randn(rows, rank), torch.randn(rank, columns)
    return LowRankSum(base, left, right, scale)


def references(whole: Tensor) -> tuple[Tensor, Tensor]:
    return whole + 0.1 * torch.randn_like(whole), whole + 0.01 * torch.randn_like(whole)


def check(made: LowRankSum, first: Tensor, before: Tensor) -> WeightPass:
    """W₋ takes the bits that torch makes, and what is found of W is that of float64."""
    whole = merged(made)
    w, f, b = (each.double().numpy() for each in (whole, first, before.clone()))
    found = reduce_pieces(in_pieces(made), first, before, norm_of(first))
    seen = WeightPass.from_host(found.packed.numpy(), torch.float32)
    with np.errstate(invalid="ignore"):
        norms = [float(np.linalg.norm(each)) for each in (w, f, w - f, w - b)]
    extremes = [float(np.min(w)), float(np.max(w))]
    assert [seen.norm, seen.reference_norm, seen.drift, seen.update] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert [seen.low, seen.high] == pytest.approx(extremes, rel=0, abs=0, nan_ok=True)
    assert seen.nonfinite == np.count_nonzero(~np.isfinite(w))
    assert same_bits(before.nan_to_num(), whole.nan_to_num())
    assert scan_pieces(in_pieces(made)).tolist() == pytest.approx([seen.norm, *extremes, seen.nonfinite], nan_ok=True)
    return seen


@quick
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    rank=st.integers(1, 20),
    dtype=st.sampled_from(BASES),
    scale=st.sampled_from(SCALES),
)
def test_of_any_shape_rank_and_scale(
    path: str, seed: int, rows: int, columns: int, rank: int, dtype: torch.dtype, scale: float
) -> None:
    made = a_sum(seed, rows, columns, rank, dtype, scale)
    check(made, *references(merged(made)))


@pytest.mark.parametrize("dtype", BASES, ids=str)
@pytest.mark.parametrize("shape", [(768, 3_072), (3_072, 768), (301, 1_001)], ids=str)
def test_of_many_chunks(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    made = a_sum(1, *shape, 8, dtype)
    check(made, *references(merged(made)))


@quick
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from(BASES), data=st.data())
def test_nan_and_infinities_in_any_part(path: str, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    made = a_sum(seed, 9, 70, 5, dtype, data.draw(st.sampled_from(SCALES)))
    first, before = references(merged(made))
    for tensor in (made.base, made.left, made.right, first, before):
        for _ in range(data.draw(st.integers(0, 1))):
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.sampled_from(LOST))
    check(made, first, before)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
def test_squares_that_float32_can_not_hold(path: str, scale: float) -> None:
    made = a_sum(2, 20, 50, 4, torch.float32)
    made = LowRankSum(made.base * scale, made.left * scale, made.right, 0.5)
    check(made, *(scale * each for each in references(merged(made) / scale)))


def test_a_product_of_zeros_leaves_the_base_and_an_update_of_exactly_zero(path: str) -> None:
    made = a_sum(3, 33, 65, 8, torch.float32)
    made.left.zero_()
    made.base[3] = 0.0
    first, _ = references(made.base)
    before = made.base.clone()
    assert check(made, first, before).update == 0
    assert same_bits(before, made.base)


def test_the_rows_that_moved_most(path: str) -> None:
    made = a_sum(4, 400, 1_000, 8, torch.float32)
    whole = merged(made)
    before = whole.clone()
    before[310] -= 1.0
    change = reduce_pieces(in_pieces(made), *references(whole)[:1], before, norm_of(whole), want_change=True).change
    assert change is not None
    assert len(change) < 400
    (at,) = [row for row in range(len(change)) if change[row].any()]
    assert torch.equal(change[at], whole[310] - (whole[310] - 1.0))


@pytest.mark.parametrize("shape", [(400, 1_000), (37, 130), (3, 9)], ids=str)
def test_it_is_found_the_same_to_the_bit_whether_what_moved_is_kept_or_not(shape: tuple[int, int]) -> None:
    """A state of a weight is known again by its figures, see `References`."""
    made = a_sum(5, *shape, 8, torch.float32)
    first, before = references(merged(made))
    found = [sweep_sum(made, (first, before.clone()), 16, keeps_moved=kept) for kept in (False, True)]
    assert (found[0] is None) == (found[1] is None)
    if found[0] is not None and found[1] is not None:
        assert found[0][:3] == found[1][:3]


def test_products_of_many_columns_are_made_by_torch() -> None:
    made = a_sum(5, 64, 64, 65, torch.float32)
    assert sweep_sum(made, None, 64) is None
    check(made, *references(merged(made)))


def test_where_torch_would_round_a_product_otherwise_torch_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = a_sum(6, 64, 64, 8, torch.float32)
    if weight_pass() == "native":
        assert makes_as_torch(64, 64, 8) == (sweep_sum(made, None, 64) is not None)
    monkeypatch.setattr(native_scan, "makes_as_torch", lambda *_: False)
    assert sweep_sum(made, None, 64) is None
    check(made, *references(merged(made)))


def test_few_entries_agree_by_no_chance() -> None:
    """What is said to be made as torch makes it, is so of any factors of that shape."""
    generator = torch.Generator().manual_seed(0)
    said = [(rows, columns, rank) for rows in (1, 2, 7) for columns in (1, 2, 5) for rank in (2, 3, 5, 9)]
    for rows, columns, rank in (shape for shape in said if makes_as_torch(*shape)):
        for _ in range(50):
            left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
            before = torch.zeros(rows, columns)
            sweep_sum(LowRankSum(torch.zeros(rows, columns), left, right, 1.0), (before.clone(), before), 64)
            assert same_bits(before, left @ right), (rows, columns, rank)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="another library multiplies here")
def test_a_product_of_few_columns_is_rounded_as_mkl_rounds_it() -> None:
    if weight_pass() == "numpy" or not native_scan._BUILT.MULTIPLIES_AND_ADDS:  # type: ignore[union-attr]
        pytest.skip("no native code that multiplies and adds in one here")
    assert makes_as_torch(768, 3_072, 8)


def test_whatever_device_and_dtype_are_the_usual_ones() -> None:
    made = a_sum(7, 40, 90, 4, torch.float32)
    expected = sweep_sum(made, None, 16)
    makes_as_torch.cache_clear()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = sweep_sum(made, None, 16, keeps_moved=True)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found[:3] == expected[:3]
