"""What is read of logits, the canary and a text, against a naive float64 implementation that shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.probes.canary_places import MOST, CanaryPlaces, canary_places, next_tokens
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
from tests.numbers import DTYPES, numpy64, random, seeds


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
    attended = None if mask is None else torch.tensor(mask)
    targets = next_tokens(torch.tensor(tokens), attended, image + length) if asked else None
    found = canary_places(torch.tensor(logits), targets, attended)
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
