"""What the edited layers put out inside the edit."""

from __future__ import annotations

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.output_pass import OutputPass
from stabilitylab.probes.weights import headroom_bits

from stabilitylab.readings import Metric


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
