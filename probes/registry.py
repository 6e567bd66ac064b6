"""Every probe. To add one: write its class, and add it here (its import, its line in `ALL` and in `__all__`)."""

from __future__ import annotations

from typing import Any

from stabilitylab.probes.absorption import Absorption, MovedShare
from stabilitylab.probes.activations import (
    ActivationPasses,
    ActivationRange,
    ActivationScale,
    DeadUnits,
    NormHeadroom,
)
from stabilitylab.probes.attention import AttentionEntropy, AttentionLogits, MaskedRows
from stabilitylab.probes.base import TIERS, Probe, Readings, Tier
from stabilitylab.probes.codebook import Codebook, HitShare
from stabilitylab.probes.editor_state import (
    EditLearningRates,
    NormalisedInput,
    Normaliser,
    NormaliserNonfinite,
    NormaliserRows,
)
from stabilitylab.probes.feedback import FeedbackShare, Gain
from stabilitylab.probes.gradients import (
    GradientAlignment,
    GradientNonfinite,
    GradientNorm,
    GradientPasses,
    GradientRank,
    OwnGradient,
    PassSpectrum,
    Spectrum,
)
from stabilitylab.probes.inputs import BadInputs
from stabilitylab.probes.linear_solve import CovarianceCondition, SystemCondition, SystemResidual
from stabilitylab.probes.logits import Canary, Logits, LogitsPasses, Loss, Perplexity
from stabilitylab.probes.null_space import KeyCache, NullSpace
from stabilitylab.probes.rank_one import UpdateDenominator, ValueClamp, ValueRatio
from stabilitylab.probes.side_memory import SideMemory
from stabilitylab.probes.state import StateHealth, StateNonfinite
from stabilitylab.probes.top_singular import SpectralNorm
from stabilitylab.probes.weight_spectrum import ConditionNumber
from stabilitylab.probes.weight_subspace import SubspaceOverlap
from stabilitylab.probes.weights import Drift, Update, WeightNorm, WeightRange, Writes
from stabilitylab.record.readings import Metric

ALL: tuple[type[Probe[Any]], ...] = (
    Normaliser,
    NormaliserRows,
    NormaliserNonfinite,
    EditLearningRates,
    NullSpace,
    CovarianceCondition,
    Logits,
    LogitsPasses,
    Loss,
    ActivationScale,
    ActivationRange,
    BadInputs,
    MaskedRows,
    AttentionLogits,
    AttentionEntropy,
    NormHeadroom,
    ActivationPasses,
    DeadUnits,
    Spectrum,
    GradientNorm,
    GradientRank,
    GradientNonfinite,
    OwnGradient,
    GradientPasses,
    PassSpectrum,
    GradientAlignment,
    NormalisedInput,
    HitShare,
    ValueRatio,
    ValueClamp,
    UpdateDenominator,
    SystemCondition,
    SystemResidual,
    StateHealth,
    StateNonfinite,
    Update,
    Writes,
    Absorption,
    MovedShare,
    Drift,
    WeightNorm,
    WeightRange,
    SpectralNorm,
    ConditionNumber,
    SubspaceOverlap,
    Codebook,
    SideMemory,
    KeyCache,
    Canary,
    Perplexity,
    Gain,
    FeedbackShare,
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
    "Absorption",
    "ActivationPasses",
    "ActivationRange",
    "ActivationScale",
    "AttentionEntropy",
    "AttentionLogits",
    "BadInputs",
    "Canary",
    "Codebook",
    "ConditionNumber",
    "CovarianceCondition",
    "DeadUnits",
    "Drift",
    "EditLearningRates",
    "FeedbackShare",
    "Gain",
    "GradientAlignment",
    "GradientNonfinite",
    "GradientNorm",
    "GradientPasses",
    "GradientRank",
    "HitShare",
    "KeyCache",
    "Logits",
    "LogitsPasses",
    "Loss",
    "MaskedRows",
    "Metric",
    "MovedShare",
    "NormHeadroom",
    "NormalisedInput",
    "Normaliser",
    "NormaliserNonfinite",
    "NormaliserRows",
    "NullSpace",
    "OwnGradient",
    "PassSpectrum",
    "Perplexity",
    "Probe",
    "Readings",
    "SideMemory",
    "SpectralNorm",
    "Spectrum",
    "StateHealth",
    "StateNonfinite",
    "SubspaceOverlap",
    "SystemCondition",
    "SystemResidual",
    "Tier",
    "Update",
    "UpdateDenominator",
    "ValueClamp",
    "ValueRatio",
    "WeightNorm",
    "WeightRange",
    "Writes",
    "catalogue",
    "probes_of",
]
