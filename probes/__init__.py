"""Probes: one kind of quantity each, in small classes. Add one by writing its class and its line in `ALL`."""

from __future__ import annotations

from typing import Any

from stabilitylab.probes.activations import ActivationRange, ActivationScale
from stabilitylab.probes.base import TIERS, Probe, Readings, Tier
from stabilitylab.probes.editor_state import EditLearningRates, NormalisedInput, Normaliser
from stabilitylab.probes.feedback import Gain
from stabilitylab.probes.gradients import GradientNonfinite, GradientNorm, Spectrum, StableRank
from stabilitylab.probes.logits import Canary, Logits
from stabilitylab.probes.weight_spectrum import ConditionNumber, SpectralNorm
from stabilitylab.probes.weights import Drift, Update, WeightNorm, WeightRange

from stabilitylab.readings import Metric

ALL: tuple[type[Probe[Any]], ...] = (
    Normaliser,
    EditLearningRates,
    Logits,
    ActivationScale,
    ActivationRange,
    Spectrum,
    GradientNorm,
    StableRank,
    GradientNonfinite,
    NormalisedInput,
    Update,
    Drift,
    WeightNorm,
    WeightRange,
    SpectralNorm,
    ConditionNumber,
    Canary,
    Gain,
)
"""Every probe, in the order in which an edit makes their quantities."""


def probes_of(tier: Tier) -> tuple[Probe[Any], ...]:
    """One of each probe of a tier and of the cheaper ones, with their own settings."""
    held = TIERS[: TIERS.index(tier) + 1]
    return tuple(probe() for probe in ALL if probe.tier in held)


def catalogue() -> tuple[Metric, ...]:
    """The description of every metric that the probes emit."""
    return tuple(metric for probe in ALL for metric in probe.metrics)


__all__ = [
    "ALL",
    "TIERS",
    "ActivationRange",
    "ActivationScale",
    "Canary",
    "ConditionNumber",
    "Drift",
    "EditLearningRates",
    "Gain",
    "GradientNonfinite",
    "GradientNorm",
    "Logits",
    "Metric",
    "NormalisedInput",
    "Normaliser",
    "Probe",
    "Readings",
    "SpectralNorm",
    "Spectrum",
    "StableRank",
    "Tier",
    "Update",
    "WeightNorm",
    "WeightRange",
    "catalogue",
    "probes_of",
]
