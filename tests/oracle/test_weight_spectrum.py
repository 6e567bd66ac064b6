"""A weight's singular values against the eigenvalues of WᵀW, and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stabilitylab.probes.weight_spectrum import ConditionNumber, SpectralNorm, WeightSpectrum, spectrum_of_weight
from torch import Tensor


def measured(weight: Tensor) -> dict[str, float]:
    seen = WeightSpectrum(spectrum_of_weight(weight).numpy())
    return {**SpectralNorm().compute(seen), **ConditionNumber().compute(seen)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_against_eigenvalues(dtype: torch.dtype, seed: int, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wide = weight.double().numpy()
    gram = wide @ wide.T if rows <= columns else wide.T @ wide
    squares = np.linalg.eigvalsh(gram)
    found = measured(weight)
    assert found["weight.spectral_norm"] == pytest.approx(math.sqrt(squares[-1]), rel=1e-7)
    assert found["weight.stable_rank"] == pytest.approx(np.sum(wide**2) / squares[-1], rel=1e-7)
    if squares[0] > 1e-6 * squares[-1]:
        expected = math.sqrt(squares[-1] / squares[0])
        assert found["weight.condition_number"] == pytest.approx(expected, rel=1e-5)


def test_closed_form() -> None:
    found = measured(torch.diag(torch.tensor([8.0, 4.0, 2.0])))
    assert found["weight.spectral_norm"] == pytest.approx(8)
    assert found["weight.stable_rank"] == pytest.approx(84 / 64)
    assert found["weight.condition_number"] == pytest.approx(4)


def test_a_spike_is_seen_at_once() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    before = measured(weight)["weight.spectral_norm"]
    u, v = torch.zeros(40), torch.zeros(30)
    u[3], v[7] = 1.0, 1.0
    spiked = weight + 3 * before * torch.outer(u, v)
    exact = np.linalg.norm(spiked.double().numpy(), 2)
    assert measured(spiked)["weight.spectral_norm"] == pytest.approx(exact, rel=1e-9)
    assert measured(spiked)["weight.spectral_norm"] > 2 * before


def test_zero_lost_and_nonfinite() -> None:
    assert measured(torch.zeros(3, 2)) == {"weight.spectral_norm": 0.0}
    assert measured(torch.diag(torch.tensor([1.0, 0.0])))["weight.condition_number"] == math.inf
    weight = torch.ones(3, 3)
    weight[1, 1] = math.inf
    assert all(math.isnan(value) for value in measured(weight).values())
