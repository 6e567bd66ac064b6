"""The condition and the residual of a solve, against naive implementations that share no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes import linear_solve
from stabilitylab.probes.linear_solve import (
    CovarianceCondition,
    CovarianceExtremes,
    SolveResidual,
    SystemCondition,
    SystemExtremes,
    SystemResidual,
    reduce_extremes,
    reduce_residual,
)
from tests.numbers import DTYPES, numpy64, random, seeds

SPOILT = [math.nan, math.inf, -math.inf]
scales = st.sampled_from([1e-3, 1.0, 1e3])


def norm(values: np.ndarray) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.reshape(-1)))


def condition(matrix: Tensor) -> float:
    packed = reduce_extremes(matrix).numpy()
    system = SystemCondition().compute(SystemExtremes.from_host(packed))["editor.system_condition"]
    covariance = CovarianceCondition().compute(CovarianceExtremes.from_host(packed))["editor.covariance_condition"]
    np.testing.assert_equal(system, covariance)
    return float(system)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 24), columns=st.integers(1, 24), scale=scales)
def test_condition(dtype: torch.dtype, seed: int, rows: int, columns: int, scale: float) -> None:
    matrix = random(seed, rows, columns, dtype=dtype, scale=scale)
    wide = numpy64(matrix)
    small = wide if rows >= columns else wide.T
    squares = np.linalg.eigvalsh(small.T @ small)
    expected = math.sqrt(squares[-1] / squares[0]) if squares[0] > 1e-10 * squares[-1] else None
    if expected is not None:
        assert condition(matrix) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_closed_forms_of_the_condition(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    if not exact:
        monkeypatch.setattr(linear_solve, "EXACT_WIDTH", 0)
    assert condition(torch.diag(torch.tensor([1.0, 8.0, 2.0, 1000.0]))) == pytest.approx(1000)
    assert condition(torch.eye(5, dtype=torch.float16)) == pytest.approx(1)
    assert condition(torch.diag(torch.tensor([1e200, 1e-5], dtype=torch.float64))) > 1e16
    assert condition(torch.zeros(3, 3)) == math.inf
    assert condition(torch.diag(torch.tensor([1.0, 0.0]))) == math.inf
    assert condition(torch.tensor([[-7.0]])) == pytest.approx(1)
    assert condition(torch.tensor([[3.0, 4.0]])) == pytest.approx(1)
    assert condition(torch.ones(4, 4)) > 1e15
    hilbert = torch.tensor([[1 / (i + j + 1) for j in range(6)] for i in range(6)], dtype=torch.float64)
    assert condition(hilbert) == pytest.approx(1.4951e7, rel=1e-3)
    for value in SPOILT:
        assert math.isnan(condition(torch.tensor([[1.0, value], [0.0, 1.0]])))


@given(seed=seeds, size=st.integers(1, 40), rows=st.integers(0, 20), exponent=st.integers(0, 12))
def test_an_estimated_condition_is_never_too_large_and_seldom_far_too_small(
    seed: int, size: int, rows: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(size + rows, size)))
    right, _ = np.linalg.qr(rng.normal(size=(size, size)))
    values = 10.0 ** rng.uniform(-exponent, 0, size=size)
    matrix = torch.tensor((left * values) @ right.T)
    exact = values.max() / values.min()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_solve, "EXACT_WIDTH", 0)
        found = condition(matrix), condition(matrix.T)
    for estimate in found:
        assert 0.5 * exact < estimate < exact * (1 + 1e-3)


def test_a_wide_covariance_is_estimated() -> None:
    keys = random(0, 2000, 700, dtype=torch.float64)
    covariance = keys.T @ keys
    exact = np.linalg.cond(numpy64(covariance))
    assert 0.7 * exact < condition(covariance) <= exact * 1.001


def test_an_estimate_draws_nothing_from_the_generator() -> None:
    state = torch.get_rng_state()
    linear_solve._estimated(torch.eye(3, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 2, 2)])
def test_what_is_no_matrix_has_no_condition(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a matrix that is not empty"):
        reduce_extremes(torch.ones(shape))


def residual(system: Tensor, solution: Tensor, right_side: Tensor) -> dict:
    seen = SolveResidual.from_host(reduce_residual(system, solution, right_side).numpy())
    return dict(SystemResidual().compute(seen))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, n=st.integers(1, 12), k=st.integers(1, 12), m=st.integers(0, 6))
def test_residual(dtype: torch.dtype, seed: int, n: int, k: int, m: int) -> None:
    width = (m,) if m else ()
    a, x, b = (random(seed + i, *shape, dtype=dtype) for i, shape in enumerate(((n, k), (k, *width), (n, *width))))
    left, right, sought = numpy64(a), numpy64(b).reshape(n, -1), numpy64(x).reshape(k, -1)
    product = np.array([[sum(left[i, :] * sought[:, j]) for j in range(max(m, 1))] for i in range(n)])
    if norm(right):
        expected = norm(product - right) / norm(right)
        assert residual(a, x, b)["editor.solve_residual"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_closed_forms_of_the_residual() -> None:
    a, b = torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([2.0, 4.0])
    assert residual(a, torch.ones(2), b) == {"editor.solve_residual": 0.0}
    assert residual(a, torch.zeros(2), b) == {"editor.solve_residual": 1.0}
    assert residual(a, torch.ones(2), torch.zeros(2)) == {}
    many = torch.arange(1.0, 601.0)[None]  # more than are multiplied at once
    assert residual(torch.tensor([[1.0]]), 3 * many, many)["editor.solve_residual"] == pytest.approx(2.0)
    for value in SPOILT:
        broken = residual(a, torch.tensor([1.0, value]), b)["editor.solve_residual"]
        assert not math.isfinite(broken)


def test_a_system_that_was_solved_in_fp32_while_it_is_singular() -> None:
    keys = random(0, 3, 8)
    system, right_side = keys.T @ keys, random(1, 8, 2)
    solution = torch.linalg.lstsq(system.double() + 1e-12 * torch.eye(8), right_side.double()).solution.float()
    assert condition(system) > 1e6
    assert residual(system, solution, right_side)["editor.solve_residual"] > 1e-3


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 2), (3, 1), (3, 1)),
        ((3, 2), (2, 1), (2, 1)),
        ((3,), (3,), (3,)),
        ((3, 1), (), (3,)),
        ((3, 3), (3, 2), (3,)),
        ((3, 3), (3, 0), (3, 0)),
        ((0, 0), (0,), (0,)),
        ((1, 1, 1), (1, 1), (1, 1)),
    ],
)
def test_a_system_that_does_not_fit_is_refused(shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected \[n, k\], \[k, m\] and \[n, m\]"):
        reduce_residual(*map(torch.ones, shapes))
