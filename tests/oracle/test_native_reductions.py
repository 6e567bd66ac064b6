"""What native code reduces in one call, and what is done without it, against plain float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stabilitylab.probes import native_scan
from stabilitylab.probes.gradient_factors import reduce_factors, reduce_size
from stabilitylab.probes.gram import norm_of_product
from stabilitylab.probes.logits_pass import reduce_logits
from stabilitylab.probes.native_scan import (
    ASKED,
    bare_sweep,
    rows_alike,
    scan_extremes,
    scan_factor,
    scan_grams,
    scan_product,
    scan_rows,
    softmax_sums,
    table_of,
    weight_pass,
)
from stabilitylab.probes.normaliser_pass import reduce_normaliser
from stabilitylab.probes.output_pass import OutputKeeper, OutputPass, reduce_output
from stabilitylab.probes.state_pass import SAMPLE, count_bad
from stabilitylab.probes.weight_pass import extremes, reduce_weight, same_sample
from tests.numbers import DTYPES, random

LOST = [math.nan, -math.nan, math.inf, -math.inf]
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
    kind=st.sampled_from(DTYPES),
    dims=st.integers(1, 3),
    lost=st.sampled_from([None, None, *LOST]),
    power=st.sampled_from([-4, 0, 4, 30]),
)
def test_an_output(
    path: str, seed: int, shape: tuple[int, int, int], kind: torch.dtype, dims: int, lost: float | None, power: int
) -> None:
    scale = 10.0**power if kind not in (torch.float16,) else 1.0
    output = random(seed, *shape[-dims:], dtype=kind, scale=scale)
    if lost is not None:
        output.view(-1)[seed % output.numel()] = lost
    seen = OutputPass.from_host(reduce_output(output).numpy(), kind)
    plain = output.double().numpy()
    with np.errstate(invalid="ignore"):
        expected = [np.sqrt(np.mean(plain**2)), np.abs(plain).max()]
    if np.isnan(plain).any():
        assert math.isnan(seen.max_abs)
    elif lost is None:
        assert [seen.rms, seen.max_abs] == pytest.approx(expected, rel=1e-5)
        if dims > 2 and shape[1] > 1:
            later = plain[..., 1:, :]
            beyond = [np.sqrt(np.mean(later**2)), np.abs(later).max()]
            assert [seen.rms_beyond_first, seen.max_abs_beyond_first] == pytest.approx(beyond, rel=1e-5)
    else:
        assert math.isinf(seen.max_abs)
    assert (seen.rms_beyond_first is None) == (dims < 3 or shape[1] == 1)
    assert seen.nonfinite == np.count_nonzero(~np.isfinite(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extremes_are_the_same_bits_wherever_they_are(path: str, dtype: torch.dtype) -> None:
    for lost in (0.0, -0.0, *LOST):
        for at in (0, 7, 99):
            tensor = random(at, 100, dtype=dtype)
            tensor[at] = lost
            low, high = (end.item() for end in extremes(tensor))
            plain = tensor.double()
            expected = (plain.min().item(), plain.max().item())
            assert (low, high) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@quick
@given(seed=st.integers(0, 10_000), bad=st.lists(st.sampled_from(LOST), max_size=5))
def test_what_is_not_finite_in_many_tensors(path: str, seed: int, bad: list[float]) -> None:
    whole = [random(seed + at, 3 + at, 5, dtype=dtype) for at, dtype in enumerate(DTYPES)]
    sampled = [random(seed + at, 4 * SAMPLE + at, dtype=dtype) for at, dtype in enumerate(DTYPES)]
    for at, value in enumerate(bad):
        whole[at % 4].view(-1)[at % 3] = value
        sampled[at % 4][8 * (at + 1)] = value
    steps = [tensor.numel() // SAMPLE for tensor in sampled]
    looked_at = [tensor[::step] for tensor, step in zip(sampled, steps, strict=True)]
    turned = random(seed, 6, 4).T  # not contiguous
    for held in (whole, [turned, *whole]):
        expected = [np.count_nonzero(~np.isfinite(tensor.double().numpy())) for tensor in (*held, *looked_at)]
        assert count_bad(held, sampled).tolist() == expected


@quick
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 20),
    units=st.integers(1, 40),
    kind=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_factor_alive_and_silent(path: str, seed: int, tokens: int, units: int, kind: torch.dtype) -> None:
    x, delta = random(seed, tokens, units, dtype=kind), random(seed + 1, tokens, 7, dtype=kind)
    generator = torch.Generator().manual_seed(seed)
    x[:, torch.rand(units, generator=generator) < 0.3] = -0.0
    delta[torch.rand(tokens, generator=generator) < 0.3] = 0
    seen = scan_factor(x)
    if path == "native" and bool((x != 0).any()):
        assert seen is not None
        assert seen.norm == pytest.approx(x.double().norm().item(), rel=1e-12)
    if seen is not None:
        assert seen.silent_share == (x == 0).all(dim=0).double().mean().item()
        assert torch.equal(seen.lives, (x != 0).any(dim=1))
    for reduce in (reduce_factors, reduce_size):
        packed, rebuild = reduce(x, delta)
        found = rebuild(packed.numpy())
        assert found.norm == pytest.approx((delta.double().T @ x.double()).norm().item(), rel=1e-5, abs=1e-30)
        assert found.dead_share == pytest.approx((x == 0).all(dim=0).double().mean().item(), abs=1e-12)


@quick
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 9, 511, 512, 513, 1500])),
    kind=st.sampled_from(DTYPES),
    power=st.sampled_from([-3, 0, 2]),
    masked=st.booleans(),
    ties=st.booleans(),
)
def test_the_logits_of_each_rows_last_token(
    path: str, seed: int, shape: tuple[int, int, int], kind: torch.dtype, power: int, masked: bool, ties: bool
) -> None:
    logits = random(seed, *shape, dtype=kind, scale=10.0**power)
    if masked:
        logits[..., 1::3] = -math.inf
    if ties:
        logits[..., -1] = logits.amax(dim=-1)
    found = reduce_logits(logits, None)
    last = logits[:, -1].double()
    weights = torch.softmax(last, dim=-1)
    entropy = -(weights * weights.clamp_min(1e-300).log()).sum(dim=-1)
    top = last.sort(dim=-1, descending=True).values
    margin = top[:, 0] - top[:, min(1, shape[-1] - 1)]
    expected = [last.logsumexp(dim=-1), entropy, margin, weights.amax(dim=-1)]
    assert found[2:6].tolist() == pytest.approx([part.mean().item() for part in expected], rel=1e-6, abs=1e-9)
    assert found[6] == (~torch.isfinite(logits)).sum()


@pytest.mark.parametrize("lost", LOST)
def test_logits_that_are_lost(path: str, lost: float) -> None:
    logits = random(1, 2, 3, 40)
    logits[0, -1, 7] = lost
    expected = torch.logsumexp(logits[:, -1].double(), dim=-1).mean().item() if lost < 0 else math.nan
    found = reduce_logits(logits, None)
    assert found[2].item() == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert found[6] == 1


@quick
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    columns=st.integers(16, 70),
    kind=st.sampled_from(DTYPES),
    dims=st.integers(1, 3),
)
def test_a_sample_of_each_row_is_further_right_from_row_to_row(
    path: str, seed: int, rows: int, columns: int, kind: torch.dtype, dims: int
) -> None:
    rows = 1 if dims == 1 else rows
    weight = random(seed, rows, columns, dtype=kind)
    at = seed % weight.numel()
    other = weight.clone()
    other.view(-1)[at] += 1
    row, column = divmod(at, columns)
    start = min(row % math.ceil(columns / 16) * 16, columns - 16)
    shape = {1: (columns,), 2: (rows, columns), 3: (rows, columns, 1)}[dims]
    same = same_sample(weight.view(shape), other.view(shape))
    assert same == (not start <= column < start + 16)


@quick
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 6),
    units=st.integers(1, 20),
    kinds=st.tuples(*[st.sampled_from([torch.float32, torch.float64])] * 2),
    odd=st.lists(st.sampled_from([*LOST, 0.0, 0.0]), max_size=4),
    learns=st.booleans(),
    counted=st.sampled_from([None, 0.0, 3.0, math.nan]),
)
def test_a_normaliser_and_what_enters_it(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    rows: int,
    units: int,
    kinds: tuple[torch.dtype, torch.dtype],
    odd: list[float],
    learns: bool,
    counted: float | None,
) -> None:
    mean, std = random(seed, units, dtype=kinds[0]), random(seed + 1, units, dtype=kinds[0]).abs()
    entered, beside = random(seed + 2, 2, rows, units, dtype=kinds[1]), random(seed + 3, 2, rows, 3, dtype=kinds[1])
    generator = torch.Generator().manual_seed(seed)
    for each in (entered, beside):
        each[torch.rand(2, rows, generator=generator) < 0.3] = 0
    for at, value in enumerate(odd):
        held = (std, mean, entered.view(-1), std)[at]
        held[seed % max(held.numel(), 1) : seed % max(held.numel(), 1) + 1] = value
    if seed % 5 == 0:
        std[:], mean[:] = (0.0, 0.0) if seed % 2 else (math.nan, math.nan)
    count = None if counted is None else torch.tensor(counted)
    given = (mean, std, list(entered), 1e-7, count)
    native = reduce_normaliser(*given, learns=learns, beside=list(beside))
    with monkeypatch.context() as without:
        without.setattr(native_scan, "_BUILT", None)
        plain = reduce_normaliser(*given, learns=learns, beside=list(beside))
    torch.testing.assert_close(native, plain, rtol=0, atol=0, equal_nan=True)


def test_squares_of_float64_that_leave_its_range_are_left_to_another_way() -> None:
    for scale in (1e200, 1e-200):
        huge = torch.full((3, 4), scale, dtype=torch.float64)
        assert scan_rows(huge) is None
        assert scan_factor(huge) is None


def test_what_native_code_can_not_read_is_not_given_to_it() -> None:
    turned, whole, empty = random(1, 4, 6).T, torch.arange(12).reshape(3, 4), torch.empty(0, 3)
    for tensor in (turned, whole, empty):
        assert scan_rows(tensor) is None
        assert scan_extremes(tensor) is None
        assert table_of([(tensor, 1)]) is None
        assert rows_alike(tensor, tensor, 1) is None
        assert softmax_sums(tensor) is None
    assert scan_factor(random(1, 3, 4, dtype=torch.bfloat16)) is None
    assert bare_sweep(turned, (turned, turned)) is None
    assert scan_rows(random(1, 5)) is None


def test_numpy_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASKED, "numpy")
    assert native_scan._load() is None


def test_the_bare_loop_does_what_the_weight_pass_does() -> None:
    if weight_pass() == "numpy":
        pytest.skip("no native code here: it needs a C compiler and `make`, which builds it")
    weight, first, before = (random(seed, 30, 40) for seed in range(3))
    loop = bare_sweep(weight, (first, before.clone()))
    assert loop is not None
    squares = loop()
    packed = reduce_weight(weight, first, before, first.double().norm()).packed
    assert [math.sqrt(square) for square in squares[:3]] == pytest.approx(packed[[0, 2, 3]].tolist(), rel=1e-12)  # type: ignore[index]


def test_the_worst_output_in_numbers() -> None:
    keeper = OutputKeeper()
    for value in (3.0, -5.0, math.inf, 1e30, math.nan, 2.0):
        keeper.add(torch.tensor([[1.0, value]]))
    found = keeper.reduce()
    assert found is not None
    assert found.tolist() == [6, 2, 2.0, math.inf]


@quick
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 20),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    scale=st.sampled_from([1e-40, 1e-18, 1.0, 1e18, 1e36]),
)
def test_the_norm_of_a_small_product(path: str, seed: int, rows: int, widths: tuple[int, int], scale: float) -> None:
    torch.manual_seed(seed)
    left, right = scale * torch.randn(rows, widths[0]), torch.randn(rows, widths[1])
    norm = float(torch.linalg.vector_norm(left.double().T @ right.double()))
    assert float(norm_of_product(left, right)) == pytest.approx(norm, rel=1e-5)
    seen = scan_product(left, right)
    assert (seen is not None) == (path == "native")
    if seen is not None:
        assert math.sqrt(seen.square) == pytest.approx(norm, rel=1e-9)
        assert seen.bound == pytest.approx(float((left.double().norm(dim=1) * right.double().norm(dim=1)).sum()))


def test_a_small_product_of_rows_that_cancel_each_other(path: str) -> None:
    torch.manual_seed(4)
    left, right = torch.randn(1, 40).repeat(2, 1), torch.randn(1, 30).repeat(2, 1)
    right[1] *= -1
    right[1, 3] *= 1 + 1e-6
    norm = float(torch.linalg.vector_norm(left.double().T @ right.double()))
    assert 0 < norm < 1e-4
    assert float(norm_of_product(left, right)) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("lost", LOST)
def test_what_is_not_finite_in_a_small_product(path: str, lost: float) -> None:
    left, right = torch.randn(5, 40), torch.randn(5, 30)
    left[2, 7] = lost
    assert not math.isfinite(float(norm_of_product(left, right)))


@pytest.mark.parametrize("silent", [0, 5, 99, 100])
def test_the_norm_alone_of_many_tokens_some_of_them_without_a_gradient(path: str, silent: int) -> None:
    torch.manual_seed(silent)
    x, delta = torch.randn(100, 300), torch.randn(100, 200)
    delta[:silent] = 0
    packed, rebuild = reduce_size(x, delta)
    assert rebuild(packed.numpy()).norm == pytest.approx(float((delta.double().T @ x.double()).norm()), rel=1e-5)


@quick
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 140),
    widths=st.tuples(st.integers(1, 1_500), st.integers(1, 300)),
    silent=st.integers(0, 3),
)
def test_the_norm_of_a_larger_product(path: str, seed: int, rows: int, widths: tuple[int, int], silent: int) -> None:
    torch.manual_seed(seed)
    left, right = torch.randn(rows, widths[0]), torch.randn(rows, widths[1])
    left[:silent] = 0
    lives = (left != 0).any(dim=1)
    plain = [each.double() for each in (left, right)]
    norm = float(torch.linalg.vector_norm(plain[0].T @ plain[1]))
    assert float(norm_of_product(left, right, lives)) == pytest.approx(norm, rel=1e-5)
    seen = scan_grams(left, right, lives)
    assert (seen is not None) == (path == "native" and _multiplies_and_adds())
    if seen is not None:
        sizes = torch.stack([each.square().sum(dim=1) for each in plain])
        bound = float(sizes.prod(dim=0).sqrt().sum())
        assert seen.bound == pytest.approx(bound, rel=1e-5)
        assert abs(seen.square - norm**2) <= 1e-6 * bound**2
        if lives.any():
            ends = [float(each) for each in torch.aminmax(sizes[:, lives])]
            assert [seen.least, seen.most] == pytest.approx(ends, rel=1e-5)


def _multiplies_and_adds() -> bool:
    return native_scan._BUILT is not None and bool(native_scan._BUILT.MULTIPLIES_AND_ADDS)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("rows", [slice(None), slice(7, 8)], ids=["all", "one"])
def test_the_norm_of_a_larger_product_whose_squares_leave_fp32(path: str, scale: float, rows: slice) -> None:
    torch.manual_seed(8)
    left, right = torch.randn(60, 900), torch.randn(60, 300)
    right[rows] *= 1e-6
    left[rows] *= scale
    norm = float(torch.linalg.vector_norm(left.double().T @ right.double()))
    assert float(norm_of_product(left, right)) == pytest.approx(norm, rel=1e-5)


def test_a_larger_product_of_rows_that_cancel_each_other(path: str) -> None:
    torch.manual_seed(9)
    left, right = torch.randn(30, 900).repeat(2, 1), torch.randn(30, 300).repeat(2, 1)
    right[30:] *= -1 - 1e-4
    norm = float(torch.linalg.vector_norm(left.double().T @ right.double()))
    assert float(norm_of_product(left, right)) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("lost", LOST)
def test_what_is_not_finite_in_a_larger_product(path: str, lost: float) -> None:
    left, right = torch.randn(50, 900), torch.randn(50, 300)
    right[49, 299] = lost
    assert not math.isfinite(float(norm_of_product(left, right)))


def test_a_product_that_many_threads_make_sooner_is_not_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = torch.randn(128, 3_072), torch.randn(128, 768)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert (scan_grams(*factors, None) is not None) == _multiplies_and_adds()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert scan_grams(*factors, None) is None
    assert scan_grams(torch.randn(600, 2), torch.randn(600, 2), None) is None
