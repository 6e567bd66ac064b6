"""Theil–Sen slopes with Sen's confidence bounds, for many series at once."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from stabilitylab.analysis.columns import Places
from stabilitylab.record.readings import Array


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


def medians(values: Array) -> Array:
    """The median of each line, none of which holds NaN: [series, points] to [series]. Made for lines of few points."""
    ordered, middle = np.sort(values, axis=1), values.shape[1] // 2
    found: Array = (ordered[:, middle] + ordered[:, -1 - middle]) / 2.0
    return found


def theil_sen(x: Array, y: Array, confidence: float) -> tuple[Array, Array, Array]:
    """The median of all pairwise slopes and its two-sided confidence bounds.

    x, y: [series, points], at least 2 points and no ties within a line of x. confidence: in (0, 1). Returns slope,
    lower and upper bound, each [series], in units of y over x. The bounds are order statistics of the slopes, from the
    normal approximation of Kendall's statistic (Sen 1968), as `scipy.stats.theilslopes` has them, but for its
    correction for ties in y.
    """
    first, second = _pairs(x.shape[1])
    apart = x[:1] if (x == x[:1]).all() else x  # mostly all series were read at the same edits
    slopes = y.take(second, axis=1) - y.take(first, axis=1)
    slopes /= apart.take(second, axis=1) - apart.take(first, axis=1)
    slopes.sort(axis=1)
    lower, upper = _bounds(x.shape[1], confidence)
    middle = slopes.shape[1] // 2
    median = (slopes[:, middle] + slopes[:, -1 - middle]) / 2.0
    return median, slopes[:, lower], slopes[:, upper]
