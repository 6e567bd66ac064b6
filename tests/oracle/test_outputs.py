"""What is read of outputs, against a naive float64 implementation that shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.probes.activations import ActivationPasses, ActivationRange, ActivationScale, NormHeadroom
from stabilitylab.probes.output_pass import LaterOutputs, NormInput, OutputKeeper, OutputPass, reduce_output
from tests.numbers import DTYPES, numpy64, random, seeds


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, batch=st.integers(1, 3), positions=st.integers(1, 9), features=st.integers(1, 20))
def test_activations(dtype: torch.dtype, seed: int, batch: int, positions: int, features: int) -> None:
    output = random(seed, batch, positions, features, dtype=dtype)
    seen = OutputPass.from_host(reduce_output(output).numpy(), dtype)
    y = numpy64(output)
    readings = {**ActivationScale().compute(seen), **ActivationRange().compute(seen)}
    assert readings["activation.rms"] == pytest.approx(np.sqrt(np.mean(y**2)), rel=1e-5)
    assert readings["activation.max_abs"] == np.abs(y).max()
    assert readings["activation.nonfinite"] == 0
    if positions > 1:
        assert readings["activation.rms_beyond_first"] == pytest.approx(np.sqrt(np.mean(y[:, 1:] ** 2)), rel=1e-5)
        assert readings["activation.max_abs_beyond_first"] == np.abs(y[:, 1:]).max()
    else:
        assert "activation.rms_beyond_first" not in readings


def test_an_output_of_one_row_is_one_position() -> None:
    output = random(3, 7)
    seen, likewise = (
        OutputPass.from_host(reduce_output(each).numpy(), torch.float32) for each in (output, output[None])
    )
    assert seen == likewise
    assert seen.max_abs == pytest.approx(float(output.abs().max()))


def test_closed_form_of_a_normal_output() -> None:
    seen = OutputPass.from_host(reduce_output(random(0, 4, 500, 500)).numpy(), torch.float32)
    assert seen.rms == pytest.approx(1.0, rel=5e-3)


def test_activations_past_the_square_root_of_the_range_have_a_finite_rms() -> None:
    output = torch.full((1, 2, 3), 1e30)
    seen = OutputPass.from_host(reduce_output(output).numpy(), torch.float32)
    assert seen.rms == pytest.approx(1e30)
    bits = ActivationRange().compute(seen)["activation.headroom_bits"]
    assert bits == pytest.approx(math.log2(3.4028e38 / 1e30), 1e-4)


def test_nonfinite_activations() -> None:
    output = random(0, 2, 3, 4)
    output[0, 0, 0], output[1, 2, 3] = math.nan, math.inf
    seen = OutputPass.from_host(reduce_output(output).numpy(), torch.float32)
    assert ActivationRange().compute(seen)["activation.nonfinite"] == 2
    assert math.isnan(ActivationScale().compute(seen)["activation.rms"])


@given(st.lists(st.sampled_from([0.0, 0.5, 3.0, 7.0, math.inf, math.nan]), min_size=1, max_size=8))
def test_later_outputs(largest: list[float]) -> None:
    keeper = OutputKeeper()
    for value in largest:
        keeper.add(torch.tensor([[0.0, -value]]))
    packed = keeper.reduce()
    assert packed is not None
    readings = ActivationPasses().compute(LaterOutputs.from_host(packed.numpy()))
    bad = [value for value in largest if not math.isfinite(value)]
    assert readings["activation.passes"] == len(largest)
    assert readings["activation.nonfinite_passes"] == len(bad)
    if len(largest) == 1:
        assert "activation.max_abs_worst" not in readings
    else:
        worst = bad[0] if bad else max(largest)
        np.testing.assert_equal(readings["activation.max_abs_last"], largest[-1])
        np.testing.assert_equal(readings["activation.max_abs_worst"], worst)


@pytest.mark.parametrize("dtype", DTYPES)
def test_headroom_before_a_norm_is_that_of_the_square(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 4.0, dtype=dtype)
    bits = NormHeadroom().compute(NormInput.from_host(np.array([4.0]), dtype))["activation.norm_headroom_bits"]
    assert isinstance(bits, float)
    inside = x.double() if dtype == torch.float64 else x.float()  # what LayerNorm and RMSNorm compute in
    whole = min(math.floor(bits), 1000)
    assert torch.isfinite((inside * 2.0 ** (whole - 1)).square()).all()
    assert not torch.isfinite((x * 2.0 ** (whole + 2)).to(inside.dtype).square()).all()
