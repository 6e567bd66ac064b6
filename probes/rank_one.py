"""A rank-one update Δ = (v* − v₀) uᵀ / (uᵀk), as ROME makes it: what it divides by, and how far v* was pulled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

_ROME = "ROME (arXiv 2202.05262), §3.1"
_DISABLING = "Rebuilding ROME (arXiv 2403.07175), §3"


@dataclass(frozen=True)
class Denominator:
    """product: uᵀk. size: ‖u‖‖k‖. Of the edit of a batch for which |uᵀk| / (‖u‖‖k‖) is least (a NaN, if there is one).

    Errors: formed in float64, so of the size of its rounding against ‖u‖‖k‖.
    """

    product: float
    size: float

    @classmethod
    def from_host(cls, values: Host) -> Denominator:
        """From [uᵀk, ‖u‖‖k‖]."""
        return cls(float(values[0]), float(values[1]))


@dataclass(frozen=True)
class TargetValue:
    """target: ‖v*‖. initial: ‖v₀‖. Of the edit of a batch for which ‖v*‖ / ‖v₀‖ is largest (a NaN, if there is one)."""

    target: float
    initial: float

    @classmethod
    def from_host(cls, values: Host) -> TargetValue:
        """From [‖v*‖, ‖v₀‖]."""
        return cls(float(values[0]), float(values[1]))


@dataclass(frozen=True)
class ClampHits:
    """hits: the steps of the optimisation of v* that ended on its norm clamp."""

    hits: float

    @classmethod
    def from_host(cls, values: Host) -> ClampHits:
        """From [hits]."""
        return cls(float(values[0]))


def _rows(vectors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of vectors as [edits, width] in float64 on one device. Raises ValueError when they don't fit."""
    if vectors.shape != others.shape or not 1 <= vectors.dim() <= 2 or vectors.numel() == 0:
        raise ValueError(
            f"vectors of shapes {list(vectors.shape)} and {list(others.shape)}; expected [width] or [edits, width], "
            "the same of both, and not empty"
        )
    first = vectors.detach().double().reshape(-1, vectors.shape[-1])
    return first, others.detach().to(first.device, torch.float64).reshape(first.shape)


def _worst(badness: Tensor, *values: Tensor) -> Tensor:
    """The values, [edits] each, of the edit with the largest badness; a NaN counts as the largest."""
    at = torch.where(torch.isnan(badness), torch.full_like(badness, torch.inf), badness).argmax()
    return torch.stack([value.take(at) for value in values])


@torch.no_grad()
def reduce_denominator(key: Tensor, direction: Tensor) -> Tensor:
    """[uᵀk, ‖u‖‖k‖] in float64 on the key's device, from k and u, both [inputs] or [edits, inputs]."""
    k, u = _rows(key, direction)
    product = (u * k).sum(dim=1)
    size = torch.linalg.vector_norm(u, dim=1) * torch.linalg.vector_norm(k, dim=1)
    ratio = product.abs() / size
    # A vector of zeros leaves nothing to divide by: as bad as orthogonal ones.
    return _worst(torch.where(size == 0, torch.zeros_like(ratio), -ratio), product, size)


@torch.no_grad()
def reduce_target(target: Tensor, initial: Tensor) -> Tensor:
    """[‖v*‖, ‖v₀‖] in float64 on the target's device, from v* and v₀, both [outputs] or [edits, outputs]."""
    after, before = (torch.linalg.vector_norm(rows, dim=1) for rows in _rows(target, initial))
    return _worst(torch.where(before + after == 0, torch.zeros_like(after), after / before), after, before)


class UpdateDenominator(Probe[Denominator]):
    """What a rank-one update divides by."""

    tier = "light"
    needs = Denominator
    metrics = (
        Metric(
            "editor.denominator",
            "1",
            "linear",
            "during",
            "What the update divides by. Near zero, the update is as large as you like.",
            "uᵀk",
            _ROME,
        ),
        Metric(
            "editor.denominator_ratio",
            "1",
            "log",
            "during",
            "The same without its units: 1 when update direction and key are parallel. Near zero is a disabling edit. "
            "Absent when one of them is zero.",
            "|uᵀk| / (‖u‖ ‖k‖)",
            _DISABLING,
        ),
    )

    def compute(self, seen: Denominator) -> Readings:
        """The ratio is left out where u or k is zero."""
        ratio = {} if seen.size == 0 else {"editor.denominator_ratio": abs(seen.product) / seen.size}
        return {"editor.denominator": seen.product, **ratio}


class ValueRatio(Probe[TargetValue]):
    """How much larger the value to write is than the one it replaces."""

    tier = "light"
    needs = TargetValue
    metrics = (
        Metric(
            "editor.value_ratio",
            "1",
            "log",
            "during",
            "The norm of the optimised value against that of the value it replaces. Pinned at 1 + the clamp factor "
            "edit after edit, the optimisation no longer finds a value that the model accepts. Absent when v₀ is zero.",
            "‖v*‖ / ‖v₀‖",
            _ROME,
        ),
    )

    def compute(self, seen: TargetValue) -> Readings:
        """Left out where v₀ is zero."""
        return {} if seen.initial == 0 else {"editor.value_ratio": seen.target / seen.initial}


class ValueClamp(Probe[ClampHits]):
    """How often the value to write was held back."""

    tier = "light"
    needs = ClampHits
    metrics = (
        Metric(
            "editor.clamp_hits",
            "steps",
            "count",
            "during",
            "Steps of the optimisation of v* that ended on its norm clamp.",
            "#{steps: ‖v* − v₀‖ = clamp · ‖v₀‖}",
            "ROME (arXiv 2202.05262), the authors' code",
        ),
    )

    def compute(self, seen: ClampHits) -> Readings:
        """As reported."""
        return {"editor.clamp_hits": seen.hits}
