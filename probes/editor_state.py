"""The editor's own state: what a hypernetwork normalises its inputs with, and what then enters it."""

from __future__ import annotations

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass
from stabilitylab.record.readings import Metric

_SOURCE = "MEND (arXiv 2110.11309), §3"


class Normaliser(Probe[NormaliserPass]):
    """The spread that the normaliser learned, frozen at edit time."""

    tier = "light"
    needs = NormaliserPass
    metrics = (
        Metric(
            "editor.std_min",
            "1",
            "log",
            "before",
            "The smallest spread that the normaliser divides by. A unit that was dead in training has 0.",
            "min std",
            _SOURCE,
        ),
        Metric(
            "editor.std_zeros",
            "units",
            "count",
            "before",
            "Units whose spread is exactly 0: when one of them fires, its normalised value is 10⁷ times its own.",
            "#{std = 0}",
            _SOURCE,
        ),
    )

    def compute(self, seen: NormaliserPass) -> Readings:
        """From the normaliser's buffers."""
        return {"editor.std_min": seen.std_min, "editor.std_zeros": seen.std_zeros}


class NormaliserNonfinite(Probe[NormaliserPass]):
    """A normaliser that was never loaded, or that one bad batch has spoilt for good."""

    tier = "light"
    needs = NormaliserPass
    metrics = (
        Metric(
            "editor.nonfinite",
            "entries",
            "count",
            "before",
            "NaN or infinite entries of the normaliser's mean and std: never loaded from the checkpoint, or a running "
            "std that was updated with a single row, which is NaN for good.",
            "#{mean or std not finite}",
            "MALMEN (arXiv 2311.04661) and MEND (arXiv 2110.11309), the authors' code",
        ),
    )

    def compute(self, seen: NormaliserPass) -> Readings:
        """From the normaliser's buffers."""
        return {"editor.nonfinite": seen.nonfinite}


class NormalisedInput(Probe[NormaliserPass]):
    """What enters the hypernetwork."""

    tier = "light"
    needs = NormaliserPass
    metrics = (
        Metric(
            "editor.input_max",
            "standard deviations",
            "log",
            "during",
            "The largest normalised input to the hypernetwork. It was trained on values of a few; it leads failures.",
            "max |(u − mean) / (std + ε)|, ε = 10⁻⁷ (MEND) or the dtype's epsilon (MALMEN)",
            _SOURCE,
        ),
        Metric("editor.input_unit", "unit", "linear", "during", "The unit where it occurred.", "argmax", _SOURCE),
        Metric(
            "editor.input_unit_std",
            "1",
            "log",
            "during",
            "The spread that this unit was divided by.",
            "std of that unit",
            _SOURCE,
        ),
    )

    def compute(self, seen: NormaliserPass) -> Readings:
        """Left out when nothing entered the hypernetwork during the edit."""
        if seen.input_max is None or seen.input_unit is None or seen.input_unit_std is None:
            return {}
        return {
            "editor.input_max": seen.input_max,
            "editor.input_unit": seen.input_unit,
            "editor.input_unit_std": seen.input_unit_std,
        }


class EditLearningRates(Probe[LearningRates]):
    """The learning rates that the editor learned, one per edited layer."""

    tier = "light"
    needs = LearningRates
    metrics = (
        Metric(
            "editor.learning_rate",
            "1",
            "linear",
            "before",
            "The learned factor on each layer's update.",
            "α_ℓ",
            _SOURCE,
            64,
        ),
    )

    def compute(self, seen: LearningRates) -> Readings:
        """The first 64 of them."""
        return {"editor.learning_rate": seen.rates[:64]}
