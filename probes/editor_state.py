"""The editor's own state: what a hypernetwork normalises its inputs with, and what then enters it."""

from __future__ import annotations

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.probes.normaliser_pass import LISTED, LearningRates, NormaliserPass
from stabilitylab.record.readings import Metric

_SOURCE = "MEND (arXiv 2110.11309), §3"
_RUNNING = "MALMEN (arXiv 2311.04661) and MEND (arXiv 2110.11309), the authors' code"


class Normaliser(Probe[NormaliserPass]):
    """The spread that the normaliser learned."""

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
        Metric(
            "editor.zero_units",
            "unit",
            "linear",
            "before",
            f"Which units these are: the first {LISTED} of them. Left out where there is none.",
            "{i : std_i = 0}",
            _SOURCE,
            LISTED,
        ),
    )

    def compute(self, seen: NormaliserPass) -> Readings:
        """From the normaliser's buffers; left out while it has seen no row and normalised nothing."""
        if seen.unused:
            return {}
        spread: dict[str, float | Host] = {"editor.std_min": seen.std_min, "editor.std_zeros": seen.std_zeros}
        return spread | ({"editor.zero_units": seen.zero_units} if seen.zero_units.size else {})


class NormaliserRows(Probe[NormaliserPass]):
    """What the normaliser's statistics are made from."""

    tier = "light"
    needs = NormaliserPass
    metrics = (
        Metric(
            "editor.seen_rows",
            "rows",
            "count",
            "before",
            "Rows that the statistics were made from, where the normaliser counts them. At 0 it has seen nothing yet,"
            " and has no statistics to read.",
            "n (MALMEN, UltraEdit) or k (MEND); 0 without a count while the mean is 0 and the std 0 or NaN everywhere",
            _RUNNING,
        ),
        Metric(
            "editor.no_spread",
            "1",
            "flag",
            "before",
            "1 when no unit has a spread above 0 while every mean is a number, as statistics of one row have it: a"
            " spread needs two.",
            "max std > 0 nowhere, all means finite",
            _RUNNING,
        ),
    )

    def compute(self, seen: NormaliserPass) -> Readings:
        """From the normaliser's buffers; the flag is left out while it has seen no row and normalised nothing."""
        counted: Readings = {} if seen.rows is None else {"editor.seen_rows": seen.rows}
        return counted if seen.unused else {**counted, "editor.no_spread": seen.no_spread}


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
            _RUNNING,
        ),
    )

    def compute(self, seen: NormaliserPass) -> Readings:
        """From the buffers. While the normaliser has seen no row and normalised nothing, NaN is of no statistic."""
        return {} if seen.unused and seen.nonfinite else {"editor.nonfinite": seen.nonfinite}


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
