"""What the edited layers put out inside the edit."""

from __future__ import annotations

import math

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.gradient_factors import GradientSize
from stabilitylab.probes.output_pass import LaterOutputs, NormInput, OutputPass
from stabilitylab.probes.weights import headroom_bits
from stabilitylab.record.readings import Metric


class ActivationScale(Probe[OutputPass]):
    """The size of the outputs, with and without the first position."""

    needs = OutputPass
    metrics = (
        Metric(
            "activation.rms",
            "1",
            "log",
            "during",
            "The root mean square of the layer's outputs, over the model as it was before this edit took effect.",
            "(mean y²)^½",
            "Small-scale proxies (arXiv 2309.14322)",
        ),
        Metric(
            "activation.max_abs",
            "1",
            "log",
            "during",
            "The layer's largest output.",
            "max |y|",
            "Massive activations (arXiv 2402.17762)",
        ),
        Metric(
            "activation.rms_beyond_first",
            "1",
            "log",
            "during",
            "The same without the first position, whose sink may hide what edits do to all others.",
            "(mean y²)^½ over positions > 0",
            "Massive activations (arXiv 2402.17762)",
        ),
        Metric(
            "activation.max_abs_beyond_first",
            "1",
            "log",
            "during",
            "The layer's largest output beyond the first position.",
            "max |y| over positions > 0",
            "Massive activations (arXiv 2402.17762)",
        ),
    )

    def compute(self, seen: OutputPass) -> Readings:
        """Those beyond the first position are left out where there is no sequence."""
        readings = {"activation.rms": seen.rms, "activation.max_abs": seen.max_abs}
        if seen.rms_beyond_first is not None:
            readings["activation.rms_beyond_first"] = seen.rms_beyond_first
        if seen.max_abs_beyond_first is not None:
            readings["activation.max_abs_beyond_first"] = seen.max_abs_beyond_first
        return readings


class ActivationRange(Probe[OutputPass]):
    """The outputs against the range of their dtype."""

    needs = OutputPass
    metrics = (
        Metric(
            "activation.headroom_bits",
            "bits",
            "linear",
            "during",
            "How many times the layer's largest output can double before its dtype overflows.",
            "log2(largest finite / max |y|)",
            "IEEE 754-2019, §3.6",
        ),
        Metric(
            "activation.nonfinite",
            "entries",
            "count",
            "during",
            "NaN or infinite entries among the layer's outputs.",
            "#{y ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
    )

    def compute(self, seen: OutputPass) -> Readings:
        """From the first output inside the edit."""
        return {
            "activation.headroom_bits": headroom_bits(seen.largest_finite, seen.max_abs),
            "activation.nonfinite": seen.nonfinite,
        }


class NormHeadroom(Probe[NormInput]):
    """What enters the normalisation after a layer, against what it can square."""

    needs = NormInput
    metrics = (
        Metric(
            "activation.norm_input",
            "1",
            "log",
            "during",
            "The largest entry of what enters the next LayerNorm or RMSNorm after this layer, the residual included.",
            "max |h|",
            "Massive activations (arXiv 2402.17762)",
        ),
        Metric(
            "activation.norm_headroom_bits",
            "bits",
            "linear",
            "during",
            "How many times that may double before its square overflows inside the normalisation. It comes long before "
            "the tensor itself overflows: at 2⁶⁴ in fp32 and bf16.",
            "log2(√max / max |h|), or log2(max / max |h|) where that is less",
            "IEEE 754-2019, §3.6",
        ),
    )

    def compute(self, seen: NormInput) -> Readings:
        """From the first normalisation that ran after the layer."""
        return {
            "activation.norm_input": seen.max_abs,
            "activation.norm_headroom_bits": headroom_bits(seen.limit, seen.max_abs),
        }


class DeadUnits(Probe[GradientSize]):
    """Units of the layer's input that say nothing."""

    needs = GradientSize
    metrics = (
        Metric(
            "activation.dead_share",
            "share",
            "linear",
            "during",
            "Share of the layer's input units that are exactly 0 at every token: ReLU units that did not fire. A "
            "frozen normaliser that saw such a unit dead has a spread of 0 for it.",
            "#{j: x_j = 0 at all tokens} / in",
            "dying ReLU: Lu et al. (arXiv 1903.06733)",
        ),
    )

    def compute(self, seen: GradientSize) -> Readings:
        """From the first pass that a backward answered."""
        return {} if math.isnan(seen.dead_share) else {"activation.dead_share": seen.dead_share}


class ActivationPasses(Probe[LaterOutputs]):
    """The later forwards of an edit that runs a layer several times."""

    needs = LaterOutputs
    metrics = (
        Metric(
            "activation.passes",
            "passes",
            "count",
            "during",
            "Forwards through the layer inside the edit. All activation readings without a suffix are of the first.",
            "#",
            "—",
        ),
        Metric(
            "activation.nonfinite_passes",
            "passes",
            "count",
            "during",
            "How many of them put out a NaN or an infinity.",
            "#{passes: y ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
        Metric(
            "activation.max_abs_last",
            "1",
            "log",
            "during",
            "The layer's largest output in the last forward.",
            "max |y|, last forward",
            "Massive activations (arXiv 2402.17762)",
        ),
        Metric(
            "activation.max_abs_worst",
            "1",
            "log",
            "during",
            "The layer's largest output in any forward; of the first that is not finite, if there is one.",
            "max |y| over all forwards",
            "Massive activations (arXiv 2402.17762)",
        ),
    )

    def compute(self, seen: LaterOutputs) -> Readings:
        """The last and the worst are left out where there was one forward only."""
        readings = {"activation.passes": seen.passes, "activation.nonfinite_passes": seen.nonfinite_passes}
        if seen.max_abs_last is not None and seen.max_abs_worst is not None:
            readings |= {
                "activation.max_abs_last": seen.max_abs_last,
                "activation.max_abs_worst": seen.max_abs_worst,
            }
        return readings
