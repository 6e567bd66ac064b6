"""The singular values of an edited weight itself, in float64, and so one of the deep measurements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.probes.gram import lower_gram
from stabilitylab.probes.weight_pass import as_matrix
from stabilitylab.record.readings import Metric

_RESOLVED = 1e-10  # σ² against σ₁²: above it, the Gram matrix knows σ to five digits or more


@dataclass(frozen=True)
class WeightSpectrum:
    """singular_values: of W, float64, descending, shape [min(rows, columns)]; all NaN when W is not finite."""

    singular_values: Host


@torch.no_grad()
def gram_of(weight: Tensor) -> Tensor:
    """W Wᵀ of the weight as a matrix, over its shorter side, divided by its largest entry squared: float64, symmetric.

    NaN when the weight is not finite, 0 when it is 0.
    """
    wide = as_matrix(weight).double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    size = wide.abs().max()
    scaled = wide / torch.where(size > 0, size, torch.ones_like(size))
    lower = lower_gram(scaled).tril()
    return torch.where(torch.isfinite(size), lower + lower.tril(-1).T, torch.nan)


@torch.no_grad()
def spectrum_of_weight(weight: Tensor, gram: Tensor) -> Tensor:
    """All singular values of a weight, as float64 on its device; NaN when it is not finite. gram: from `gram_of`.

    From the Gram matrix where that is well enough conditioned, a third of the time that the full decomposition takes,
    which serves the others. Waits for an accelerator.
    """
    wide = as_matrix(weight).double()
    size = wide.abs().max()
    if not torch.isfinite(size) or size == 0:
        return torch.full((gram.shape[0],), torch.nan if size != 0 else 0.0, dtype=torch.float64, device=wide.device)
    squares = torch.linalg.eigvalsh(gram)
    if squares[0] > _RESOLVED * squares[-1]:
        roots: Tensor = squares.flip(0).sqrt()
        return roots * size
    values: Tensor = torch.linalg.svdvals(wide / size)
    return values * size


class ConditionNumber(Probe[WeightSpectrum]):
    """How much the weight's directions differ in size."""

    tier = "deep"
    needs = WeightSpectrum
    metrics = (
        Metric(
            "weight.condition_number",
            "1",
            "log",
            "after",
            "Largest over smallest singular value. It grows as edits stretch few directions; huge or infinite when it "
            "has lost a direction altogether.",
            "σ_1(W_t) / σ_min(W_t)",
            "PRUNE (arXiv 2405.16821)",
        ),
    )

    def compute(self, seen: WeightSpectrum) -> Readings:
        """Infinite where the smallest value is 0; left out for a zero weight."""
        top, least = float(seen.singular_values[0]), float(seen.singular_values[-1])
        if top == 0:
            return {}
        return {"weight.condition_number": float("inf") if least == 0 else top / least}
