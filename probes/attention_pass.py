"""The attention logits of one call, formed anew on a sample of its queries: a fused kernel never shows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host

MASKED_BELOW = -1e4
"""An additive mask at or below this hides a key: e^-10000 is 0 in every dtype, and older code masks with -10000."""

_DIMENSIONS = 4  # batch, heads, queries or keys, width
_PAIRS = 32  # (batch, head) pairs: all heads of most models, one head alone often grows first
_ROWS = 32  # queries of each pair
_KEYS = 1 << 16  # pairs · keys: bounds the scratch to 16 MiB of logits and 64 MiB of keys of width 128, in fp64


@dataclass(frozen=True)
class AttentionPass:
    """Of the sampled attention logits (scaled, the mask added) of one call, over the keys that the mask allows.

    max_logit: the largest |logit|. entropy: of the attention weights, in nats, mean over the rows that see a key.
    Both mean nothing where visible_rows is 0. visible_rows, masked_rows: sampled queries that see a key, and that see
    none. nonfinite: NaN and infinite logits.
    """

    max_logit: float
    entropy: float
    visible_rows: float
    masked_rows: float
    nonfinite: float

    @classmethod
    def from_host(cls, values: Host) -> AttentionPass:
        """From the five numbers that `reduce_attention` or `reduce_attention_logits` packed."""
        return cls(*(float(value) for value in values))


def sample(batch: int, heads: int, queries: int, keys: int) -> tuple[list[tuple[int, int]], slice]:
    """Which (batch, head) pairs and which of their queries are looked at, by the shape alone: the same at each edit.

    At most 32 pairs, fewer where there are more than 2,048 keys: every head once before any head twice, spread over the
    batch. At most 32 queries of each, evenly spaced up to the last one, which sees most keys under a causal mask.
    """
    count = min(batch * heads, _PAIRS, max(1, _KEYS // keys))
    pairs = [(i * batch // count, i % heads if count >= heads else i * heads // count) for i in range(count)]
    step = -(-queries // _ROWS)
    return pairs, slice((queries - 1) % step, queries, step)


@torch.no_grad()
def reduce_attention(
    query: Tensor, key: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The numbers of `AttentionPass` as a float64 tensor of shape [5] on the query's device.

    The arguments are those of ``torch.nn.functional.scaled_dot_product_attention``. query: [batch, heads, queries,
    width]; key: [batch, key heads, keys, width], where the query's heads are a multiple of the key heads (grouped-query
    attention) or equal; both of 2 to 4 dimensions. mask: boolean (True: the key is seen) or additive, broadcast to
    [batch, heads, queries, keys]. is_causal: query i sees the keys up to i. scale: width^-½ unless given. fp64 keeps
    clear of autocast and TF32, and the sample is small. Raises ValueError for tensors of more than 4 dimensions.
    """
    parts = [query, key] if mask is None else [query, key, mask]
    if max(part.dim() for part in parts) > _DIMENSIONS:
        raise ValueError(f"attention of {query.dim()} dimensions; expected [batch, heads, queries, width]")
    parts = [part.detach().reshape((1,) * (_DIMENSIONS - part.dim()) + part.shape) for part in parts]
    batch, heads = (max(part.shape[place] for part in parts) for place in (0, 1))
    queries, keys = query.shape[-2], key.shape[-2]
    pairs, rows = sample(batch, heads, queries, keys)

    def take(part: Tensor, rows: slice) -> Tensor:
        # Of a part with fewer heads (grouped queries, a broadcast mask) the one that serves this head.
        places = ((b * part.shape[0] // batch, h * part.shape[1] // heads) for b, h in pairs)
        return torch.stack([part[b, h, rows] for b, h in places])

    wide = take(parts[0], rows).double()
    logits = wide @ take(parts[1], slice(None)).double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if is_causal:
        places = torch.arange(max(queries, keys), device=query.device)
        allowed &= places[:keys] <= places[:queries][rows, None]
    if mask is not None:
        part = take(parts[2], rows if parts[2].shape[2] > 1 else slice(None))
        if part.dtype == torch.bool:
            allowed &= part
        else:
            logits += part.double()
            allowed &= ~(part <= MASKED_BELOW)  # so that a NaN in the mask is not taken for a masked key
    return _pack(logits, allowed)


@torch.no_grad()
def reduce_attention_logits(logits: Tensor) -> Tensor:
    """The same from the logits themselves, as eager attention puts them into its softmax, on the same sample.

    logits: [batch, heads, queries, keys], scaled and with the mask added. A key counts as masked where its logit is
    below half of the dtype's lowest value (the mask is that value plus the logit) or -inf, so that a logit which has
    itself overflowed to -inf can't be told from a masked one, nor a mask of -10000 from a logit.
    """
    pairs, rows = sample(*logits.shape)
    taken = torch.stack([logits.detach()[b, h, rows] for b, h in pairs])
    return _pack(taken.double(), ~(taken <= torch.finfo(taken.dtype).min / 2))


def _pack(logits: Tensor, allowed: Tensor) -> Tensor:
    counted = torch.where(allowed, logits, 0.0)
    visible = allowed.any(dim=-1)
    weights = torch.softmax(torch.where(allowed, logits, -torch.inf), dim=-1)
    entropy = -torch.special.xlogy(weights, weights).sum(dim=-1)  # 0 · log 0 is 0
    rows = visible.sum()
    return torch.stack(
        [
            counted.abs().amax(),
            torch.where(visible, entropy, 0.0).sum() / rows.clamp(min=1),
            rows.double(),
            (~visible).sum().double(),
            (~torch.isfinite(counted)).sum().double(),
        ]
    )
