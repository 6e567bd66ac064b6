"""A hypernetwork's statistics, against naive implementations that share no code with it."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.probes.editor_state import NormalisedInput, Normaliser, NormaliserNonfinite, NormaliserRows
from stabilitylab.probes.normaliser_pass import MEND_GUARD, NormaliserPass, _reduce_on_device, reduce_normaliser
from tests.numbers import seeds

SPOILT = [math.nan, math.inf, -math.inf]


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
