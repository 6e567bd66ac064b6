"""What the model is called with inside the edit."""

from __future__ import annotations

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.input_pass import InputPass
from stabilitylab.record.readings import Metric


class BadInputs(Probe[InputPass]):
    """Inputs that no model can make anything of."""

    needs = InputPass
    tier = "light"
    metrics = (
        Metric(
            "inputs.bad_entries",
            "entries",
            "count",
            "during",
            "NaN and +∞ among the floating point numbers that the edit's calls of the model hand over, such as pixels "
            "or embeddings. −∞ is left out: masks are made of it. Absent where it is called with whole numbers alone.",
            "#{entries = NaN or +∞}",
            "IEEE 754-2019, §6",
        ),
    )

    def compute(self, seen: InputPass) -> Readings:
        """The number of them, over all calls of the edit."""
        return {"inputs.bad_entries": seen.bad}
