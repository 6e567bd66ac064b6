"""Gradients from their factors, against naive float64 decompositions of the gradient itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes.gradient_factors import (
    GradientSize,
    GradientSpectrum,
    norm_of,
    reduce_factors,
    reduce_matrix,
    reduce_matrix_size,
    reduce_size,
)
from stabilitylab.probes.gradient_passes import (
    Factors,
    LaterSpectra,
    PassKeeper,
    alignment_from,
    inner_product,
    product_with_update,
)
from stabilitylab.probes.gradients import (
    GradientAlignment,
    GradientNonfinite,
    GradientNorm,
    GradientPasses,
    GradientRank,
    PassSpectrum,
    Spectrum,
)
from tests.numbers import DTYPES, numpy64, random, seeds


def spectrum_of(x: Tensor, delta: Tensor) -> GradientSpectrum:
    packed, rebuild = reduce_factors(x, delta)
    return rebuild(packed.numpy())


def naive(x: Tensor, delta: Tensor) -> np.ndarray:
    gradient = np.zeros((delta.shape[-1], x.shape[-1]))
    for u, d in zip(numpy64(x).reshape(-1, x.shape[-1]), numpy64(delta).reshape(-1, delta.shape[-1]), strict=True):
        gradient += np.outer(d, u)
    return gradient


def assert_exact(found: np.ndarray, exact: np.ndarray) -> None:
    """Within 1e-5 for every value above 1e-6 of the largest, and near nothing below."""
    large = exact > 1e-6 * exact[0]
    np.testing.assert_allclose(found[large], exact[large], rtol=1e-5)
    np.testing.assert_allclose(found[~large], exact[~large], atol=1.1e-6 * exact[0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, tokens=st.integers(1, 30), width_in=st.integers(1, 50), width_out=st.integers(1, 50))
def test_spectrum(dtype: torch.dtype, seed: int, tokens: int, width_in: int, width_out: int) -> None:
    x, delta = random(seed, tokens, width_in, dtype=dtype), random(seed + 1, tokens, width_out, dtype=dtype)
    gradient = naive(x, delta)
    exact = np.linalg.svd(gradient, compute_uv=False)
    seen = spectrum_of(x, delta)
    size = min(tokens, width_in, width_out)
    assert seen.singular_values.size == size
    assert seen.exact
    assert_exact(seen.singular_values, exact[:size])
    norm = np.linalg.norm(gradient)
    assert GradientNorm().compute(seen)["gradient.norm"] == pytest.approx(norm, rel=1e-5)
    # Where a unit is silent at every token; that products of short numbers add up to 0 is chance.
    speak_x, speak_delta = ((np.asarray(part.double()) != 0).any(axis=0) for part in (x, delta))
    silent = 1 - np.mean(np.outer(speak_delta, speak_x))
    assert GradientNorm().compute(seen)["gradient.zero_share"] == pytest.approx(silent, abs=1e-12)
    ranks = GradientRank().compute(seen)
    assert ranks["gradient.stable_rank"] == pytest.approx(norm**2 / exact[0] ** 2, rel=1e-5)
    assert ranks["gradient.top_share"] == pytest.approx(exact[0] ** 2 / norm**2, rel=1e-5)
    share = exact[:size] / exact[:size].sum()
    expected = math.exp(-sum(p * math.log(p) for p in share if p > 0))
    assert ranks["gradient.effective_rank"] == pytest.approx(expected, rel=1e-5)
    assert np.size(Spectrum().compute(seen)["gradient.spectrum"]) == min(size, 32)
    assert GradientNonfinite().compute(seen)["gradient.nonfinite"] == 0


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    tokens=st.integers(2, 60),
    widths=st.tuples(st.integers(20, 300), st.integers(20, 300)),
    spread=st.floats(0, 6),
    where=st.sampled_from(["x", "delta", "both"]),
)
def test_small_singular_values_are_as_exact_as_large_ones(
    seed: int, tokens: int, widths: tuple[int, int], spread: float, where: str
) -> None:
    """Factors whose own spread would be lost in a Gram matrix: those must not be trusted to one."""
    falling = np.logspace(0, -spread, tokens)
    parts = []
    for name, width in zip(("x", "delta"), widths, strict=True):
        basis = np.linalg.qr(np.random.default_rng(seed + width).normal(size=(tokens, tokens)))[0]
        scale = falling if where in (name, "both") else np.ones(tokens)
        rows = np.random.default_rng(seed + 1).normal(size=(tokens, width))
        parts.append(torch.from_numpy((basis * scale) @ rows).float())
    seen = spectrum_of(*parts)
    exact = np.linalg.svd(naive(*parts), compute_uv=False)[: seen.singular_values.size]
    assert_exact(seen.singular_values, exact)


@pytest.mark.parametrize(
    ("tokens", "width_in", "width_out"), [(256, 300, 280), (700, 40, 300), (700, 300, 40), (90, 8, 9)]
)
def test_exact_up_to_rank_256(tokens: int, width_in: int, width_out: int) -> None:
    x, delta = random(1, tokens, width_in), random(2, tokens, width_out)
    seen = spectrum_of(x, delta)
    assert seen.exact
    assert_exact(seen.singular_values, np.linalg.svd(naive(x, delta), compute_uv=False)[: seen.singular_values.size])


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_beyond_rank_256_leading_values_that_converged_and_a_norm(decay: float) -> None:
    tokens = 400
    falling = torch.arange(1, tokens + 1).double() ** -decay
    x, delta = ((random(k, tokens, 500).double().T * falling).T.float() for k in (1, 2))
    seen = spectrum_of(x, delta)
    exact = np.linalg.svd(naive(x, delta), compute_uv=False)
    count = seen.singular_values.size
    assert not seen.exact
    assert 1 <= count <= 8
    if decay > 0:
        assert count >= 2
        np.testing.assert_allclose(seen.singular_values, exact[:count], rtol=1e-5)
    else:  # a flat spectrum: only the first is given, as a lower bound
        assert 0.9 * exact[0] < seen.top <= exact[0] * (1 + 1e-6)
    # What lies outside of the leading space is estimated from 16 directions: in a flat spectrum that is nearly all of
    # it, and the relative standard deviation of the norm √(2 Σσ⁴ / 16) / 2 Σσ² = 1.2 %.
    assert seen.norm == pytest.approx(np.linalg.norm(exact), rel=0.01 if decay > 0 else 0.05)
    assert "gradient.effective_rank" not in GradientRank().compute(seen)
    assert Spectrum().compute(seen)["gradient.exact"] == 0
    again = spectrum_of(x, delta)
    assert again.singular_values.tolist() == seen.singular_values.tolist()


def test_closed_form_of_one_token() -> None:
    x, delta = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    seen = spectrum_of(x, delta)
    assert seen.singular_values.tolist() == pytest.approx([10.0])
    assert GradientRank().compute(seen)["gradient.stable_rank"] == pytest.approx(1.0)
    assert GradientRank().compute(seen)["gradient.top_share"] == pytest.approx(1.0)
    assert GradientRank().compute(seen)["gradient.effective_rank"] == pytest.approx(1.0)
    assert seen.zero_share == pytest.approx(2 / 3)
    assert seen.dead_share == 0


def test_closed_form_of_orthogonal_tokens() -> None:
    seen = spectrum_of(torch.eye(5), 2 * torch.eye(5))
    assert seen.singular_values.tolist() == pytest.approx([2.0] * 5)
    assert GradientRank().compute(seen)["gradient.effective_rank"] == pytest.approx(5)
    assert seen.zero_share == 0  # no unit is silent at every token, though most entries are 0


def test_tokens_without_a_delta_change_nothing() -> None:
    x, delta = random(1, 40, 30), random(2, 40, 20)
    delta[5:] = 0  # labels on the first tokens only
    seen = spectrum_of(x, delta)
    exact = np.linalg.svd(naive(x, delta), compute_uv=False)
    assert seen.singular_values.size == 20
    assert_exact(seen.singular_values[:5], exact[:5])
    assert (seen.singular_values[5:] == 0).all()


def test_dead_input_units_are_counted() -> None:
    x, delta = random(1, 6, 8).abs() + 0.1, random(2, 6, 5)
    x[:, :2] = 0
    assert spectrum_of(x, delta).dead_share == 0.25
    assert spectrum_of(x, delta).zero_share == 0.25


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e25, 8e37])
def test_factors_of_extreme_size(scale: float) -> None:
    x, delta = random(1, 6, 8, scale=scale), random(2, 6, 5, scale=scale)
    exact = np.linalg.svd(numpy64(delta).T @ numpy64(x), compute_uv=False)
    np.testing.assert_allclose(spectrum_of(x, delta).singular_values, exact, rtol=1e-5)
    assert spectrum_of(x, delta).norm == pytest.approx(np.linalg.norm(exact), rel=1e-5)


@pytest.mark.parametrize("tokens", [6, 400])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_factor_gives_nan_and_a_count(dtype: torch.dtype, tokens: int) -> None:
    x, delta = random(1, tokens, 300, dtype=dtype), random(2, tokens, 300, dtype=dtype)
    delta[2, 3], x[1, 1] = math.inf, math.nan
    seen = spectrum_of(x, delta)
    assert np.isnan(seen.singular_values).all()
    assert math.isnan(GradientNorm().compute(seen)["gradient.norm"])
    assert GradientNonfinite().compute(seen)["gradient.nonfinite"] == 2
    assert GradientRank().compute(seen) == {}


@pytest.mark.parametrize("tokens", [3, 400])
def test_a_zero_gradient_has_norm_zero_and_no_rank(tokens: int) -> None:
    seen = spectrum_of(torch.zeros(tokens, 300), torch.ones(tokens, 300))
    assert GradientNorm().compute(seen) == {"gradient.norm": 0, "gradient.zero_share": 1}
    assert GradientRank().compute(seen) == {}


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 tokens"):
        reduce_factors(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="at least one"):
        reduce_factors(torch.ones(0, 2), torch.ones(0, 2))


# -- the norm alone ------------------------------------------------------------------------------------------------


def size_of(x: Tensor, delta: Tensor) -> GradientSize:
    packed, rebuild = reduce_size(x, delta)
    seen = rebuild(packed.numpy())
    if not seen.nonfinite:
        assert norm_of(packed).item() == pytest.approx(seen.norm, rel=1e-12)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=seeds,
    tokens=st.integers(1, 300),
    width_in=st.integers(1, 50),
    width_out=st.integers(1, 50),
    powers=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
    silent=st.integers(0, 3),
)
@settings(max_examples=40)
def test_the_norm_alone(
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    width_in: int,
    width_out: int,
    powers: tuple[int, int],
    silent: int,
) -> None:
    """To five digits, over the dtype's range; the rest is that of the spectrum's, bit by bit."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    scales = [1.0 if narrow else 10.0 ** (1.5 * power) for power in powers]
    x, delta = (
        (random(seed + k, tokens, width, dtype=torch.float64) * scale).to(dtype)
        for k, (width, scale) in enumerate(zip((width_in, width_out), scales, strict=True))
    )
    delta[:silent] = 0
    seen, whole = size_of(x, delta), spectrum_of(x, delta)
    assert seen.norm == pytest.approx(np.linalg.norm(naive(x, delta)), rel=2e-5)
    rest = ("zero_share", "dead_share", "nonfinite")
    assert [getattr(seen, name) for name in rest] == [getattr(whole, name) for name in rest]


@given(seed=seeds, tokens=st.integers(2, 200), left=st.floats(-7, 0), spread=st.floats(0, 30))
@settings(max_examples=40, deadline=None)
def test_the_norm_of_tokens_that_cancel_and_of_rows_of_every_size(
    seed: int, tokens: int, left: float, spread: float
) -> None:
    """What fp32 Gram matrices would lose is found in float64."""
    x, delta = random(seed, tokens, 40).double(), random(seed + 1, tokens, 30).double()
    rows = torch.logspace(0, -spread, tokens, dtype=torch.float64)[:, None]
    x, delta = x / rows * 10 ** (-spread / 2), delta * rows  # each product alike, each factor over many decades
    x, delta = torch.cat([x, x]).float(), torch.cat([delta, -delta * (1 - 10**left)]).float()
    assert size_of(x, delta).norm == pytest.approx(np.linalg.norm(naive(x, delta)), rel=2e-5)


def test_the_norm_alone_of_what_is_lost_zero_or_of_high_rank() -> None:
    x, delta = random(1, 9, 20), random(2, 9, 30)
    for lost in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[3, 4] = lost
        seen = size_of(bad, delta)
        assert (seen.nonfinite, math.isnan(seen.norm)) == (1, True)
    assert size_of(x, 0 * delta).norm == 0
    x, delta = random(1, 400, 300), random(2, 400, 320)
    assert size_of(x, delta).norm == spectrum_of(x, delta).norm  # an estimate, and the same
    with pytest.raises(ValueError, match="3 and 4 tokens"):
        reduce_size(torch.ones(3, 2), torch.ones(4, 2))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_norm_does_not_follow_a_lower_precision_of_products(precision: str) -> None:
    x, delta = random(1, 100, 60), random(2, 100, 50)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = size_of(x, delta).norm
        wrong = torch.zeros(60, 50)  # as such a product is, but by more
        assert reduce_size(x, delta, wrong)[0].tolist() == reduce_size(x, delta)[0].tolist()
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == pytest.approx(np.linalg.norm(naive(x, delta)), rel=1e-6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds, tokens=st.integers(30, 400), silent=st.integers(0, 3), left=st.floats(-7, 0))
@settings(max_examples=20, deadline=None)
def test_the_norm_of_the_product_that_a_backward_has_formed(
    dtype: torch.dtype, turned: bool, seed: int, tokens: int, silent: int, left: float
) -> None:
    """Also beyond rank 256, and beside its singular values; where tokens cancel, as without it."""
    left = left if tokens <= 128 else 0.0
    x, delta = random(seed, tokens, 300, dtype=dtype), random(seed + 1, tokens, 280, dtype=dtype)
    x[:, :silent], delta[:, :silent] = 0, 0
    x, delta = torch.cat([x, x]), torch.cat([delta, -delta * (1 - 10**left)])
    product = (delta.T @ x).T if turned else x.T @ delta
    packed, rebuild = reduce_size(x, delta, product)
    found, rest = rebuild(packed.numpy()), size_of(x, delta)
    exact = np.linalg.norm(naive(x, delta))
    assert found.norm == pytest.approx(exact, rel=2e-5)
    packed, make = reduce_factors(x, delta, product)
    assert make(packed.numpy()).norm == pytest.approx(exact, rel=2e-5)
    assert found.zero_share == pytest.approx(rest.zero_share, abs=1e-12)
    assert (found.dead_share, found.nonfinite) == (rest.dead_share, 0)


@pytest.mark.parametrize(
    ("width", "dtype"), [(40, torch.float32), (60, torch.bfloat16)], ids=["another shape", "less precise"]
)
def test_a_product_that_is_another_or_less_precise_is_not_read(width: int, dtype: torch.dtype) -> None:
    x, delta = random(1, 100, 60), random(2, 100, 50)
    packed, _ = reduce_size(x, delta, torch.zeros(width, 50, dtype=dtype))
    assert packed.tolist() == reduce_size(x, delta)[0].tolist()


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_what_is_not_finite_in_the_factors_of_a_product_is_counted_there(lost: float) -> None:
    x, delta = random(1, 100, 60), random(2, 100, 50)
    x[3, 4] = lost
    packed, rebuild = reduce_size(x, delta, x.T @ delta)
    assert rebuild(packed.numpy()).nonfinite == 1


def test_the_size_of_a_gradient_that_is_there_itself() -> None:
    gradient = random(1, 40, 30)
    gradient[:, 3] = gradient[5] = 0
    for scaled in (gradient, gradient * 1e-25, gradient * 1e25):
        whole, size = (
            rebuild(packed.numpy()) for packed, rebuild in (reduce_matrix(scaled), reduce_matrix_size(scaled))
        )
        assert size.norm == pytest.approx(whole.norm, rel=1e-6)
        assert (size.zero_share, size.dead_share, size.nonfinite) == (
            whole.zero_share,
            whole.dead_share,
            whole.nonfinite,
        )


# -- several passes -------------------------------------------------------------------------------------------------


def later(*pairs: tuple[Tensor, Tensor], with_spectra: bool = True) -> dict[str, object]:
    keeper = PassKeeper()
    keeper.first(*(reduce_factors if with_spectra else reduce_size)(*pairs[0]))
    for x, delta in pairs[1:]:
        keeper.later(x, delta)
    reduced = keeper.reduce(with_spectra)
    assert reduced is not None
    packed, rebuild = reduced
    seen = rebuild(packed.numpy())
    spectra = PassSpectrum().compute(seen) if isinstance(seen, LaterSpectra) else {}
    return {**GradientPasses().compute(seen), **spectra}


def test_one_pass_is_counted_and_no_more() -> None:
    assert later((random(1, 3, 4), random(2, 3, 5))) == {"gradient.passes": 1, "gradient.nonfinite_passes": 0}
    assert PassKeeper().reduce() is None


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=2, max_size=8))
def test_the_last_and_the_worst_of_several_passes(scales: list[tuple[float, float]]) -> None:
    pairs = [(random(k, 3, 4) * a, random(k + 50, 3, 5) * b) for k, (a, b) in enumerate(scales)]
    found = later(*pairs)
    sizes = [np.linalg.norm(numpy64(x)) * np.linalg.norm(numpy64(delta)) for x, delta in pairs]
    worst, last = naive(*pairs[int(np.argmax(sizes))]), naive(*pairs[-1])
    assert found["gradient.passes"] == len(pairs)
    assert found["gradient.norm_last"] == pytest.approx(np.linalg.norm(last), rel=1e-5)
    assert found["gradient.norm_worst"] == pytest.approx(np.linalg.norm(worst), rel=1e-5)
    exact = np.linalg.svd(last, compute_uv=False)[:3]
    np.testing.assert_allclose(found["gradient.spectrum_last"], exact, rtol=1e-5, atol=1e-6 * exact[0])
    sizes_alone = later(*pairs, with_spectra=False)
    assert sizes_alone == {name: pytest.approx(found[name], rel=1e-5) for name in found if "spectrum" not in name}


def test_a_nonfinite_pass_is_the_worst_and_all_are_counted() -> None:
    good, bad = (random(1, 3, 4), random(2, 3, 5)), (random(1, 3, 4), torch.full((3, 5), math.nan))
    found = later(good, bad, bad, (1e6 * good[0], good[1]))
    assert found["gradient.nonfinite_passes"] == 2
    assert math.isnan(found["gradient.norm_worst"])  # type: ignore[arg-type]
    assert math.isfinite(found["gradient.norm_last"])  # type: ignore[arg-type]


# -- angles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=seeds,
    tokens=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_cosines(dtype: torch.dtype, seed: int, tokens: tuple[int, int], widths: tuple[int, int]) -> None:
    def factors(k: int) -> Factors:
        return Factors(
            random(seed + k, tokens[k], widths[0], dtype=dtype), random(seed + k + 2, tokens[k], widths[1], dtype=dtype)
        )

    now, before = factors(0), factors(1)
    weight, previous = random(seed + 5, *widths[::-1], dtype=dtype), random(seed + 6, *widths[::-1], dtype=dtype)
    own, products = inner_product(now, now), [inner_product(before, before), inner_product(now, before)]
    for transposed in (False, True):
        pair = (weight.T.contiguous(), previous.T.contiguous()) if transposed else (weight, previous)
        packed = torch.cat([torch.stack([own, *products]), product_with_update(now, *pair, transposed)])
        readings = GradientAlignment().compute(alignment_from(packed.numpy(), has_previous=True))
        g, g_before, change = (
            naive(now.x, now.delta),
            naive(before.x, before.delta),
            numpy64(weight) - numpy64(previous),
        )
        for name, other in (("cosine_previous", g_before), ("cosine_update", change)):
            if not np.linalg.norm(other):  # two small weights in bfloat16 may be equal: there is no direction
                assert f"gradient.{name}" not in readings
                continue
            expected = np.sum(g * other) / (np.linalg.norm(g) * np.linalg.norm(other))
            assert readings[f"gradient.{name}"] == pytest.approx(expected, abs=2e-4)


def test_cosine_of_descent_is_minus_one_and_of_nothing_absent() -> None:
    now = Factors(random(1, 4, 6), random(2, 4, 5))
    weight = random(3, 5, 6)
    update = product_with_update(now, weight - 0.1 * (now.delta.T @ now.x), weight, False)
    own = inner_product(now, now)
    packed = torch.cat([torch.stack([own, 0 * own, 0 * own]), update]).numpy()
    readings = GradientAlignment().compute(alignment_from(packed, has_previous=False))
    assert readings == {"gradient.cosine_update": pytest.approx(-1, abs=1e-5)}
    packed[3:] = 0  # an edit that moved nothing
    assert GradientAlignment().compute(alignment_from(packed, has_previous=False)) == {}


def test_a_zero_gradient_has_no_angle_whatever_rounding_makes_of_it() -> None:
    for square in (0.0, -1e-20):
        packed = np.array([square, 1.0, 0.0, 0.0, 1.0])
        assert GradientAlignment().compute(alignment_from(packed, has_previous=True)) == {}
    lost = np.array([math.nan, 1.0, math.nan, math.nan, 1.0])
    assert GradientAlignment().compute(alignment_from(lost, has_previous=True)) == {}
