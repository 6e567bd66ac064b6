"""Updates as they would have been at the first learning rate: a warm-up makes them larger, and that is no trouble."""

from __future__ import annotations

import numpy as np

from stabilitylab.analysis.columns import Places
from stabilitylab.analysis.drift_series import NOTHING, VANISHED
from stabilitylab.record.readings import Array


def log_rates(values: Array, places: Places | None) -> Array | None:
    """The log of each series' learning rate, NaN where none is known, [..., series].

    values: of one row, or of several. places: where the rates are in a row, -1 for none, [series]; None where there is
    none at all.
    """
    if places is None:
        return None
    rates = values[..., places]
    known = (places >= 0) & np.isfinite(rates) & (rates > 0)
    found: Array = np.log(rates, out=np.full(known.shape, np.nan), where=known)
    return found


def rises(rates: Array | None, first: Array) -> Array:
    """By how much they are above the first that were known, which are logs too, NaN where none was. [..., series]."""
    if rates is None:
        return np.zeros(first.shape)
    rise: Array = np.fmax(rates - first, 0.0)
    return rise


def logs_without(values: Array, risen: Array) -> Array:
    """The logs of what was read, less the rise of the learning rate; of zero, that of next to nothing."""
    logs = np.log(np.maximum(values, VANISHED))
    return np.where(logs > NOTHING, logs - risen, logs)
