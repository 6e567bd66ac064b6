"""The gradient of an edited layer inside the edit: its singular values and what follows from them."""

from __future__ import annotations

import numpy as np
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.gradient_factors import GradientSpectrum

from stabilitylab.readings import Metric

SPECTRUM_LENGTH = 32
"""Leading singular values that are kept; norm and stable rank use all of them."""


class Spectrum(Probe[GradientSpectrum]):
    """The leading singular values."""

    needs = GradientSpectrum
    metrics = (
        Metric(
            "gradient.spectrum",
            "loss per weight",
            "log",
            "during",
            "The leading singular values of the layer's gradient, exact. All of them shrinking: a vanishing gradient.",
            "σ_1 … σ_32 of δᵀX",
            "Golub and Van Loan, Matrix Computations, 4th ed., §2.4 and §5.2",
            SPECTRUM_LENGTH,
        ),
    )

    def compute(self, seen: GradientSpectrum) -> Readings:
        """The first 32 of them, or as many as there are."""
        return {"gradient.spectrum": seen.singular_values[:SPECTRUM_LENGTH]}


class GradientNorm(Probe[GradientSpectrum]):
    """The Frobenius norm."""

    needs = GradientSpectrum
    metrics = (
        Metric(
            "gradient.norm",
            "loss per weight",
            "log",
            "during",
            "The size of the layer's gradient. Exploding and vanishing both end in a useless edit.",
            "‖δᵀX‖_F = (Σ σ²)^½",
            "Pascanu et al. (arXiv 1211.5063)",
        ),
    )

    def compute(self, seen: GradientSpectrum) -> Readings:
        """Scaled by the largest value first, so that squares neither overflow nor underflow."""
        top = seen.singular_values[0]
        if not np.isfinite(top) or top == 0:
            return {"gradient.norm": float(top)}
        return {"gradient.norm": float(top * np.linalg.norm(seen.singular_values / top))}


class StableRank(Probe[GradientSpectrum]):
    """How many directions the gradient really has."""

    needs = GradientSpectrum
    metrics = (
        Metric(
            "gradient.stable_rank",
            "directions",
            "linear",
            "during",
            "Between 1 (one direction carries everything) and the number of tokens. Absent for a zero gradient.",
            "‖G‖_F² / σ_1²",
            "Rudelson and Vershynin (arXiv math/0503442)",
        ),
    )

    def compute(self, seen: GradientSpectrum) -> Readings:
        """Left out for a zero gradient, which has no direction."""
        top = seen.singular_values[0]
        return {} if top == 0 else {"gradient.stable_rank": float(np.sum((seen.singular_values / top) ** 2))}


class GradientNonfinite(Probe[GradientSpectrum]):
    """Entries of the factors that are lost."""

    needs = GradientSpectrum
    metrics = (
        Metric(
            "gradient.nonfinite",
            "entries",
            "count",
            "during",
            "NaN or infinite entries of the layer's input X and of the gradient δ at its output.",
            "#{X ∉ ℝ} + #{δ ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
    )

    def compute(self, seen: GradientSpectrum) -> Readings:
        """A count over both factors."""
        return {"gradient.nonfinite": seen.nonfinite}
