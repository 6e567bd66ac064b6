"""Limits from whole healthy runs: see `stabilitylab.analysis.thresholds` for what they promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from stabilitylab.analysis.detectors import DETECTORS, LEAST
from stabilitylab.analysis.thresholds import Thresholds, conformal

USUAL: Final = 0.975
"""Quantile over runs of a detector's largest statistic that its scale is: what one kind of loop in ten does is in."""
LEAST_SCALE: Final = 0.05
"""A detector that never stirs in healthy runs would otherwise be divided by nothing."""

Peaks = Mapping[str, float]
"""The largest statistic of each detector over one run; one that never had a reading may be missing."""


def scales_of(runs: Sequence[Peaks]) -> dict[str, float]:
    """What makes detectors comparable: for each, the 0.975 quantile over runs of its largest statistic."""
    return {
        detector: max(float(np.quantile([run.get(detector, 0.0) for run in runs], USUAL)), LEAST_SCALE)
        for detector in DETECTORS
    }


def calibrated(
    runs: Sequence[Peaks], scales: Mapping[str, float], *, alpha: float, source: str, least: float = LEAST
) -> Thresholds:
    """Limits that a further healthy run of the same kind exceeds with probability `alpha` at most.

    runs: healthy ones, none of which `scales` were chosen with. source: what they are, for a reader. least: see
    `Thresholds`.

    Raises:
        UsageError: there are too few runs for `alpha`.
    """
    unlimited = Thresholds(scales, 1.0, least, alpha, len(runs), source)
    score = conformal([unlimited.score_of(run) for run in runs], alpha)
    # A run with just that score is not above it.
    return Thresholds(dict(scales), float(np.nextafter(score, np.inf)), least, alpha, len(runs), source)
