"""How large the edited weights are, how far they have moved, and how much room their dtype leaves."""

from __future__ import annotations

import math

from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.weight_pass import WeightPass, WeightScan, WeightWrites
from stabilitylab.record.readings import Metric


def headroom_bits(largest_finite: float, magnitude: float) -> float:
    """log2 of how many times `magnitude` may still grow: inf for 0, -inf for an infinite, NaN for a NaN magnitude."""
    if math.isnan(magnitude):
        return math.nan
    if magnitude == 0:
        return math.inf
    return math.log2(largest_finite) - math.log2(magnitude) if math.isfinite(magnitude) else -math.inf


def _max_abs(seen: WeightScan) -> float:
    return math.nan if math.isnan(seen.low) or math.isnan(seen.high) else max(abs(seen.low), abs(seen.high))


class Update(Probe[WeightPass]):
    """The size of one edit's change."""

    needs = WeightPass
    metrics = (
        Metric(
            "update.norm",
            "1",
            "log",
            "after",
            "How much this edit changed the weight. Growth from edit to edit is what feeds back into NaN.",
            "‖W_t − W_{t−1}‖_F",
            "Rebuilding ROME (arXiv 2403.07175)",
        ),
        Metric(
            "update.ratio",
            "share of ‖W_t‖",
            "log",
            "after",
            "The same as a share of the weight. Around 1e-3 is a gentle edit; near 1 the edit has replaced the weight.",
            "‖W_t − W_{t−1}‖_F / ‖W_t‖_F",
            "RECT (arXiv 2401.04700)",
        ),
    )

    def compute(self, seen: WeightPass) -> Readings:
        """From one weight pass; the ratio is left out where the weight is all zero."""
        ratio = {"update.ratio": seen.update / seen.norm} if seen.norm else {}
        return {"update.norm": seen.update, **ratio}


class Writes(Probe[WeightWrites]):
    """Whether an edit wrote the weight at all: one that wrote it and left it as it was has lost its update."""

    needs = WeightWrites
    metrics = (
        Metric(
            "update.writes",
            "writes",
            "count",
            "after",
            "How often the edit wrote this weight in place. Above 0 with an update of 0: it was put back, or rounded"
            " away. Writes through `.data` are not counted.",
            "Δ tensor._version",
            "—",
        ),
    )

    def compute(self, seen: WeightWrites) -> Readings:
        """From the version counter before and after."""
        return {"update.writes": seen.writes}


class Drift(Probe[WeightPass]):
    """How far the weight is from where it was before any edit."""

    needs = WeightPass
    metrics = (
        Metric(
            "drift.norm",
            "1",
            "log",
            "after",
            "Distance from the original weight. It grows in every sequential run; how fast is what matters.",
            "‖W_t − W_0‖_F",
            "PRUNE (arXiv 2405.16821); ENCORE (arXiv 2502.01636)",
        ),
        Metric(
            "drift.ratio",
            "share of ‖W_0‖",
            "log",
            "after",
            "The distance from the original as a share of its norm. Past 1 the edits outweigh the training.",
            "‖W_t − W_0‖_F / ‖W_0‖_F",
            "RECT (arXiv 2401.04700)",
        ),
    )

    def compute(self, seen: WeightPass) -> Readings:
        """From one weight pass; the ratio is left out where W_0 is all zero."""
        ratio = {"drift.ratio": seen.drift / seen.reference_norm} if seen.reference_norm else {}
        return {"drift.norm": seen.drift, **ratio}


class WeightNorm(Probe[WeightScan]):
    """The size of the weight itself."""

    tier = "light"
    needs = WeightScan
    metrics = (
        Metric(
            "weight.norm",
            "1",
            "log",
            "after",
            "The weight's Frobenius norm. Sequential edits make it grow; twice the original is far outside training.",
            "‖W_t‖_F",
            "ENCORE (arXiv 2502.01636)",
        ),
    )

    def compute(self, seen: WeightScan) -> Readings:
        """From one look at the weight."""
        return {"weight.norm": seen.norm}


class WeightRange(Probe[WeightScan]):
    """The extremes of the weight against the range of its dtype."""

    tier = "light"
    needs = WeightScan
    metrics = (
        Metric(
            "weight.max_abs",
            "1",
            "log",
            "after",
            "The largest magnitude in the weight. A single huge entry dominates every product it takes part in.",
            "max |W_t|",
            "Small-scale proxies (arXiv 2309.14322)",
        ),
        Metric(
            "weight.nonfinite",
            "entries",
            "count",
            "after",
            "Entries that are NaN or infinite. From the first one on, whatever uses the weight is lost.",
            "#{W_t ∉ ℝ}",
            "IEEE 754-2019, §6",
        ),
        Metric(
            "weight.headroom_bits",
            "bits",
            "linear",
            "after",
            "How many times the largest weight can double before its live dtype overflows. Below 2 is an emergency.",
            "log2(largest finite / max |W_t|)",
            "IEEE 754-2019, §3.6",
        ),
    )

    def compute(self, seen: WeightScan) -> Readings:
        """From one look at the weight."""
        largest = _max_abs(seen)
        return {
            "weight.max_abs": largest,
            "weight.nonfinite": seen.nonfinite,
            "weight.headroom_bits": headroom_bits(seen.largest_finite, largest),
        }
