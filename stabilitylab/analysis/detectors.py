"""What the detectors of slow and sudden trouble compute: one statistic per series, 1 where it is large by any measure.

Each is a pure function of arrays. From which statistic on a run is called diverging is another matter: that is
calibrated on healthy runs, see `stabilitylab.analysis.thresholds`. All logs are natural.

- ``level``: three readings in a row above the baseline, in units of 8 of its spreads and at least a factor of 100; or
  three that climb past a quarter, a half and the whole of that.
- ``trend``: growth that is faster than edits of one size add up. The lower confidence bound of the Theil–Sen slope
  (of log value over edits), times the number of the edit in the window's middle, is the exponent of a power law:
  random steps of equal size add up as t^½, steps in one direction as t. From 2 on it is acceleration. It must also
  amount to a factor of 1.5 over the window, and the last readings must be beyond 3 spreads and a factor of 3.
- ``jump``: one update against what is usual, in units of 8 spreads and at least a factor of 1,000. Nothing leads up
  to a jump: this is its first sign.
- ``shrink``: three readings in a row below the baseline by 8 spreads and a factor of the metric's own.
- ``step``: an update as a share of its weight's norm. Needs no baseline: an update as large as the weight replaces
  it.
- ``canary-kl``: how far the canary's predictions are from the original's, in nats. ``canary-agreement``: the share of
  its answers that changed, in units of a half; the lesser of the last two readings, so that an edit that is taken
  back passes. They need no baseline either.
- ``canary-heading``: the lesser of the last two divergences, extrapolated by as many edits as the last six readings
  span, at the 0.2 quantile of the growth between any two of these; in nats. What is below ``HEADING_LEAST`` nats counts
  as that much: an edit's own small trace is new after the first ones, and says nothing. At least three readings.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from stabilitylab.analysis.trends import medians, theil_sen
from stabilitylab.record.readings import Array

DETECTORS: Final = ("level", "trend", "jump", "shrink", "step", "canary-kl", "canary-agreement", "canary-heading")

LEAST: Final = 0.5
"""No statistic below this counts, however quiet a user's healthy runs are: a tenfold rise, an exponent of 1."""

LAST: Final = 3
"""Readings in a row."""
FAR_SPREADS: Final = 8.0
FAR_LOG: Final = math.log(100.0)
HUGE_LOG: Final = math.log(1_000.0)
NEAR_SPREADS: Final = 3.0
NEAR_LOG: Final = math.log(3.0)
CLIMB: Final = np.array([0.25, 0.5, 1.0])
CONFIDENCE: Final = 0.9995
EXPONENT: Final = 2.0
TREND_LOG: Final = math.log(1.5)
KL_NATS: Final = 1.0
CHANGED: Final = 0.5
HEADING_READINGS: Final = 6
HEADING_FEWEST: Final = 3
HEADING_LEAST: Final = 0.1
HEADING_QUANTILE: Final = 0.2
HEADING_MOST_LOG: Final = 300.0


def far(spread: Array) -> Array:
    """The unit of ``level``: a distance from the baseline in logs, [series]."""
    return np.maximum(FAR_SPREADS * spread, FAR_LOG)


def huge(spread: Array) -> Array:
    """The unit of ``jump``: a distance from the baseline in logs, [series]."""
    return np.maximum(FAR_SPREADS * spread, HUGE_LOG)


def near(spread: Array) -> Array:
    """How far the last readings must be for a trend to matter, in logs, [series]."""
    return np.maximum(NEAR_SPREADS * spread, NEAR_LOG)


def level(rise: Array, unit: Array) -> Array:
    """rise: the last readings' logs over the baseline, [series, 3]. unit: see `far`, [series]. Returns [series]."""
    held = rise.min(axis=1) / unit
    climbs = (np.diff(rise, axis=1) > 0).all(axis=1)
    climb = (rise / np.multiply.outer(CLIMB, unit).T).min(axis=1)
    statistic: Array = np.maximum(held, np.where(climbs, climb, -np.inf))
    return statistic


def fall(rise: Array, unit: Array) -> Array:
    """``shrink``: like `level`, downwards. unit: in logs, infinite where a fall means nothing."""
    statistic: Array = -rise.max(axis=1) / unit
    return statistic


def trend(edits: Array, logs: Array, rise: Array, unit: Array) -> tuple[Array, Array, Array]:
    """edits, logs: a window of readings, [series, points]. rise: [series, 3]. unit: see `near`, [series].

    Returns (statistic, slope, lower bound of the slope), each [series]; slopes in logs per edit.
    """
    slope, lower, _ = theil_sen(edits, logs, CONFIDENCE)
    exponent = lower * medians(edits) / EXPONENT
    amount = lower * (edits[:, -1] - edits[:, 0]) / TREND_LOG
    reach = medians(rise) / unit
    return np.minimum(np.minimum(exponent, amount), reach), slope, lower


def heading(edits: Array, divergences: Array) -> float:
    """edits, divergences: the last few readings, [readings], in nats. Returns nats; 0 for fewer than three."""
    if edits.size < HEADING_FEWEST:
        return 0.0
    logs = np.log(np.maximum(divergences, HEADING_LEAST))
    one, other = np.triu_indices(edits.size, 1)
    growth = float(np.quantile((logs[other] - logs[one]) / (edits[other] - edits[one]), HEADING_QUANTILE))
    ahead = float(logs[-2:].min()) + max(growth, 0.0) * float(edits[-1] - edits[0])
    return math.exp(min(ahead, HEADING_MOST_LOG))


def jump(rise: Array, before: Array, unit: Array) -> Array:
    """rise: the last reading over the baseline, before: the median of those just before it, [series]; logs."""
    return (rise - np.maximum(before, 0.0)) / unit
