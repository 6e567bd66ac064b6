"""AlphaEdit's projection onto the null space of the keys to preserve, and the keys that it has collected since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

_SOURCE = "AlphaEdit (arXiv 2410.02355), §3"


@dataclass(frozen=True)
class NullSpacePass:
    """share: tr(P) / inputs, for a projection the share of directions that edits may use."""

    share: float

    @classmethod
    def from_host(cls, values: Host) -> NullSpacePass:
        """From [tr(P) / inputs]."""
        return cls(float(values[0]))


@dataclass(frozen=True)
class KeyCachePass:
    """energy: tr(Σ k kᵀ) = Σ ‖k‖² over all keys edited so far."""

    energy: float

    @classmethod
    def from_host(cls, values: Host) -> KeyCachePass:
        """From [tr(Σ k kᵀ)]."""
        return cls(float(values[0]))


@torch.no_grad()
def trace_of(matrix: Tensor, *, mean: bool = False) -> Tensor:
    """The trace of a matrix [inputs, inputs], or the mean of its diagonal: float64 of shape [1] on its device."""
    diagonal = matrix.detach().diagonal().double()
    return (diagonal.mean() if mean else diagonal.sum()).reshape(1)


class NullSpace(Probe[NullSpacePass]):
    """How much room the projection leaves."""

    tier = "light"
    needs = NullSpacePass
    metrics = (
        Metric(
            "editor.null_space_share",
            "1",
            "linear",
            "before",
            "The share of input directions that edits may use. Near 1 nothing is preserved (a covariance that was not "
            "normalised, or too high a threshold), near 0 nothing can be edited.",
            "tr(P) / inputs",
            _SOURCE,
        ),
    )

    def compute(self, seen: NullSpacePass) -> Readings:
        """From the diagonal of P."""
        return {"editor.null_space_share": seen.share}


class KeyCache(Probe[KeyCachePass]):
    """The keys that earlier edits left in the editor."""

    tier = "light"
    needs = KeyCachePass
    metrics = (
        Metric(
            "editor.cache_energy",
            "1",
            "log",
            "after",
            "The sum of squared norms of all keys edited so far. Above zero before the first edit: the cache leaked "
            "from an earlier run in this process.",
            "tr(Σ k kᵀ)",
            _SOURCE,
        ),
    )

    def compute(self, seen: KeyCachePass) -> Readings:
        """From the diagonal of the cache."""
        return {"editor.cache_energy": seen.energy}
