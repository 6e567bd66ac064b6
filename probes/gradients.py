"""The gradient of an edited layer inside the edit: its singular values and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stabilitylab.errors import UsageError
from stabilitylab.probes.accumulated_gradient import STEP, AccumulatedGradient
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.gradient_factors import GradientSize, GradientSpectrum
from stabilitylab.probes.gradient_passes import Alignment, LaterPasses, LaterSpectra
from stabilitylab.record.readings import Metric

SPECTRUM_LENGTH = 32
"""Leading singular values that are kept; norm and ranks use all that are known."""


class Spectrum(Probe[GradientSpectrum]):
    """The leading singular values."""

    dear = True
    needs = GradientSpectrum
    metrics = (
        Metric(
            "gradient.spectrum",
            "loss per weight",
            "log",
            "during",
            "The leading singular values of the layer's gradient. All of them shrinking: a vanishing gradient.",
            "σ_1 … σ_32 of δᵀX",
            "Golub and Van Loan, Matrix Computations, 4th ed., §2.4 and §5.2",
            SPECTRUM_LENGTH,
        ),
        Metric(
            "gradient.exact",
            "flag",
            "flag",
            "during",
            "1 when all singular values were found, in float64. 0: the gradient's rank may exceed 256, only leading "
            "values that converged are given, and the norm outside of them is an estimate.",
            "min(T, in, out) ≤ 256",
            "block Krylov: Musco and Musco (arXiv 1504.05477)",
        ),
    )

    def __init__(
        self, *, top: int = SPECTRUM_LENGTH, every: int | None = None, sites: str | Sequence[str] | None = None
    ) -> None:
        """top: how many leading values to keep, at most 32; the rest as for each probe. Raises UsageError."""
        super().__init__(every=every, sites=sites)
        if not 1 <= top <= SPECTRUM_LENGTH:
            raise UsageError(f"Spectrum(top={top}): expected a number of singular values from 1 to {SPECTRUM_LENGTH}")
        self.top = top

    def compute(self, seen: GradientSpectrum) -> Readings:
        """The first `top` of them, or as many as are known; left out where none is."""
        if not seen.singular_values.size:
            return {}
        return {"gradient.spectrum": seen.singular_values[: self.top], "gradient.exact": float(seen.exact)}


class GradientNorm(Probe[GradientSize]):
    """The Frobenius norm."""

    needs = GradientSize
    metrics = (
        Metric(
            "gradient.norm",
            "loss per weight",
            "log",
            "during",
            "The size of the layer's gradient. Exploding and vanishing both end in a useless edit. The loop's own "
            "where `.grad` shows it, before clipping and without the loss scale; gradient.source says.",
            "‖.grad‖_F, else ‖δᵀX‖_F = (Σ σ²)^½",
            "Pascanu et al. (arXiv 1211.5063)",
        ),
        Metric(
            "gradient.zero_share",
            "share",
            "linear",
            "during",
            "Share of the gradient's entries that are exactly 0, since their input or output unit is 0 at every token. "
            "Rising to 1: units die, or the loss no longer reaches the layer.",
            "1 − (1 − zero rows)(1 − zero columns)",
            "dying ReLU: Lu et al. (arXiv 1903.06733)",
        ),
    )

    def compute(self, seen: GradientSize) -> Readings:
        """The share is left out where nothing but the norm is known."""
        share = {} if np.isnan(seen.zero_share) else {"gradient.zero_share": seen.zero_share}
        return {"gradient.norm": seen.norm} | share


class GradientRank(Probe[GradientSpectrum]):
    """How many directions the gradient really has."""

    dear = True
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
        Metric(
            "gradient.effective_rank",
            "directions",
            "linear",
            "during",
            "The same, less ruled by the largest direction. Absent where not all singular values are known.",
            "exp(−Σ p log p), p = σ / Σ σ",
            "Roy and Vetterli, EUSIPCO 2007",
        ),
        Metric(
            "gradient.top_share",
            "share of ‖G‖_F²",
            "linear",
            "during",
            "Share of the energy in the top direction. At 1 every token pushes the weight the same way.",
            "σ_1² / ‖G‖_F²",
            "Golub and Van Loan, Matrix Computations, 4th ed., §2.4",
        ),
    )

    def compute(self, seen: GradientSpectrum) -> Readings:
        """All are left out for a zero gradient, which has no direction, and for one that is not finite."""
        if not np.isfinite(seen.top) or not np.isfinite(seen.norm) or seen.top == 0:
            return {}
        stable_rank = max((seen.norm / seen.top) ** 2, 1.0)
        readings = {"gradient.stable_rank": stable_rank, "gradient.top_share": 1 / stable_rank}
        if seen.exact:
            share = seen.singular_values / np.sum(seen.singular_values)
            share = share[share > 0]
            readings["gradient.effective_rank"] = float(np.exp(-np.sum(share * np.log(share))))
        return readings


class GradientNonfinite(Probe[GradientSize]):
    """Entries of the factors that are lost."""

    needs = GradientSize
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

    def compute(self, seen: GradientSize) -> Readings:
        """A count over both factors; where no pass was seen, of the gradient itself."""
        return {} if np.isnan(seen.nonfinite) else {"gradient.nonfinite": seen.nonfinite}


class OwnGradient(Probe[AccumulatedGradient]):
    """What the loop itself steps with."""

    needs = AccumulatedGradient
    metrics = (
        Metric(
            "gradient.source",
            "code",
            "linear",
            "during",
            "Where the gradient was read. 1: from the weight's `.grad` at an optimizer's step, before clipping and "
            "without the loss scale. 2: from `.grad` as a backward left it, where no optimizer stepped. 0: from the "
            "factors of the first pass, where `.grad` is not what the edit uses (functional gradients). 3: from "
            "factors in float16, which may hold a loss scale. 4: from the factors, of a weight that is made of "
            "parts, such as an adapter's, with some of which an optimizer stepped.",
            "0 δᵀX, 1 .grad at step(), 2 .grad, 3 δᵀX in float16, 4 δᵀX of stepped parts",
            "PyTorch, Autograd mechanics: accumulated gradients",
        ),
        Metric(
            "gradient.norm_stepped",
            "loss per weight",
            "log",
            "during",
            "The gradient's norm as the first step of the optimizer got it: after clipping.",
            "‖.grad‖_F at step()",
            "Pascanu et al. (arXiv 1211.5063)",
        ),
        Metric(
            "gradient.learning_rate",
            "1",
            "log",
            "during",
            "The learning rate of the optimizer that stepped with the weight, or with a part that it is made of: the "
            "largest of the edit's steps, or NaN where one is. Absent where none did, or where it names none.",
            "max η over steps",
            "PyTorch, torch.optim.Optimizer.param_groups",
        ),
        Metric(
            "gradient.ascends",
            "flag",
            "flag",
            "during",
            "1: the optimizer that stepped with the weight, or with a part that it is made of, maximises, and steps up "
            "what it is given the gradient of. Absent where none does.",
            "maximize = True",
            "PyTorch, torch.optim.SGD: maximize",
        ),
        Metric(
            "gradient.loss_scale",
            "1",
            "log",
            "during",
            "The factor on the loss that was divided out of the gradient. Absent where no scaler is known.",
            "s in s·L",
            "mixed precision training: Micikevicius et al. (arXiv 1710.03740)",
        ),
        Metric(
            "gradient.nonfinite_steps",
            "steps",
            "count",
            "during",
            "How many of the gradients that were accumulated in `.grad` held a NaN or an infinity. Where the factors "
            "are finite, their product, or its sum, left the range of the gradient's dtype.",
            "#{steps: ‖.grad‖ ∉ ℝ}",
            "IEEE 754-2019, §6 and §7.4",
        ),
        Metric(
            "gradient.carried",
            "steps",
            "count",
            "during",
            "How many of the optimizer's steps used a gradient once more that one had used already: nobody cleared it, "
            "and backwards added to it.",
            "#{steps: .grad not cleared since step()}",
            "PyTorch, torch.optim.Optimizer.zero_grad",
        ),
    )

    def compute(self, seen: AccumulatedGradient) -> Readings:
        """What does not apply is left out."""
        readings: dict[str, float] = {"gradient.source": seen.source}
        if seen.stepped.size:
            readings["gradient.norm_stepped"] = float(seen.stepped[0])
        if seen.scales.size and seen.scales[0] != 1:
            readings["gradient.loss_scale"] = float(seen.scales[0])
        if seen.norms.size:
            readings["gradient.nonfinite_steps"] = float(seen.nonfinite)
        if seen.learning_rate is not None:
            readings["gradient.learning_rate"] = seen.learning_rate
        if seen.ascends:
            readings["gradient.ascends"] = 1.0
        if seen.source == STEP:
            readings["gradient.carried"] = seen.carried
        return readings


class GradientPasses(Probe[LaterPasses]):
    """The later passes of an edit that passes a layer several times, such as 25 steps of fine-tuning."""

    needs = LaterPasses
    metrics = (
        Metric(
            "gradient.passes",
            "passes",
            "count",
            "during",
            "Forwards through the layer that a backward answered. All gradient readings without a suffix are of the "
            "first, or of the optimizer's first step where its own gradient is read; of several, the last and the "
            "worst are kept as well, the others are counted.",
            "#",
            "—",
        ),
        Metric(
            "gradient.nonfinite_passes",
            "passes",
            "count",
            "during",
            "How many of the passes had a NaN or an infinity in the layer's input or in the gradient at its output.",
            "#{passes: X ∉ ℝ or δ ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
        Metric(
            "gradient.norm_last",
            "loss per weight",
            "log",
            "during",
            "The gradient's norm in the last pass or step: against the first, whether the edit has converged.",
            "‖δᵀX‖_F, last pass",
            "Pascanu et al. (arXiv 1211.5063)",
        ),
        Metric(
            "gradient.norm_worst",
            "loss per weight",
            "log",
            "during",
            "The gradient's norm in the worst pass or step: the first that is not finite, else the largest.",
            "‖δᵀX‖_F where ‖δ‖ ‖X‖ is largest",
            "Pascanu et al. (arXiv 1211.5063)",
        ),
    )

    def compute(self, seen: LaterPasses) -> Readings:
        """The last and the worst pass are left out where there was one pass only."""
        readings = {"gradient.passes": seen.passes, "gradient.nonfinite_passes": seen.nonfinite_passes}
        for name, one in (("last", seen.last), ("worst", seen.worst)):
            if one is not None:
                readings[f"gradient.norm_{name}"] = one.norm
        return readings


class PassSpectrum(Probe[LaterSpectra]):
    """The leading singular values of the later passes."""

    dear = True
    needs = LaterSpectra
    metrics = (
        Metric(
            "gradient.spectrum_last",
            "loss per weight",
            "log",
            "during",
            "The leading singular values in the last pass.",
            "σ_1 … σ_32, last pass",
            "Golub and Van Loan, Matrix Computations, 4th ed., §2.4 and §5.2",
            SPECTRUM_LENGTH,
        ),
        Metric(
            "gradient.spectrum_worst",
            "loss per weight",
            "log",
            "during",
            "The leading singular values in the worst pass.",
            "σ_1 … σ_32, worst pass",
            "Golub and Van Loan, Matrix Computations, 4th ed., §2.4 and §5.2",
            SPECTRUM_LENGTH,
        ),
    )

    def compute(self, seen: LaterSpectra) -> Readings:
        """Left out where there was one pass only, and where no singular value is known."""
        named = (("last", seen.last), ("worst", seen.worst))
        known = {name: one.singular_values for name, one in named if isinstance(one, GradientSpectrum)}
        return {f"gradient.spectrum_{name}": found[:SPECTRUM_LENGTH] for name, found in known.items() if found.size}


class GradientAlignment(Probe[Alignment]):
    """Where the gradient points."""

    tier = "deep"
    needs = Alignment
    metrics = (
        Metric(
            "gradient.cosine_previous",
            "cosine",
            "linear",
            "during",
            "How alike the gradient is to that of the edit before. Near 1 edit after edit: they all push the same way, "
            "and their updates add up.",
            "⟨G_t, G_{t−1}⟩ / (‖G_t‖ ‖G_{t−1}‖)",
            "gradient confusion: Sankararaman et al. (arXiv 1904.06963)",
        ),
        Metric(
            "gradient.cosine_update",
            "cosine",
            "linear",
            "after",
            "How alike the gradient is to the update that the edit made: −1 is plain descent; near 0, the editor goes "
            "its own way; above 0 it climbs.",
            "⟨G_t, W_t − W_{t−1}⟩ / (‖G_t‖ ‖W_t − W_{t−1}‖)",
            "MEND (arXiv 2110.11309), §3",
        ),
    )

    def compute(self, seen: Alignment) -> Readings:
        """Each is left out where one of its two sides is zero or missing."""
        found = {"gradient.cosine_previous": seen.previous, "gradient.cosine_update": seen.update}
        return {name: value for name, value in found.items() if value is not None}
