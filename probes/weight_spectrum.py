"""The singular values of an edited weight itself: exact, in float64, and so one of the deep measurements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from stabilitylab.probes.base import Host, Probe, Readings
from torch import Tensor

from stabilitylab.readings import Metric


@dataclass(frozen=True)
class WeightSpectrum:
    """singular_values: of W, float64, descending, shape [min(rows, columns)]; all NaN when W is not finite."""

    singular_values: Host


@torch.no_grad()
def spectrum_of_weight(weight: Tensor) -> Tensor:
    """All singular values of a weight of shape [rows, columns], as float64 on its device; NaN when it is not finite."""
    wide = weight.detach().double()
    usable = torch.isfinite(wide).all()
    # LAPACK is kept from choking on what is not finite; where it is not, the answer is NaN.
    values: Tensor = torch.linalg.svdvals(torch.where(usable, wide, torch.zeros_like(wide)))
    return torch.where(usable, values, torch.full_like(values, torch.nan))


class SpectralNorm(Probe[WeightSpectrum]):
    """How much the weight can stretch one direction, and how many directions carry it."""

    tier = "deep"
    needs = WeightSpectrum
    metrics = (
        Metric(
            "weight.spectral_norm",
            "1",
            "log",
            "after",
            "The most that the weight can stretch an input. A jump means that an edit added one strong direction.",
            "σ_1(W_t)",
            "spectral normalisation (arXiv 1802.05957)",
        ),
        Metric(
            "weight.stable_rank",
            "directions",
            "linear",
            "after",
            "How many directions carry the weight: falling towards 1 means that edits have taken it over. Absent for a "
            "zero weight.",
            "‖W_t‖_F² / σ_1²",
            "Rudelson and Vershynin (arXiv math/0503442)",
        ),
    )

    def compute(self, seen: WeightSpectrum) -> Readings:
        """The stable rank is left out for a zero weight."""
        top = seen.singular_values[0]
        rank = {} if top == 0 else {"weight.stable_rank": float(np.sum((seen.singular_values / top) ** 2))}
        return {"weight.spectral_norm": float(top), **rank}


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
            "Largest over smallest singular value. It grows as edits stretch few directions; infinite when the weight "
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
