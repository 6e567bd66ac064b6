"""The sweep over a weight, in native code and in NumPy, against plain float64."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.probes import native_scan
from stabilitylab.probes.native_scan import weight_pass
from stabilitylab.probes.weight_pass import WeightPass, norm_of, reduce_weight, scan_weight

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def plain(tensor: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = tensor.double().clone().numpy()
    return found


def norm(values: NDArray[np.float64]) -> float:
    """By Python's own hypot, which neither overflows nor underflows."""
    return math.nan if np.isnan(values).any() else math.hypot(*values.ravel().tolist())


def three(seed: int, rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    others = [weight + step * torch.randn(rows, columns, dtype=torch.float64) for step in (0.1, 0.01)]
    return [(scale * each).to(dtype) for each in (weight, *others)]


def check(weight: Tensor, first: Tensor, before: Tensor, tolerance: float = 1e-5) -> WeightPass:
    w, f, b = map(plain, (weight, first, before))
    found = reduce_weight(weight, first, before, norm_of(first))
    seen = WeightPass.from_host(found.packed.numpy(), weight.dtype)
    with np.errstate(invalid="ignore"):
        expected = [norm(w), norm(f), norm(w - f), norm(w - b)]
    same = pytest.approx(expected, rel=tolerance, abs=0, nan_ok=True)
    assert [seen.norm, seen.reference_norm, seen.drift, seen.update] == same
    assert (seen.low, seen.high) == pytest.approx((w.min(), w.max()), nan_ok=True, rel=0, abs=0)
    assert seen.nonfinite == np.count_nonzero(~np.isfinite(w))
    assert torch.equal(before.nan_to_num(), weight.nan_to_num())
    return seen


@quick
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), columns=st.integers(1, 70), kind=st.sampled_from(DTYPES))
def test_of_any_shape_and_dtype(path: str, seed: int, rows: int, columns: int, kind: torch.dtype) -> None:
    check(*three(seed, rows, columns, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_weight_of_many_pieces(path: str, dtype: torch.dtype) -> None:
    check(*three(1, 301, 1_001, dtype))


@quick
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(DTYPES), data=st.data())
def test_nan_and_infinities_of_either_sign_anywhere(
    path: str, seed: int, kind: torch.dtype, data: st.DataObject
) -> None:
    tensors = three(seed, 9, 33, kind)
    for tensor in tensors:
        for _ in range(data.draw(st.integers(0, 2))):
            value = data.draw(st.sampled_from([math.nan, -math.nan, math.inf, -math.inf]))
            tensor.view(-1)[data.draw(st.integers(0, 296))] = value
    check(*tensors)


def test_a_nan_whose_sign_bit_is_set_is_seen(path: str) -> None:
    weight, first, before = three(2, 4, 50, torch.float32)
    weight.view(torch.int32)[2, 3] = -4_194_304  # 0xffc00000
    assert math.isnan(check(weight, first, before).high)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e12, 1e25, 1e37])
def test_squares_that_float32_can_not_hold(path: str, scale: float) -> None:
    check(*three(3, 20, 30, torch.float32, scale), tolerance=1e-5 if scale > 1e-38 else 0.05)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e150, 1e300])
def test_squares_that_float64_can_not_hold(path: str, scale: float) -> None:
    check(*three(4, 20, 30, torch.float64, scale), tolerance=1e-9)


@pytest.mark.parametrize("flushed", [False, True])
def test_every_float16_is_read_as_what_it_is(path: str, flushed: bool) -> None:
    weight = torch.arange(-32_768, 32_768).to(torch.int16).view(torch.float16).reshape(256, 256)
    finite = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))
    expected = [norm(plain(finite)), float(plain(finite).min()), float(plain(finite).max())]
    flushes = flushed and torch.set_flush_denormal(True)
    try:
        values = scan_weight(finite)
        tiny = scan_weight(torch.full((4, 4), 6e-8, dtype=torch.float16))  # the least subnormal
    finally:
        if flushes:
            torch.set_flush_denormal(False)
    assert values[:3].tolist() == pytest.approx(expected, rel=1e-6)
    assert scan_weight(weight)[3] == 2 * 1_024
    if path == "native" or not flushes:
        assert float(tiny[0]) == pytest.approx(4 * 2.0**-24, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_that_moved_most(path: str, dtype: torch.dtype) -> None:
    weight, first, before = three(5, 400, 1_000, dtype)
    before.copy_(weight)
    weight[310] += 1.0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    moved = weight.to(wide) - before.to(wide)
    change = reduce_weight(weight, first, before, norm_of(first), want_change=True).change
    assert change is not None
    (at,) = [row for row in range(len(change)) if change[row].any()]
    assert torch.equal(change[at], moved[310])
    assert len(change) < 400


def test_a_weight_that_did_not_move_has_an_update_of_exactly_zero(path: str) -> None:
    weight, first, _ = three(6, 50, 40, torch.float32)
    assert check(weight, first, weight.clone()).update == 0


@pytest.mark.parametrize("kind", ["transposed", "another dtype"])
def test_what_is_laid_out_otherwise_is_measured_all_the_same(path: str, kind: str) -> None:
    weight, first, before = three(7, 30, 20, torch.float32)
    if kind == "transposed":
        weight = weight.T.contiguous().T
    else:
        before = before.double()
    check(weight, first, before)


def test_native_code_that_another_source_made_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if weight_pass() == "numpy":
        pytest.skip("no native code here: it needs a C compiler and `make`, which builds it")
    built = native_scan._load()
    assert built is not None
    monkeypatch.setattr(built, "SOURCE", "that of yesterday")
    assert native_scan._load() is None


def test_a_change_of_any_source_makes_native_code_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if weight_pass() == "numpy":
        pytest.skip("no native code here: it needs a C compiler and `make`, which builds it")
    copied = Path(shutil.copytree(native_scan._NATIVE, tmp_path / "native"))
    monkeypatch.setattr(native_scan, "_NATIVE", copied)
    assert native_scan._load() is not None
    sources = list(copied.iterdir())
    assert {path.suffix for path in sources} == {".c", ".h"}
    for path in sources:
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert native_scan._load() is None, path.name
        path.write_bytes(text)
    assert native_scan._load() is not None
    path.rename(path.with_stem("renamed"))
    assert native_scan._load() is None
