"""A codebook of keys, radii and values around a layer, as GRACE keeps it: its size, and whether queries fall inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

_SOURCE = "GRACE (arXiv 2211.11031), §2"
_SEQUENCE = 3  # dimensions


@dataclass(frozen=True)
class CodebookPass:
    """keys: how many. radius_min, radius_mean, radius_max: of ε. key_norm, value_norm: the largest of any row.

    All but the first are None when there are no keys, and NaN when an entry they are taken over is.
    """

    keys: float
    radius_min: float | None
    radius_mean: float | None
    radius_max: float | None
    key_norm: float | None
    value_norm: float | None

    @classmethod
    def from_host(cls, values: Host) -> CodebookPass:
        """From the numbers that `reduce_codebook` packed: one, or six when there are keys."""
        keys, *rest = (float(value) for value in values)
        return cls(keys, *rest) if rest else cls(keys, None, None, None, None, None)


@dataclass(frozen=True)
class CodebookHits:
    """hits of queries: how many rows of a batch lay within the radius of the key nearest to them."""

    hits: float
    queries: float

    @classmethod
    def from_host(cls, values: Host) -> CodebookHits:
        """From [hits, queries]."""
        return cls(float(values[0]), float(values[1]))


@torch.no_grad()
def reduce_codebook(keys: Tensor, values: Tensor, radii: Tensor) -> Tensor:
    """The numbers of `CodebookPass` as a float64 tensor on the keys' device.

    keys: [n, inputs]. values: [n, outputs]. radii: n of them in any shape. n may be 0.
    """
    count = torch.full((1,), keys.shape[0], device=keys.device, dtype=torch.float64)
    if 0 in (keys.shape[0], radii.numel(), values.shape[0]):
        return count
    eps = radii.detach().to(keys.device, torch.float64)
    key_norms = torch.linalg.vector_norm(keys.detach(), dim=-1, dtype=torch.float64)
    value_norms = torch.linalg.vector_norm(values.detach().to(keys.device), dim=-1, dtype=torch.float64)
    parts = [eps.amin(), eps.mean(), eps.amax(), key_norms.amax(), value_norms.amax()]
    return torch.cat([count, torch.stack(parts)])


def query_of(entered: Tensor, token: Tensor | int) -> Tensor:
    """The rows that GRACE looks up, [batch, inputs]: those at position `token` of what enters, [batch, tokens, inputs].

    Two dimensions are one row: OPT hands its MLPs the tokens of all rows in one list. A token past the end, or
    negative, is the last one. Raises ValueError for another number of dimensions.
    """
    entered = entered.unsqueeze(0) if entered.dim() == _SEQUENCE - 1 else entered
    if entered.dim() != _SEQUENCE or entered.shape[1] == 0:
        raise ValueError(f"an input of shape {list(entered.shape)}; expected [batch, tokens, inputs]")
    last = entered.shape[1] - 1
    if not isinstance(token, Tensor):
        return entered[:, last if token < 0 else min(token, last)]
    at = torch.where(token < 0, torch.full_like(token, last), token.clamp(max=last)).reshape(1)
    return entered.index_select(1, at.to(entered.device)).squeeze(1)


@torch.no_grad()
def reduce_hits(query: Tensor, keys: Tensor, radii: Tensor) -> Tensor:
    """[hits, queries] in float64 on the query's device, by distances in fp32, as GRACE itself decides.

    query: [batch, inputs]. keys: [n, inputs]. radii: n of them. A query with a NaN hits nothing, nor does any when n
    is 0.
    """
    queries = torch.full((), query.shape[0], device=query.device, dtype=torch.float64)
    if query.shape[0] == 0 or keys.shape[0] == 0:
        return torch.stack([torch.zeros_like(queries), queries])
    distances = torch.cdist(keys.detach().to(query.device).float(), query.detach().float(), p=2)
    nearest, at = distances.min(dim=0)
    inside = nearest <= radii.detach().to(query.device).float().reshape(-1)[at]
    return torch.stack([inside.sum().double(), queries])


class Codebook(Probe[CodebookPass]):
    """The codebook that edits fill."""

    tier = "light"
    needs = CodebookPass
    metrics = (
        Metric("editor.keys", "keys", "count", "after", "How many keys the codebook holds.", "n", _SOURCE),
        Metric(
            "editor.radius_min",
            "1",
            "linear",
            "after",
            "The smallest radius. It is halved when keys with different answers collide: near zero, the key answers to "
            "nothing but itself, and below zero (EasyEdit, when two keys are the same) to nothing at all.",
            "min ε_i",
            _SOURCE,
        ),
        Metric("editor.radius_mean", "1", "linear", "after", "The mean radius.", "mean ε_i", _SOURCE),
        Metric(
            "editor.radius_max",
            "1",
            "log",
            "after",
            "The largest radius. It grows when keys with the same answer are merged: too large, it catches unrelated "
            "inputs.",
            "max ε_i",
            _SOURCE,
        ),
        Metric("editor.key_norm", "1", "log", "after", "The largest key.", "max ‖k_i‖", _SOURCE),
        Metric(
            "editor.value_norm",
            "1",
            "log",
            "after",
            "The largest value: what the layer's output is replaced with.",
            "max ‖v_i‖",
            _SOURCE,
        ),
    )

    def compute(self, seen: CodebookPass) -> Readings:
        """Only the number of keys when there are none."""
        rest = {
            "editor.radius_min": seen.radius_min,
            "editor.radius_mean": seen.radius_mean,
            "editor.radius_max": seen.radius_max,
            "editor.key_norm": seen.key_norm,
            "editor.value_norm": seen.value_norm,
        }
        return {"editor.keys": seen.keys, **{name: value for name, value in rest.items() if value is not None}}


class HitShare(Probe[CodebookHits]):
    """Whether the codebook knew the edit's own input before the edit."""

    tier = "light"
    needs = CodebookHits
    metrics = (
        Metric(
            "editor.hit_share",
            "1",
            "linear",
            "during",
            "Share of the edit's own queries, in its first pass, that fell inside a ball of the codebook as it was "
            "before the edit: repeats and collisions of earlier edits.",
            "#{min_i ‖q − k_i‖ ≤ ε_i} / #q",
            _SOURCE,
        ),
    )

    def compute(self, seen: CodebookHits) -> Readings:
        """Left out without a query."""
        return {} if seen.queries == 0 else {"editor.hit_share": seen.hits / seen.queries}
