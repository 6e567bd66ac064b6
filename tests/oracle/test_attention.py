"""Attention and mask probes against a naive float64 implementation, and on real models with both kinds of attention."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitylab.probes.attention import AttentionEntropy, AttentionLogits, MaskedRows
from stabilitylab.probes.attention_pass import (
    AttentionPass,
    reduce_attention,
    reduce_attention_logits,
    sample,
)
from stabilitylab.probes.mask_pass import MaskPass, reduce_mask
from stabilitylab.testbed import blip2_digits
from stabilitylab.watching.calls import watch_attention
from tests.numbers import DTYPES, random, seeds

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()  # by another test: nothing would be watched


def attention_pass(*args: Any, **kwargs: Any) -> AttentionPass:
    return AttentionPass.from_host(reduce_attention(*args, **kwargs).numpy())


def naive(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    everything: bool = False,
) -> dict[str, float]:
    """Row by row in NumPy, over the same sample, or over everything."""
    q, k = query.detach().double().numpy(), key.detach().double().numpy()
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    pairs, rows = sample(batch, heads, queries, keys)
    places = range(queries)[rows]
    if everything:
        pairs, places = [(b, h) for b in range(batch) for h in range(heads)], range(queries)
    bias = np.zeros((batch, heads, queries, keys))
    if mask is not None:
        given_mask = mask.numpy() if mask.dtype == torch.bool else mask.double().numpy()
        bias = np.broadcast_to(np.where(given_mask, 0.0, -INF) if mask.dtype == torch.bool else given_mask, bias.shape)
    largest, entropies, visible, masked, nonfinite = 0.0, [], 0, 0, 0
    for b, h in pairs:
        for i in places:
            seen = [j for j in range(keys) if not (bias[b, h, i, j] <= -1e4) and (j <= i or not is_causal)]
            if not seen:
                masked += 1
                continue
            visible += 1
            row = []
            for j in seen:
                product = float(np.dot(q[b, h, i], k[b, h // (heads // k.shape[1]), j]))
                row.append(product * (1 / math.sqrt(width) if scale is None else scale) + bias[b, h, i, j])
            nonfinite += sum(not math.isfinite(x) for x in row)
            largest = max(largest, *(abs(x) for x in row)) if not any(map(math.isnan, [largest, *row])) else NAN
            if all(map(math.isfinite, row)):
                top = max(row)
                weights = [math.exp(x - top) for x in row]
                total = sum(weights)
                entropies.append(-sum(w / total * math.log(w / total) for w in weights if w / total > 0))
            else:
                entropies.append(NAN)
    entropy = sum(entropies) / len(entropies) if entropies else 0.0
    return {
        "max_logit": largest,
        "entropy": entropy,
        "visible_rows": visible,
        "masked_rows": masked,
        "nonfinite": nonfinite,
    }


def assert_same(seen: AttentionPass, expected: dict[str, float], rel: float = 1e-9) -> None:
    assert vars(seen) == pytest.approx(expected, rel=rel, abs=1e-9, nan_ok=True)


# -- the logits -----------------------------------------------------------------------------------------------------


@given(
    seed=seeds,
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 20),
    width=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["none", "causal", "boolean", "additive", "lowest", "shared"]),
    scale=st.sampled_from([None, 0.3]),
)
def test_against_the_naive_one(
    seed: int,
    batch: int,
    key_heads: int,
    group: int,
    queries: int,
    keys: int,
    width: int,
    dtype: torch.dtype,
    kind: str,
    scale: float | None,
) -> None:
    query = random(seed, batch, key_heads * group, queries, width, dtype=dtype, scale=3.0)
    key = random(seed + 1, batch, key_heads, keys, width, dtype=dtype, scale=3.0)
    mask: Tensor | None = None
    hidden = random(seed + 2, batch, 1, queries, keys) > 0.5
    if kind == "boolean":
        mask = ~hidden
    elif kind == "additive":
        mask = random(seed + 3, batch, 1, queries, keys, dtype=dtype).masked_fill(hidden, -INF)
    elif kind == "lowest":
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    elif kind == "shared":
        mask = ~hidden[:1, :, :1]
    seen = attention_pass(query, key, mask, kind == "causal", scale)
    assert_same(seen, naive(query, key, mask, kind == "causal", scale))


@given(seed=seeds, value=st.sampled_from([NAN, INF, -INF]), causal=st.booleans(), place=st.integers(0, 6))
def test_nonfinite_values_are_counted_where_the_mask_lets_them_through(
    seed: int, value: float, causal: bool, place: int
) -> None:
    query, key = random(seed, 1, 2, 7, 1).abs() + 0.1, random(seed + 1, 1, 2, 7, 1)
    key[0, 1, place] = value
    seen, expected = attention_pass(query, key, None, causal), naive(query, key, None, causal)
    assert seen.nonfinite == (7 - place if causal else 7) == expected["nonfinite"]
    assert seen.max_logit == pytest.approx(expected["max_logit"], nan_ok=True)
    assert not math.isfinite(seen.max_logit)
    if value != -INF:  # a key at -inf is one that nothing attends to
        assert math.isnan(seen.entropy)


def test_a_nan_in_an_additive_mask_is_not_a_masked_key() -> None:
    seen = attention_pass(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 2), torch.tensor([[[[0.0, NAN, -INF]]]]))
    assert (seen.nonfinite, seen.masked_rows) == (1, 0)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_fewer_dimensions(shape: tuple[int, ...]) -> None:
    query, key = random(1, *shape), random(2, *shape)
    full = (1,) * (4 - len(shape)) + shape
    assert_same(attention_pass(query, key, None, True), naive(query.reshape(full), key.reshape(full), None, True))
    mask = random(3, 5, 5) > 0
    assert_same(attention_pass(query, key, mask), naive(query.reshape(full), key.reshape(full), mask))


def test_more_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="5 dimensions; expected"):
        reduce_attention(*(torch.ones(1, 1, 1, 2, 2) for _ in range(2)))


@pytest.mark.parametrize("keys", [1, 2, 7, 100])
def test_closed_form_of_identical_keys(keys: int) -> None:
    seen = attention_pass(random(1, 2, 3, 5, 8), torch.ones(2, 3, keys, 8))
    assert seen.entropy == pytest.approx(math.log(keys), abs=1e-12)
    causal = attention_pass(torch.ones(1, 1, 4, 16), torch.ones(1, 1, 4, 16), None, True)
    assert causal.entropy == pytest.approx(math.log(24) / 4)  # (log 1 + log 2 + log 3 + log 4) / 4
    assert causal.max_logit == 4  # 16 / √16


def test_one_key_that_takes_everything() -> None:
    key = torch.zeros(1, 1, 5, 2)
    key[..., 3, :] = 1e4
    seen = attention_pass(torch.ones(1, 1, 2, 2), key)
    assert (seen.entropy, seen.max_logit) == (0, pytest.approx(2e4 / math.sqrt(2)))


def test_an_fp16_product_past_the_range_of_fp16_is_finite() -> None:
    seen = attention_pass(*(torch.full((1, 1, 1, 4), 1000.0, dtype=torch.float16) for _ in range(2)))
    assert (seen.max_logit, seen.nonfinite) == (2e6, 0)


def test_autocast_does_not_round_the_recomputation() -> None:
    query, key = random(1, 1, 2, 9, 16), random(2, 1, 2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(attention_pass(query, key), naive(query, key))


def test_nothing_to_see_is_absent_and_not_nan() -> None:
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    seen = attention_pass(random(1, 1, 1, 3, 4), random(2, 1, 1, 3, 4), mask)
    assert (seen.visible_rows, seen.masked_rows) == (0, 3)
    assert AttentionLogits().compute(seen) == {"attention.nonfinite": 0.0}
    assert AttentionEntropy().compute(seen) == {}


@given(seed=seeds, dtype=st.sampled_from(DTYPES), batch=st.integers(1, 3), queries=st.integers(1, 40))
def test_the_logits_of_eager_attention(seed: int, dtype: torch.dtype, batch: int, queries: int) -> None:
    logits = random(seed, batch, 2, queries, 6, dtype=dtype, scale=4.0)
    hidden = random(seed + 1, batch, 1, queries, 6) > 0.3
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    seen = AttentionPass.from_host(reduce_attention_logits(logits + mask).numpy())
    one = torch.ones(batch, 2, queries, 1, dtype=torch.float64)
    # No keys to multiply: the logits are all in the bias.
    bias = logits.double().masked_fill(mask < 0, -INF)
    assert_same(seen, naive(one * 0, torch.zeros(batch, 2, 6, 1), bias))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (4, 12, 128, 128), (2, 40, 33, 64), (64, 1, 5, 5), (3, 32, 1000, 8000), (1, 8, 9, 1 << 20)]
)
def test_the_sample(shape: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = shape
    pairs, rows = sample(*shape)
    assert len(set(pairs)) == len(pairs) <= 32
    assert all(0 <= b < batch and 0 <= h < heads for b, h in pairs)
    if heads <= 32 and keys <= 2048:
        assert {h for _, h in pairs} == set(range(heads))
    if len(pairs) > 1 and batch > 1:
        assert len({b for b, _ in pairs}) == min(batch, len(pairs))
    places = range(queries)[rows]
    assert len(places) <= 32
    assert places[-1] == queries - 1
    assert len(pairs) * keys <= max(1 << 16, keys)


# -- the mask -------------------------------------------------------------------------------------------------------


def mask_pass(mask: Tensor) -> MaskPass:
    packed = reduce_mask(mask)
    assert packed is not None
    return MaskPass.from_host(packed.numpy())


@given(
    rows=st.integers(1, 6).flatmap(
        lambda tokens: st.lists(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens), min_size=1, max_size=5)
    ),
    dtype=st.sampled_from([torch.int64, torch.bool, torch.float32]),
)
def test_padding_mask(rows: list[list[int]], dtype: torch.dtype) -> None:
    seen = mask_pass(torch.tensor(rows).to(dtype))
    assert seen.masked_rows == sum(not any(row[: t + 1]) for row in rows for t in range(len(row)))
    assert seen.masked_sequences == sum(not any(row) for row in rows)


@given(seed=seeds, batch=st.integers(1, 3), heads=st.integers(1, 2), queries=st.integers(1, 4), keys=st.integers(1, 3))
def test_full_mask(seed: int, batch: int, heads: int, queries: int, keys: int) -> None:
    allowed = random(seed, batch, heads, queries, keys) > 0.7
    blind = [[not any(row) for head in one for row in head] for one in allowed.tolist()]
    expected = MaskPass(sum(map(sum, blind)), sum(map(all, blind)))
    assert mask_pass(allowed) == mask_pass(allowed.long()) == expected
    for dtype in DTYPES:
        for lowest in (-INF, torch.finfo(dtype).min, -1e4):
            assert mask_pass(torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)) == expected


def test_masks_of_no_known_shape_are_left_out() -> None:
    assert reduce_mask(torch.ones(3)) is None
    assert reduce_mask(torch.ones(2, 3, 4)) is None
    assert reduce_mask(torch.ones(0, 3)) is None


def test_left_padding_is_told_from_an_empty_sequence() -> None:
    readings = MaskedRows().compute(mask_pass(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])))
    assert readings == {"attention.masked_rows": 6.0, "attention.masked_sequences": 1.0}


# -- real models ----------------------------------------------------------------------------------------------------


SMALL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(attention: str) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, **SMALL)
    return build(transformers.GPT2LMHeadModel, config, attention)


def llama(attention: str) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SMALL,
    )
    return build(transformers.LlamaForCausalLM, config, attention)


def opt(attention: str) -> transformers.PreTrainedModel:
    config = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=40,
        **SMALL,
    )
    return build(transformers.OPTForCausalLM, config, attention)


def build(kind: Any, config: Any, attention: str) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    config.initializer_range = 0.5  # logits that are not all zero
    model = kind._from_config(config, attn_implementation=attention)
    return model.eval()


def watched(model: torch.nn.Module, **inputs: Any) -> tuple[dict[str, AttentionPass], dict[str, Any], Any]:
    """The measurement at each site, what it was made from, and the model's output."""
    seen: dict[str, AttentionPass] = {}
    given_there: dict[str, Any] = {}

    def on_attention(site: str, call: Any) -> None:
        given_there[site] = call
        seen[site] = attention_pass(call.query, call.key, call.mask, call.is_causal, call.scale)

    def on_logits(site: str, logits: Tensor) -> None:
        given_there[site] = logits.clone()
        seen[site] = AttentionPass.from_host(reduce_attention_logits(logits).numpy())

    with contextlib.ExitStack() as stack:
        assert watch_attention(stack, model, on_attention, on_logits) is None
        output = model(**inputs)
    return seen, given_there, output


ONE_PATH = pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "set_attn_implementation"),
    reason="OPT's eager attention of older transformers multiplies heads as one batch, which is not seen",
)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("make", [gpt2, llama, pytest.param(opt, marks=ONE_PATH)], ids=lambda make: make.__name__)
def test_fused_and_eager_attention_agree(make: Any, padded: bool) -> None:
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[1, :8] = 0
        ids[mask == 0] = 0
    fused, calls, _ = watched(make("sdpa"), input_ids=ids, attention_mask=mask)
    eager, _, output = watched(make("eager"), input_ids=ids, attention_mask=mask, output_attentions=True)
    assert list(fused) == list(eager)
    assert len(fused) == 2
    assert all(name.endswith("attn") for name in fused)
    for at, site in enumerate(fused):
        call = calls[site]
        assert_same(fused[site], naive(call.query, call.key, call.mask, call.is_causal, call.scale), rel=1e-6)
        # 12 (batch, head) pairs of 9 queries: the sample is everything.
        whole = naive(call.query, call.key, call.mask, call.is_causal, call.scale, everything=True)
        assert_same(fused[site], whole, rel=1e-6)
        assert fused[site].max_logit > 0.1
        assert vars(fused[site]) == pytest.approx(vars(eager[site]), rel=1e-4, abs=1e-5)
        # Against the weights that the model itself puts out.
        weights = output.attentions[at].detach().double().numpy()
        shown = weights.sum(axis=-1) > 0.5
        real = np.ones_like(shown) if not padded else np.broadcast_to(mask.numpy()[:, None, :] > 0, shown.shape)
        entropy = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(axis=-1)
        assert fused[site].entropy == pytest.approx(entropy[real].mean(), rel=1e-4)
        assert fused[site].masked_rows == (12 * 4 if padded else 0)
    if padded:
        assert mask_pass(mask) == MaskPass(12, 0)


@ONE_PATH
def test_all_three_parts_of_a_blip2_in_fp16() -> None:
    model = blip2_digits.set_precision(blip2_digits.build(0), "fp16")
    asked = ["what digit is this ?", "is the digit even ?"]
    inputs = blip2_digits.batch(blip2_digits.tokenizer(), asked, [torch.rand(3, 32, 32), None])
    assert 0 in inputs["attention_mask"]
    fused, calls, _ = watched(model, **inputs)
    assert [site.split(".")[0] for site in fused] == ["vision_model", *["qformer"] * 2, *["language_model"] * 3]
    for site, call in calls.items():
        assert_same(fused[site], naive(call.query, call.key, call.mask, call.is_causal, call.scale), rel=1e-6)
    model.set_attn_implementation("eager")
    eager, _, _ = watched(model, **inputs)
    assert list(eager) == list(fused)
    for site, seen in eager.items():
        assert vars(fused[site]) == pytest.approx(vars(seen), rel=5e-3, abs=5e-3), site
