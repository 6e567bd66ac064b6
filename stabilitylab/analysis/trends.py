"""Theil–Sen slopes with Sen's confidence bounds, for many series at once."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from stabilitylab.analysis.columns import Places
from stabilitylab.readings import Array


@lru_cache(maxsize=64)
def _pairs(points: int) -> tuple[Places, Places]:
    first, second = np.triu_indices(points, 1)
    return first, second


@lru_cache(maxsize=64)
def _bounds(points: int, confidence: float) -> tuple[int, int]:
    """Ranks of the lower and the upper bound among the sorted slopes."""
    pairs = points * (points - 1) // 2
    spread = math.sqrt(points * (points - 1) * (2 * points + 5) / 18.0)
    reach = NormalDist().inv_cdf(0.5 + confidence / 2.0) * spread
    return max(round((pairs - reach) / 2.0) - 1, 0), min(round((pairs + reach) / 2.0), pairs - 1)


def theil_sen(x: Array, y: Array, confidence: float) -> tuple[Array, Array, Array]:
    """The median of all pairwise slopes and its two-sided confidence bounds.

    x, y: [series, points], at least 2 points and no ties within a line of x. confidence: in (0, 1). Returns slope,
    lower and upper bound, each [series], in units of y over x. The bounds are order statistics of the slopes, from the
    normal approximation of Kendall's statistic (Sen 1968), as `scipy.stats.theilslopes` has them, but for its
    correction for ties in y.
    """
    first, second = _pairs(x.shape[1])
    slopes = np.sort((y[:, second] - y[:, first]) / (x[:, second] - x[:, first]), axis=1)
    lower, upper = _bounds(x.shape[1], confidence)
    middle = slopes.shape[1] // 2
    median = (slopes[:, middle] + slopes[:, -1 - middle]) / 2.0
    return median, slopes[:, lower], slopes[:, upper]
