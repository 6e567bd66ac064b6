"""Every probe against a naive float64 implementation that shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes.activations import ActivationPasses, ActivationRange, ActivationScale, NormHeadroom
from stabilitylab.probes.canary_places import MOST, CanaryPlaces, canary_places, next_tokens
from stabilitylab.probes.editor_state import EditLearningRates, NormalisedInput, Normaliser
from stabilitylab.probes.feedback import FeedbackPass, FeedbackShare, Gain, History
from stabilitylab.probes.logits import Canary, Logits, Perplexity
from stabilitylab.probes.logits_pass import (
    CanaryPass,
    LogitsPass,
    TextPass,
    last_token_logits,
    reduce_canary,
    reduce_logits,
    text_nll,
)
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass, reduce_normaliser
from stabilitylab.probes.output_pass import LaterOutputs, NormInput, OutputKeeper, OutputPass, reduce_output
from stabilitylab.probes.weight_pass import WeightPass, norm_of, reduce_weight, same_bits, same_sample, scan_weight
from stabilitylab.probes.weights import Drift, Update, WeightNorm, WeightRange

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
seeds = st.integers(0, 2**32 - 1)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def weight_pass(weight: Tensor, original: Tensor, previous: Tensor) -> WeightPass:
    seen = reduce_weight(weight, original.clone(), previous.clone(), norm_of(original))
    return WeightPass.from_host(seen.packed.numpy(), weight.dtype)


def test_a_pass_leaves_the_weight_behind_and_knows_the_rows_that_moved_most() -> None:
    previous = random(1, 300, 700)
    weight = previous.clone()
    weight[200:203] += 5
    before, original = previous.clone(), previous.clone()
    seen = reduce_weight(weight, original, previous, norm_of(original), want_change=True)
    assert torch.equal(previous, weight)
    assert torch.equal(original, before)
    assert seen.change is not None
    assert seen.change.norm().item() == pytest.approx((weight - before).norm().item(), rel=1e-5)
    assert seen.update == pytest.approx((weight - before).double().norm().item(), rel=1e-6)


def numpy64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e3]))
def test_weights(dtype: torch.dtype, seed: int, rows: int, columns: int, scale: float) -> None:
    weight, original, previous = (random(seed + k, rows, columns, dtype=dtype, scale=scale) for k in range(3))
    seen = weight_pass(weight, original, previous)
    now, first, last = numpy64(weight), numpy64(original), numpy64(previous)
    close = {"rel": 1e-5, "abs": 1e-12 * scale}
    assert Update().compute(seen)["update.norm"] == pytest.approx(np.sqrt(np.sum((now - last) ** 2)), **close)
    assert WeightNorm().compute(seen)["weight.norm"] == pytest.approx(np.sqrt(np.sum(now**2)), **close)
    if np.any(now):
        expected = np.sqrt(np.sum((now - last) ** 2)) / np.sqrt(np.sum(now**2))
        assert Update().compute(seen)["update.ratio"] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    drift = Drift().compute(seen)
    assert drift["drift.norm"] == pytest.approx(np.sqrt(np.sum((now - first) ** 2)), **close)
    if np.any(first):
        expected = np.sqrt(np.sum((now - first) ** 2)) / np.sqrt(np.sum(first**2))
        assert drift["drift.ratio"] == pytest.approx(expected, rel=1e-5)
    extremes = WeightRange().compute(seen)
    largest = np.abs(now).max()
    assert extremes["weight.max_abs"] == largest
    assert extremes["weight.nonfinite"] == 0
    if largest > 0:
        bits = math.log2(torch.finfo(dtype).max) - math.log2(largest)
        assert extremes["weight.headroom_bits"] == pytest.approx(bits, rel=1e-9)


def test_a_weight_of_many_chunks_is_one_weight() -> None:
    weight, original = random(1, 700, 900), random(2, 700, 900)
    seen = weight_pass(weight, original, original)
    expected = np.linalg.norm(numpy64(weight) - numpy64(original))
    assert (seen.drift, seen.update) == (pytest.approx(expected, rel=1e-6), pytest.approx(expected, rel=1e-6))
    assert (seen.low, seen.high) == (weight.min().item(), weight.max().item())


@pytest.mark.parametrize("magnitude", [1e25, 3e38, 1e-30])
def test_norms_neither_overflow_nor_underflow_where_the_values_do_not(magnitude: float) -> None:
    weight = torch.full((50, 50), magnitude, dtype=torch.float32)
    seen = weight_pass(weight, torch.zeros_like(weight), torch.zeros_like(weight))
    assert seen.drift == pytest.approx(50 * magnitude, rel=1e-6)
    assert seen.nonfinite == 0


def test_an_fp16_norm_past_the_range_of_fp16_is_finite() -> None:
    weight = torch.full((64, 64), 60.0, dtype=torch.float16)
    assert weight_pass(weight, torch.zeros_like(weight), weight).norm == pytest.approx(3840)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_are_counted_and_never_dropped(value: float) -> None:
    weight, original = random(1, 30, 20), random(1, 30, 20)
    weight[3, 4] = weight[20, 1] = value
    seen = weight_pass(weight, original, original)
    readings = WeightRange().compute(seen)
    assert readings["weight.nonfinite"] == 2
    assert not math.isfinite(readings["weight.max_abs"])
    assert readings["weight.headroom_bits"] == -math.inf or math.isnan(readings["weight.headroom_bits"])
    assert not math.isfinite(Update().compute(seen)["update.norm"])


def test_a_zero_weight_has_endless_headroom_and_no_ratio() -> None:
    zero = torch.zeros(4, 4)
    seen = weight_pass(zero, zero, zero)
    assert WeightRange().compute(seen)["weight.headroom_bits"] == math.inf
    assert Drift().compute(seen) == {"drift.norm": 0.0}


def test_closed_form_of_headroom() -> None:
    weight = torch.full((3, 3), 2.0**10, dtype=torch.float32)
    bits = WeightRange().compute(weight_pass(weight, weight, weight))["weight.headroom_bits"]
    assert bits == pytest.approx(118, abs=1e-6)  # fp32 ends just below 2^128


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, shape=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_a_scan_needs_no_references_and_agrees(dtype: torch.dtype, seed: int, shape: list[int]) -> None:
    weight = random(seed, *shape, dtype=dtype)
    norm, low, high, nonfinite = scan_weight(weight).tolist()
    now = numpy64(weight)
    assert norm == pytest.approx(np.linalg.norm(now.ravel()), rel=1e-5)
    assert (low, high, nonfinite) == (now.min(), now.max(), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rows=st.integers(1, 60), columns=st.integers(1, 60), data=st.data())
def test_a_sample_sees_a_row_that_moved(
    dtype: torch.dtype, seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    weight = random(seed, rows, columns, dtype=dtype)
    other = weight.clone()
    assert same_sample(weight, other)
    other[data.draw(st.integers(0, rows - 1))] += 1
    # The last rows are only touched where a whole cache line of them fits: a matrix of few rows is compared in full.
    touched = (rows * columns - 16) // (columns + 16) + 1
    if columns < 16 or touched >= rows:
        assert not same_sample(weight, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(dtype: torch.dtype) -> None:
    left = random(3, 5, 7, dtype=dtype)
    left[0, 0] = math.nan
    right = left.clone()
    assert same_bits(left, right)
    right[4, 6] = right[4, 6] * 2
    assert not same_bits(left, right)
    assert not same_bits(torch.zeros(2, dtype=dtype), -torch.zeros(2, dtype=dtype))


# -- activations ----------------------------------------------------------------------------------------------------


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


def test_an_output_of_one_row_alone_has_no_sequence() -> None:
    row = random(0, 7, 1, 1)
    seen = OutputPass.from_host(reduce_output(row.flatten()).numpy(), torch.float32)
    assert seen == OutputPass.from_host(reduce_output(row.reshape(1, -1)).numpy(), torch.float32)
    assert seen.max_abs == pytest.approx(float(row.abs().max()))
    assert seen.max_abs_beyond_first is None


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


# -- logits ---------------------------------------------------------------------------------------------------------


def naive_last(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.stack([row[np.flatnonzero(keep)[-1]] for row, keep in zip(logits, mask, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, batch=st.integers(1, 4), positions=st.integers(2, 7), vocabulary=st.integers(2, 30))
def test_logits(side: str, dtype: torch.dtype, seed: int, batch: int, positions: int, vocabulary: int) -> None:
    logits = random(seed, batch, positions, vocabulary, dtype=dtype, scale=3.0)
    lengths = np.random.default_rng(seed).integers(1, positions + 1, size=batch)
    mask = np.arange(positions) < lengths[:, None]
    mask = mask[:, ::-1].copy() if side == "left" else mask
    readings = Logits().compute(LogitsPass.from_host(reduce_logits(logits, torch.from_numpy(mask).long()).numpy()))
    z = numpy64(logits)
    last = naive_last(z, mask)
    shifted = np.exp(last - last.max(axis=1, keepdims=True))
    p = shifted / shifted.sum(axis=1, keepdims=True)
    ordered = np.sort(last, axis=1)
    assert (readings["logits.min"], readings["logits.max"]) == (z.min(), z.max())
    expected = np.mean(np.log(np.exp(last).sum(axis=1)))
    assert readings["logits.logsumexp"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert readings["logits.entropy"] == pytest.approx(np.mean(-np.sum(p * np.log(p), axis=1)), rel=1e-6, abs=1e-9)
    assert readings["logits.margin"] == pytest.approx(np.mean(ordered[:, -1] - ordered[:, -2]), rel=1e-6, abs=1e-9)
    assert readings["logits.top_share"] == pytest.approx(np.mean(p.max(axis=1)), rel=1e-6)
    assert readings["logits.nonfinite"] == 0
    assert readings["logits.dead"] == float(z.min() == z.max())


def test_closed_form_of_blank_logits() -> None:
    readings = Logits().compute(LogitsPass.from_host(reduce_logits(torch.zeros(2, 3, 8), None).numpy()))
    assert readings["logits.dead"] == 1
    assert readings["logits.entropy"] == pytest.approx(math.log(8))
    assert readings["logits.logsumexp"] == pytest.approx(math.log(8))
    assert readings["logits.margin"] == 0


def test_nan_logits_are_counted_and_not_called_dead() -> None:
    readings = Logits().compute(LogitsPass.from_host(reduce_logits(torch.full((1, 2, 4), math.nan), None).numpy()))
    assert readings["logits.nonfinite"] == 8
    assert readings["logits.dead"] == 0


def test_a_mask_shorter_than_the_logits_is_aligned_to_their_end() -> None:
    logits = torch.arange(5.0).reshape(1, 5, 1).expand(1, 5, 3)
    mask = torch.tensor([[1, 1, 0]])  # three text tokens behind two image tokens; the last one is padding
    assert last_token_logits(logits, mask)[0, 0] == 3


def ends_of(logits: torch.Tensor) -> CanaryPlaces:
    """Each row's last token, with what an original says there: [batch, vocabulary]."""
    rows = torch.arange(logits.shape[0])
    return CanaryPlaces(rows, torch.zeros_like(rows), logits)


@given(seed=seeds, batch=st.integers(1, 40), vocabulary=st.integers(2, 20))
def test_canary(seed: int, batch: int, vocabulary: int) -> None:
    original, now = random(seed, batch, vocabulary), random(seed + 1, batch, vocabulary)
    seen = CanaryPass.from_host(reduce_canary(now[:, None], None, ends_of(original)).numpy())
    readings = Canary().compute(seen)
    p, q = (np.exp(numpy64(z)) / np.exp(numpy64(z)).sum(axis=1, keepdims=True) for z in (original, now))
    assert readings["canary.kl"] == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-6, abs=1e-9)
    agree = np.mean(numpy64(original).argmax(axis=1) == numpy64(now).argmax(axis=1))
    assert readings["canary.agreement"] == pytest.approx(agree)
    same = Canary().compute(CanaryPass.from_host(reduce_canary(original[:, None], None, ends_of(original)).numpy()))
    assert (same["canary.agreement"], same["canary.kl"]) == (1.0, pytest.approx(0.0, abs=1e-12))


def test_a_nonfinite_row_never_agrees_with_the_original() -> None:
    original = torch.tensor([[5.0, 0.0], [5.0, 0.0]])  # argmax 0, which is also what argmax says of all NaN
    now = torch.tensor([[[math.nan, math.nan]], [[5.0, 0.0]]])
    readings = Canary().compute(CanaryPass.from_host(reduce_canary(now, None, ends_of(original)).numpy()))
    assert readings["canary.agreement"] == 0.5
    assert math.isnan(readings["canary.kl"])


def test_a_token_that_is_masked_by_design_is_no_harm_and_one_that_is_masked_since_is() -> None:
    original = torch.tensor([[5.0, 0.0, -math.inf], [5.0, 0.0, 1.0]])
    still, since = original.clone(), original.clone()
    since[1, 2] = -math.inf
    for now, agreement, kl in ((still, 1.0, 0.0), (since, 0.5, math.inf)):
        readings = Canary().compute(CanaryPass.from_host(reduce_canary(now[:, None], None, ends_of(original)).numpy()))
        assert readings["canary.agreement"] == agreement
        assert readings["canary.kl"] == pytest.approx(kl, abs=1e-9)


def naive_places(
    logits: np.ndarray, tokens: np.ndarray | None, mask: np.ndarray | None, length: int
) -> list[tuple[int, int]]:
    """(row, position) of the tokens that count, one after the other; the last `length` positions are the text's."""
    batch, positions, vocabulary = logits.shape
    real = {
        (row, at)
        for row in range(batch)
        for at in range(positions)
        if mask is None or (at >= positions - length and mask[row, at - positions + length])
    }
    for row in range(batch):
        if not any((row, at) in real for at in range(positions)):
            real.add((row, positions - 1))
    known, right = 0, []
    if tokens is not None:
        before = positions - length
        for row in range(batch):
            for at in range(before, positions - 1):
                wanted = int(tokens[row, at + 1 - before])
                if (row, at) in real and (row, at + 1) in real and 0 <= wanted < vocabulary:
                    known += 1
                    right += [(row, at)] if int(logits[row, at].argmax()) == wanted else []
    counted = set(right) if right and len(right) >= 0.1 * known else set()
    ends = [(row, max(at for at in range(positions) if (row, at) in real)) for row in range(batch)]
    sure = [end for end in ends if (p := np.exp(logits[end] - logits[end].max())).max() / p.sum() >= 0.75]
    counted |= set(sure)
    if len(counted) < batch / 2:
        counted = real if tokens is not None and not sure else set(ends)
    return sorted(counted)


@pytest.mark.parametrize("side", ["left", "right", "none"])
@given(
    seed=seeds,
    batch=st.integers(1, 4),
    length=st.integers(2, 6),
    image=st.integers(0, 2),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    knows=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    asked=st.booleans(),
)
def test_which_tokens_of_a_canary_count(
    side: str, seed: int, batch: int, length: int, image: int, scale: float, knows: float, asked: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(batch, image + length, 9))
    tokens = rng.integers(0, 10, size=(batch, length))  # one id lies beyond the vocabulary
    for row in range(batch):
        for at in range(length - 1):
            if rng.random() < knows and tokens[row, at + 1] < 9:
                logits[row, image + at, tokens[row, at + 1]] = 20.0
    mask = None if side == "none" else np.ones((batch, length), dtype=int)
    if mask is not None:
        for row in range(batch):
            padded = int(rng.integers(0, length + 1))
            mask[row, slice(0, padded) if side == "left" else slice(length - padded, length)] = 0
    found = canary_places(
        torch.tensor(logits),
        next_tokens(torch.tensor(tokens), None if mask is None else torch.tensor(mask), image + length)
        if asked
        else None,
        asked_of,
    )
    expected = naive_places(logits, tokens if asked else None, mask, length)
    assert list(zip(found.rows.tolist(), found.positions.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(found.logits.numpy(), np.array([logits[place] for place in expected]))


def test_of_a_long_canary_as_many_tokens_as_can_be_kept_are_spread_over_it() -> None:
    logits = torch.zeros(8, 40, 5)
    logits[..., 1] = 9.0
    found = canary_places(logits, next_tokens(torch.ones(8, 40, dtype=torch.int64), None, 40), None)
    assert found.rows.numel() == MOST
    assert set(found.rows.tolist()) == set(range(8))
    assert canary_places(logits[:, 0], None, None).positions.tolist() == [0] * 8


@pytest.mark.parametrize("side", ["left", "right", "none"])
@given(seed=seeds, batch=st.integers(1, 3), length=st.integers(2, 6), image=st.integers(0, 2))
def test_perplexity_of_a_text(side: str, seed: int, batch: int, length: int, image: int) -> None:
    rng = np.random.default_rng(seed)
    logits, tokens = random(seed, batch, image + length, 11, scale=2.0), rng.integers(0, 11, size=(batch, length))
    lengths = np.where(side == "none", length, rng.integers(2, length + 1, size=batch))
    mask = np.arange(length) < lengths[:, None]
    mask = mask[:, ::-1].copy() if side == "left" else mask
    attention_mask = None if side == "none" else torch.from_numpy(mask).long()
    nll = text_nll(logits, next_tokens(torch.from_numpy(tokens), attention_mask, image + length))
    assert nll is not None
    z, losses = numpy64(logits), []
    for row in range(batch):
        for at in range(1, length):
            if mask[row, at] and mask[row, at - 1]:
                p = np.exp(z[row, image + at - 1])
                losses.append(-math.log(p[tokens[row, at]] / p.sum()))
    readings = Perplexity().compute(TextPass(nll.item(), math.log(2)))
    assert readings["canary.perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert readings["canary.perplexity_ratio"] == pytest.approx(math.exp(np.mean(losses)) / 2, rel=1e-5)


def test_perplexity_of_blank_logits_is_the_vocabulary_and_of_lost_ones_not_a_number() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    blank, lost = (text_nll(torch.full((1, 3, 50), value), next_tokens(tokens, None, 3)) for value in (0.0, math.nan))
    assert blank is not None
    assert lost is not None
    assert Perplexity().compute(TextPass(blank.item(), 0.0))["canary.perplexity"] == pytest.approx(50)
    assert math.isnan(Perplexity().compute(TextPass(lost.item(), 0.0))["canary.perplexity"])
    assert Perplexity().compute(TextPass(1e4, 0.0))["canary.perplexity"] == math.inf


def test_tokens_beyond_the_vocabulary_are_left_out_of_a_text() -> None:
    logits = random(1, 1, 4, 6)
    with_image, without = torch.tensor([[5, 999_999, 2, 3]]), torch.tensor([[2, 3]])
    found, expected = (text_nll(logits, next_tokens(tokens, None, 4)) for tokens in (with_image, without))
    p = [np.exp(numpy64(logits)[0, at]) / np.exp(numpy64(logits)[0, at]).sum() for at in (1, 2)]
    assert found is not None
    assert found.item() == pytest.approx(-np.mean([np.log(p[0][2]), np.log(p[1][3])]), rel=1e-5)
    assert expected is not None
    assert expected.item() == pytest.approx(-np.log(p[1][3]), rel=1e-5)


def test_a_text_that_does_not_fit_the_logits_has_no_perplexity() -> None:
    targets = torch.zeros(1, 3, dtype=torch.long)
    assert text_nll(torch.zeros(1, 2, 5), targets) is None
    assert text_nll(torch.zeros(1, 5), targets) is None
    assert text_nll(torch.zeros(2, 3, 5), targets) is None


# -- editor state and feedback ---------------------------------------------------------------------------------------


@given(seed=seeds, tokens=st.integers(1, 12), units=st.integers(1, 20), dead=st.integers(0, 3))
def test_normaliser(seed: int, tokens: int, units: int, dead: int) -> None:
    rng = np.random.default_rng(seed)
    mean, std, entered = rng.normal(size=units), rng.uniform(0.1, 2, size=units), rng.normal(size=(tokens, units))
    std[:dead] = 0
    packed = reduce_normaliser(torch.tensor(mean), torch.tensor(std), [torch.tensor(entered)])
    seen = NormaliserPass.from_host(packed.numpy())
    zeros = np.flatnonzero(std == 0)
    spread = dict(Normaliser().compute(seen))
    assert list(np.atleast_1d(spread.pop("editor.zero_units", []))) == zeros.tolist()
    assert spread == {"editor.std_min": std.min(), "editor.std_zeros": float(zeros.size)}
    normalised = np.abs((entered - mean) / (std + 1e-7))
    readings = NormalisedInput().compute(seen)
    unit = int(np.unravel_index(normalised.argmax(), normalised.shape)[1])
    assert readings["editor.input_max"] == pytest.approx(normalised.max(), rel=1e-12)
    assert (readings["editor.input_unit"], readings["editor.input_unit_std"]) == (unit, std[unit])


def test_padding_rows_do_not_count_and_nan_wins() -> None:
    mean, std = torch.tensor([10.0, 0.0]), torch.tensor([0.1, 1.0])
    padded = NormaliserPass.from_host(reduce_normaliser(mean, std, [torch.tensor([[0.0, 0.0], [10.0, 3.0]])]).numpy())
    assert padded.input_max == pytest.approx(3.0, rel=1e-6)
    broken = NormaliserPass.from_host(reduce_normaliser(mean, std, [torch.tensor([[9.0, math.nan]])]).numpy())
    assert broken.input_max is not None
    assert math.isnan(broken.input_max)
    assert broken.input_unit == 1
    nothing = NormaliserPass.from_host(reduce_normaliser(mean, std, []).numpy())
    assert NormalisedInput().compute(nothing) == {}


def test_learning_rates() -> None:
    rates = np.linspace(0.1, 1.0, 80)
    assert EditLearningRates().compute(LearningRates(rates))["editor.learning_rate"].tolist() == rates[:64].tolist()


def history(values: list[float], every: int = 1) -> History:
    return History(np.array(values), np.arange(len(values), dtype=np.float64) * every)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=12))
def test_gain(values: list[float]) -> None:
    readings = Gain().compute(history(values))
    if len(values) == 1:
        assert readings == {}
        return
    recent = np.log(values[-6:])
    assert readings["feedback.gain"] == pytest.approx(np.mean(np.diff(recent)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
def test_gain_is_absent_where_a_logarithm_is_not_finite(broken: float) -> None:
    assert Gain().compute(history([1.0, broken])) == {}


@pytest.mark.parametrize("every", [1, 4])
def test_gain_is_per_edit_also_where_not_every_edit_is_read(every: int) -> None:
    gain = Gain().compute(history([2.0 ** (every * k) for k in range(6)], every))["feedback.gain"]
    assert gain == pytest.approx(math.log(2))


def test_share_of_the_feedback() -> None:
    assert FeedbackShare().compute(FeedbackPass.from_host(np.array([4.0, 1.0])))["feedback.share"] == 0.75
    assert FeedbackShare().compute(FeedbackPass(0.0, 1.0)) == {}
    assert FeedbackShare().compute(FeedbackPass(math.nan, 1.0)) == {}
