"""The sweep of a CUDA device, interpreted on a CPU, beside torch's operators and plain float64; then compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stabilitylab.probes import triton_scan, weight_pass
from stabilitylab.probes.triton_scan import fits, sweep_on_device

pytestmark = pytest.mark.triton

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    if not triton_scan.is_interpreted():
        pytest.skip("needs triton, and its interpreter; run with: make test-triton")


def three(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    first, before = (weight + step * torch.randn(rows, columns, dtype=torch.float64) for step in (0.1, 0.01))
    return (scale * weight).to(dtype), (scale * first).to(dtype), (scale * before).to(dtype)


def naive(weight: Tensor, references: tuple[Tensor, ...]) -> list[float]:
    """In float64, each quantity by itself."""
    wide = weight.double()
    norms = [torch.linalg.vector_norm(each).item() for each in (wide, *(wide - other.double() for other in references))]
    return [*norms, *(end.item() for end in torch.aminmax(wide)), float((~torch.isfinite(wide)).sum())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (64, 32), (65, 1_031)])
def test_of_any_shape_and_dtype(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, first, before = three(rows, columns, dtype)
    expected = naive(weight, (first, before))
    found = sweep_on_device(weight, (first, before))
    assert found is not None
    assert found.tolist() == pytest.approx(expected, rel=2e-6 if dtype != torch.float64 else 1e-12)
    assert torch.equal(before, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_says_what_torchs_operators_say(dtype: torch.dtype) -> None:
    weight, first, before = three(40, 301, dtype)
    other = before.clone()
    found, expected = sweep_on_device(weight, (first, before)), weight_pass._scan_by_operators(weight, (first, other))
    assert found is not None
    assert found.tolist() == pytest.approx(expected.tolist(), rel=2e-6)
    assert torch.equal(before, other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    weight, first, before = three(9, 500, torch.float32)
    weight[8, 499] = value
    expected = naive(weight, (first, before))
    found = sweep_on_device(weight, (first, before))
    assert found is not None
    assert found.tolist() == pytest.approx(expected, rel=2e-6, nan_ok=True)
    assert found[5] == 1


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e25, 1e37])
def test_squares_that_float32_can_not_hold(scale: float) -> None:
    weight, first, before = three(20, 300, torch.float32, scale)
    expected = naive(weight, (first, before))
    found = sweep_on_device(weight, (first, before))
    assert found is not None
    assert found.tolist() == pytest.approx(expected, rel=1e-5 if scale > 1e-38 else 0.05)


def test_of_a_weight_alone() -> None:
    weight = three(30, 200, torch.bfloat16)[0]
    found = sweep_on_device(weight, ())
    assert found is not None
    assert found.tolist() == pytest.approx(naive(weight, ()), rel=1e-6)


def test_what_it_does_not_fit_is_left_alone() -> None:
    weight, first, before = three(8, 9, torch.float32)
    kept = before.clone()
    assert not fits(weight.T, (first, before))
    assert sweep_on_device(weight, (first, before.double())) is None
    assert sweep_on_device(weight.T, (first.T, before.T)) is None
    assert torch.equal(before, kept)


def test_a_kernel_that_can_not_be_made_is_said_once_and_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_scan, "_kernel", None)
    monkeypatch.setattr(triton_scan, "_failed", set())
    weight, first, before = three(8, 9, torch.float32)
    kept = before.clone()
    assert sweep_on_device(weight, (first, before)) is None
    assert sweep_on_device(weight, (first, before)) is None
    assert torch.equal(before, kept)
    assert len(caplog.records) == 1


COMPILING = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from stabilitylab.probes import triton_scan

for capability in (80, 90):
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        pointers = dict.fromkeys(("weight", "first", "before"), f"*{dtype}")
        taken = {**pointers, "table": "*fp64", "entries": "i64", "rounds": "i32"}
        sizes = {"BLOCK": triton_scan._BLOCK, "COLUMNS": triton_scan._COLUMNS}
        constants = {"COMPARES": True, "WIDE": dtype == "fp64", **sizes}
        source = ASTSource(
            JITFunction(triton_scan._kernel_source),
            taken | dict.fromkeys(constants, "constexpr"),
            {(list(taken | constants).index(name),): value for name, value in constants.items()},
        )
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), dict(triton_scan._OPTIONS))
        assert len(compiled.asm["cubin"]) > 0
        print(capability, dtype)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles for CUDA on Linux")
def test_it_compiles_for_real_devices() -> None:
    """By the compiler that comes with triton, which needs no device, and forgives less than the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * len(DTYPES)
