"""A model's logits: extremes over everything, the costly statistics on the last real token only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.canary_places import CanaryPlaces
from stabilitylab.probes.native_scan import softmax_sums
from stabilitylab.probes.weight_pass import count_nonfinite, extremes, on_cpu, wide_dtype

_NO_CHANCE = -1e3  # exp of less is 0 in fp64
_ROWS, _POSITIONED = 2, 3  # dimensions of [batch, vocabulary] and [batch, positions, vocabulary]
_AT_ONCE = 16  # tokens of the canary: their vocabularies in float64 are what takes memory

Statistics = TypeVar("Statistics", bound="LogitsStatistics")


@dataclass(frozen=True)
class LogitsStatistics:
    """Of logits [batch, positions, vocabulary]. low, high: extremes over all. logsumexp, entropy (nats), margin
    (largest minus second largest), top_share (its probability): of the last real token,
    mean over the batch. nonfinite: NaN and infinite entries.
    """

    low: float
    high: float
    logsumexp: float
    entropy: float
    margin: float
    top_share: float
    nonfinite: float

    @classmethod
    def from_host(cls: type[Statistics], values: Host) -> Statistics:
        """From the numbers that `reduce_logits` or `reduce_canary` packed."""
        return cls(*(float(value) for value in values))


@dataclass(frozen=True)
class LogitsPass(LogitsStatistics):
    """Of the edit's own forward pass."""


@dataclass(frozen=True)
class LaterLogits:
    """Of all forwards of the whole model in one edit: how many, how many not finite, and the largest magnitude among
    the logits of the last and of the worst of them (None where there was one only); float64.
    """

    passes: float
    nonfinite_passes: float
    max_abs_last: float | None = None
    max_abs_worst: float | None = None

    @classmethod
    def from_host(cls, values: Host) -> LaterLogits:
        """From the numbers that `OutputKeeper.reduce` packed."""
        return cls(*(float(value) for value in values))


@dataclass(frozen=True)
class LossPass:
    """Of an edit's forwards that came with a loss, float64. loss: the first one's. last: the last one's, None where
    there was one only. weight: the least derivative of what was differentiated with respect to any of them, NaN where
    one was; None where no backward came to them.
    """

    loss: float
    last: float | None = None
    weight: float | None = None

    @classmethod
    def from_host(cls, values: Host, has_last: bool, has_weight: bool) -> LossPass:
        """From [loss, last, weight], without those that there are not."""
        return cls(
            float(values[0]),
            float(values[1]) if has_last else None,
            float(values[1 + has_last]) if has_weight else None,
        )


@dataclass(frozen=True)
class CanaryPass(LogitsStatistics):
    """Of the canary's, with its distance to the stored original, over the tokens that count (`canary_places`).

    agreement: the share whose most likely successor is the original's; one that is not finite never agrees, but for a
    −∞ that the original has there too. kl: the mean KL(original ‖ now) in nats. Both are None for a canary that has no
    original, such as the replayed input of an edit, and for one number a row, which is no distribution.
    """

    agreement: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class TextPass:
    """Mean negative log-likelihood of the canary's own text in nats per token, now and of the unedited model."""

    nll: float
    original_nll: float

    @classmethod
    def from_host(cls, values: Host) -> TextPass:
        """From [now, original]."""
        return cls(float(values[0]), float(values[1]))


def _last_tokens(rows: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The position of each row's last real token: int64 [batch], for logits [batch, positions, vocabulary]."""
    positions = rows.shape[1]
    at = torch.full((rows.shape[0],), positions - 1, device=rows.device)
    fits = attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[0] == rows.shape[0]
    if attention_mask is not None and fits and 0 < attention_mask.shape[1] <= positions:
        mask = attention_mask.to(rows.device) != 0
        places = torch.arange(mask.shape[1], device=rows.device)
        real = torch.where(mask, places, torch.full_like(places, -1)).amax(dim=1)
        at = torch.where(real >= 0, real + positions - mask.shape[1], at)
    return at


def last_token_logits(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The logits of each row's last real token in fp32 or above: [batch, vocabulary].

    logits: [batch, positions, vocabulary] or [batch, vocabulary]. attention_mask: [batch, tokens], padding 0 on either
    side; where it is shorter than the logits (image tokens put before the text) it is aligned to their end.
    """
    last = logits.detach()
    if last.dim() != _ROWS:
        rows = last.reshape(-1, *last.shape[-2:])
        last = rows[torch.arange(rows.shape[0], device=rows.device), _last_tokens(rows, attention_mask)]
    return last.to(wide_dtype(last))


_Sums = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of each row of logits, float64: the largest; the second; and with d = logits − the largest Σ eᵈ and Σ d eᵈ."""


def _sums(logits: Tensor, attention_mask: Tensor | None) -> _Sums:
    last = last_token_logits(logits, attention_mask)
    top = torch.topk(last, k=min(2, last.shape[-1]), dim=-1).values.double()
    # All from one exponential, taken of what is below the largest; in place from then on, since fresh memory costs as
    # much. `last` itself may be the user's tensor.
    below = last - top[:, :1]
    weights = below.exp()
    total = weights.sum(dim=-1)
    # 0 · log 0 is 0: a token with logit −inf is allowed and certain not to come.
    return top[:, 0], top[:, -1], total, weights.mul_(below.clamp_min_(_NO_CHANCE)).sum(dim=-1)


def _sums_by_row(logits: Tensor, attention_mask: Tensor | None) -> _Sums | None:
    """The same by native code, on a CPU: what is done in fresh memory of their size takes less time than to get that.

    None where it has to be done the other way.
    """
    held = logits.detach()
    if held.dim() == _ROWS:
        rows = list(held)
    else:
        held = held.reshape(-1, *held.shape[-2:])
        rows = [row[at] for row, at in zip(held, _last_tokens(held, attention_mask).tolist(), strict=True)]
    found = [softmax_sums(row) for row in rows]
    there = [sums for sums in found if sums is not None]
    if not there or len(there) < len(found):
        return None
    largest, second, total, weighted = torch.tensor(there, dtype=torch.float64).T
    return largest, second, total, weighted


@torch.no_grad()
def reduce_logits(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The numbers of `LogitsPass` as a float64 tensor of shape [7] on the logits' device."""
    wide = logits.detach()
    low, high = extremes(wide)
    by_row = _sums_by_row(logits, attention_mask) if on_cpu(wide) else None
    largest, second, total, weighted = _sums(logits, attention_mask) if by_row is None else by_row
    return torch.stack(
        [
            low,
            high,
            (largest + total.log()).mean(),
            (total.log() - weighted / total).mean(),
            (largest - second).mean(),
            (1 / total).mean(),
            count_nonfinite(wide, low, high),
        ]
    )


@torch.no_grad()
def reduce_canary(logits: Tensor, attention_mask: Tensor | None, places: CanaryPlaces) -> Tensor:
    """The numbers of `CanaryPass` as a float64 tensor of shape [9], or [7] where a row has one number. places: the
    tokens that count, and the original.
    """
    if logits.shape[-1] == 1:
        return reduce_logits(logits, attention_mask)
    now = places.of(logits)
    agreed = torch.zeros((), dtype=torch.float64, device=now.device)
    divergence = torch.zeros((), dtype=torch.float64, device=now.device)
    for old_rows, new_rows in zip(torch.split(places.logits, _AT_ONCE), torch.split(now, _AT_ONCE), strict=True):
        old, new = (torch.log_softmax(each.double(), dim=-1) for each in (old_rows, new_rows))
        masked = (new_rows == -torch.inf) & (old_rows == -torch.inf)  # by design: a token that is never to come
        usable = (torch.isfinite(new_rows) | masked).all(dim=-1)
        agreed = agreed + ((new_rows.argmax(dim=-1) == old_rows.argmax(dim=-1)) & usable).sum()
        probability = old.exp()
        divergence = divergence + torch.where(probability > 0, probability * (old - new), torch.zeros_like(new)).sum()
    tokens = max(1, now.shape[0])
    return torch.cat([reduce_logits(logits, attention_mask), torch.stack([agreed / tokens, divergence / tokens])])


@torch.no_grad()
def text_nll(logits: Tensor, targets: Tensor) -> Tensor | None:
    """−mean log p(target) over the positions that have one: a float64 scalar, in nats.

    logits: [batch, positions, vocabulary]. targets: int64 [batch, positions], `canary_places.IGNORED` where there is
    none. None where the two don't fit each other, NaN where no position has a target of the vocabulary.
    """
    if logits.dim() != _POSITIONED or targets.shape != logits.shape[:-1]:
        return None
    here = logits.detach()
    wanted = targets.to(here.device)
    # The ids of image tokens may lie beyond the vocabulary.
    real = (wanted >= 0) & (wanted < here.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=here.device)
    for row, target, counts in zip(here, wanted, real, strict=True):  # row by row: a copy of all logits would be large
        wide = row.to(wide_dtype(row))
        found = wide.gather(-1, torch.where(counts, target, 0)[:, None])[:, 0].double()
        found = found - torch.logsumexp(wide, dim=-1).double()
        total = total - torch.where(counts, found, torch.zeros_like(found)).sum()
    return total / real.sum()
