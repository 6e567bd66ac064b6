"""What the model holds beside the watched weights: running statistics, other layers, tables."""

from __future__ import annotations

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.state_pass import BadTensor, StatePass
from stabilitylab.record.readings import Metric


class StateHealth(Probe[StatePass]):
    """Whether all of it is finite."""

    tier = "light"
    needs = StatePass
    metrics = (
        Metric(
            "state.bad_tensors",
            "tensors",
            "count",
            "after",
            "Parameters and buffers beside the watched weights that hold a NaN or an infinity, such as the running "
            "variance of a BatchNorm. Looked at in full before the first edit, after each write that torch counts, in "
            "turn, and after an edit in which anything was wrong; else at about a thousand entries each. What was "
            "infinite before the first edit, such as a mask, is left out, and so is a buffer that held NaN then.",
            "#{tensors ∌ ℝ}",
            "IEEE 754-2019, §6",
        ),
    )

    def compute(self, seen: StatePass) -> Readings:
        """The number of them."""
        return {"state.bad_tensors": seen.tensors}


class StateNonfinite(Probe[BadTensor]):
    """Where it is not."""

    tier = "light"
    needs = BadTensor
    metrics = (
        Metric(
            "state.nonfinite",
            "entries",
            "count",
            "after",
            "NaN or infinite entries of one such tensor, among those that were looked at.",
            "#{entries ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
    )

    def compute(self, seen: BadTensor) -> Readings:
        """The number of them."""
        return {"state.nonfinite": seen.nonfinite}
