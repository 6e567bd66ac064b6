"""The probes of an editor's state against naive float64 implementations that share no code with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes import linear_solve
from stabilitylab.probes.codebook import (
    Codebook,
    CodebookHits,
    CodebookPass,
    HitShare,
    query_of,
    reduce_codebook,
    reduce_hits,
)
from stabilitylab.probes.editor_state import NormalisedInput, Normaliser, NormaliserNonfinite, NormaliserRows
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
from stabilitylab.probes.normaliser_pass import MEND_GUARD, NormaliserPass, _reduce_on_device, reduce_normaliser
from stabilitylab.probes.null_space import KeyCache, KeyCachePass, NullSpace, NullSpacePass, trace_of
from stabilitylab.probes.rank_one import (
    ClampHits,
    Denominator,
    TargetValue,
    UpdateDenominator,
    ValueClamp,
    ValueRatio,
    reduce_denominator,
    reduce_target,
)
from stabilitylab.probes.side_memory import SideMemory, SideMemoryPass, reduce_side_memory

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPOILT = [math.nan, math.inf, -math.inf]
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 1.0, 1e3])


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def numpy64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def norm(values: np.ndarray) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.reshape(-1)))


# -- the normaliser ---------------------------------------------------------------------------------------------------


@given(seed=seeds, units=st.integers(1, 20), bad=st.integers(0, 5), value=st.sampled_from(SPOILT))
def test_entries_of_the_normaliser_that_are_not_finite(seed: int, units: int, bad: int, value: float) -> None:
    statistics = np.random.default_rng(seed).uniform(0.1, 2, size=(2, units))
    statistics.reshape(-1)[:bad] = value
    mean, std = map(torch.tensor, statistics)
    seen = NormaliserPass.from_host(reduce_normaliser(mean, std, []).numpy())
    assert NormaliserNonfinite().compute(seen) == {"editor.nonfinite": min(bad, 2 * units)}
    assert math.isnan(seen.std_min) == bool(np.isnan(statistics[1]).any())


def test_a_std_from_a_single_row_is_nan_for_good() -> None:
    rows = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0], [2.0, 1.0]])]
    variance = sum(row.var(0) for row in rows if len(row) > 1) + torch.full((2,), math.nan)  # what one row gives
    mean = torch.cat(rows).mean(0)
    seen = NormaliserPass.from_host(reduce_normaliser(mean, variance.sqrt(), []).numpy())
    assert NormaliserNonfinite().compute(seen)["editor.nonfinite"] == 2


KINDS = {"spread": (0.3, 2.0), "zero": 0.0, "nan": math.nan, "infinite": math.inf}


@given(
    seed=seeds,
    units=st.integers(1, 24),
    count=st.sampled_from([None, math.nan, 0.0, 1.0, 500.0]),
    means=st.sampled_from(["spread", "zero", "nan"]),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    entered=st.booleans(),
    learns=st.booleans(),
)
def test_what_statistics_were_made_from(
    seed: int, units: int, count: float | None, means: str, kinds: list[str], entered: bool, learns: bool
) -> None:
    rng = np.random.default_rng(seed)

    def drawn(kind: str) -> float:
        of = KINDS[kind]
        return float(rng.uniform(*of)) if isinstance(of, tuple) else of

    mean = [drawn(means) for _ in range(units)]
    std = [drawn(kinds[rng.integers(len(kinds))]) for _ in range(units)]
    rows = None if count is None else torch.tensor([count])
    inputs = [torch.ones(2, units)] if entered else []
    packed = reduce_normaliser(torch.tensor(mean), torch.tensor(std), inputs, rows=rows, learns=learns)
    seen = NormaliserPass.from_host(packed.numpy())

    all_nan = all(map(math.isnan, std))
    begun = all(m == 0 for m in mean) and (all(s == 0 for s in std) or all_nan)
    begun = begun or (learns and all_nan and all(map(math.isnan, mean)))
    known = count if count is not None and not math.isnan(count) else 0.0 if begun else None
    readings = {} if known is None else {"editor.seen_rows": known}
    bad = sum(not math.isfinite(value) for value in (*mean, *std))
    zeros = [unit for unit, value in enumerate(std) if value == 0]
    if known == 0 and not entered:
        assert dict(Normaliser().compute(seen)) == {}
        assert NormaliserNonfinite().compute(seen) == ({} if bad else {"editor.nonfinite": 0})
    else:
        readings["editor.no_spread"] = all(map(math.isfinite, mean)) and not any(value > 0 for value in std)
        assert NormaliserNonfinite().compute(seen) == {"editor.nonfinite": bad}
        spread = dict(Normaliser().compute(seen))
        assert list(np.atleast_1d(spread.get("editor.zero_units", []))) == zeros[:8]
        assert spread["editor.std_zeros"] == len(zeros)
    assert NormaliserRows().compute(seen) == readings


def test_the_guard_is_the_editors_own() -> None:
    guard = float(np.finfo(np.float32).eps)
    packed = reduce_normaliser(torch.zeros(1), torch.zeros(1), [torch.tensor([[0.5]])], guard)
    assert NormalisedInput().compute(NormaliserPass.from_host(packed.numpy()))["editor.input_max"] == 0.5 / guard


# -- rank-one updates -------------------------------------------------------------------------------------------------


def denominator(key: Tensor, direction: Tensor) -> dict:
    seen = Denominator.from_host(reduce_denominator(key, direction).numpy())
    return dict(UpdateDenominator().compute(seen))


def value_ratio(target: Tensor, initial: Tensor) -> dict:
    return dict(ValueRatio().compute(TargetValue.from_host(reduce_target(target, initial).numpy())))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, edits=st.integers(0, 5), width=st.integers(1, 30), scale=scales)
def test_denominator(dtype: torch.dtype, seed: int, edits: int, width: int, scale: float) -> None:
    shape = (edits, width) if edits else (width,)
    key, direction = random(seed, *shape, dtype=dtype, scale=scale), random(seed + 1, *shape, dtype=dtype)
    found = denominator(key, direction)
    pairs = list(zip(numpy64(key).reshape(-1, width), numpy64(direction).reshape(-1, width), strict=True))
    products = [sum(a * b for a, b in zip(k, u, strict=True)) for k, u in pairs]
    sizes = [norm(k) * norm(u) for k, u in pairs]
    ratios = [abs(p) / s if s else 0.0 for p, s in zip(products, sizes, strict=True)]
    worst = int(np.argmin(ratios))
    assert found["editor.denominator"] == pytest.approx(products[worst], rel=1e-9, abs=1e-12 * max(sizes))
    if sizes[worst]:
        assert found["editor.denominator_ratio"] == pytest.approx(ratios[worst], rel=1e-9, abs=1e-12)
    else:
        assert "editor.denominator_ratio" not in found


def test_closed_forms_of_the_denominator() -> None:
    orthogonal = denominator(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert orthogonal == {"editor.denominator": 0.0, "editor.denominator_ratio": 0.0}
    assert denominator(torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])) == {
        "editor.denominator": -50.0,
        "editor.denominator_ratio": 1.0,
    }
    assert denominator(torch.zeros(3), torch.ones(3)) == {"editor.denominator": 0.0}
    huge = denominator(torch.full((2,), 3e38), torch.full((2,), 3e38))
    assert huge["editor.denominator_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("value", SPOILT)
def test_a_denominator_that_is_not_finite_wins(value: float) -> None:
    key, direction = random(0, 4, 3), random(1, 4, 3)
    key[2, 1] = value
    assert not math.isfinite(denominator(key, direction)["editor.denominator"])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, edits=st.integers(0, 5), width=st.integers(1, 30), scale=scales)
def test_value_ratio(dtype: torch.dtype, seed: int, edits: int, width: int, scale: float) -> None:
    shape = (edits, width) if edits else (width,)
    target, initial = random(seed, *shape, dtype=dtype, scale=scale), random(seed + 1, *shape, dtype=dtype)
    pairs = zip(numpy64(target).reshape(-1, width), numpy64(initial).reshape(-1, width), strict=True)
    sizes = [(norm(after), norm(before)) for after, before in pairs]
    if all(before for _, before in sizes):
        expected = max(after / before for after, before in sizes)
        assert value_ratio(target, initial)["editor.value_ratio"] == pytest.approx(expected, rel=1e-9)


def test_closed_forms_of_the_value_ratio() -> None:
    assert value_ratio(torch.tensor([6.0, 8.0]), torch.tensor([0.0, 5.0])) == {"editor.value_ratio": 2.0}
    assert value_ratio(torch.ones(2), torch.zeros(2)) == {}
    assert value_ratio(torch.zeros(2), torch.zeros(2)) == {}
    assert value_ratio(torch.tensor([[1.0], [9.0]]), torch.tensor([[1.0], [3.0]])) == {"editor.value_ratio": 3.0}
    assert value_ratio(torch.tensor([math.inf]), torch.ones(1)) == {"editor.value_ratio": math.inf}
    assert math.isnan(value_ratio(torch.tensor([[math.nan], [9.0]]), torch.ones(2, 1))["editor.value_ratio"])


@pytest.mark.parametrize("reduce", [reduce_denominator, reduce_target])
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (3,)), ((0,), (0,)), ((), ()), ((1, 2, 3), (1, 2, 3))])
def test_vectors_that_do_not_fit_are_refused(reduce: object, shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected \[width\] or \[edits, width\]"):
        reduce(torch.ones(shapes[0]), torch.ones(shapes[1]))


def test_clamp_hits_are_passed_on() -> None:
    assert ValueClamp().compute(ClampHits(17.0)) == {"editor.clamp_hits": 17.0}


# -- linear systems ---------------------------------------------------------------------------------------------------


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


# -- codebooks --------------------------------------------------------------------------------------------------------


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


# -- side memories ----------------------------------------------------------------------------------------------------


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


# -- null spaces ------------------------------------------------------------------------------------------------------


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


@given(
    units=st.integers(1, 12),
    seed=st.integers(0, 2**20),
    lost=st.sampled_from(["", "mean", "std", "both", "entered"]),
    rows=st.sampled_from([None, 0.0, 3.0, math.nan]),
    learns=st.booleans(),
    entering=st.integers(0, 3),
)
def test_a_normaliser_reads_the_same_on_the_host_and_on_a_device(
    units: int, seed: int, lost: str, rows: float | None, learns: bool, entering: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(units, generator=generator), torch.rand(units, generator=generator)
    std[torch.rand(units, generator=generator) < 0.3] = 0
    mean = torch.zeros_like(mean) if seed % 5 == 0 else mean
    entered = [torch.randn(2, units, generator=generator) for _ in range(entering)]
    for part in entered[:1]:
        part[0] = 0
    mean = torch.full_like(mean, math.nan) if lost in ("mean", "both") else mean
    std = torch.full_like(std, math.nan) if lost in ("std", "both") else std
    if lost == "entered" and entered:
        entered[-1][-1, 0] = math.nan
    count = None if rows is None else torch.tensor([rows])
    found = reduce_normaliser(mean, std, entered, MEND_GUARD, count, learns=learns)
    elsewhere = _reduce_on_device(mean.double(), std.double(), entered, MEND_GUARD, count, learns)
    torch.testing.assert_close(found, elsewhere, equal_nan=True, rtol=1e-12, atol=0)
