"""What led up to the first non-finite value: a bounded memory of editor inputs, updates and extremes."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Final

import numpy as np

from stabilitylab.analysis.causes import EditorInput, Growth
from stabilitylab.analysis.columns import Columns, Flat, Places, kind_of
from stabilitylab.analysis.facts_editor import INPUT_DIVERGING, INPUT_DRIFTING
from stabilitylab.analysis.findings import Finding
from stabilitylab.analysis.trends import theil_sen
from stabilitylab.readings import EDITOR_SITE, Key

WINDOWS: Final = (12, 30)
LEAST: Final = 5
CONFIDENCE: Final = 0.9

_INPUT: Final = f"{EDITOR_SITE}.input"


class LeadIn:
    """Remembers until the first non-finite value, then holds still: what comes after it is consequence."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._at: dict[Key, int] = {}
        self._inputs: Places = np.zeros(0, dtype=np.intp)
        self._updates: Places = np.zeros(0, dtype=np.intp)
        self._points: deque[tuple[float, float, float]] = deque(maxlen=max(WINDOWS))
        self._strongest: Growth | None = None
        self._crossed: EditorInput | None = None
        self._largest_finite: dict[Key, float] = {}
        self._infinite: set[Key] = set()
        self._frozen = False

    def observe(self, row: Flat, *, alarmed: bool, nonfinite: bool) -> None:
        """Take in a row. alarmed, nonfinite: whether the run is, up to and including this row."""
        if self._frozen:
            return
        if row.fresh:
            self._look_up(row)
        self._follow_inputs(row)
        inputs, updates = row.values[self._inputs], row.values[self._updates]
        inputs, updates = inputs[np.isfinite(inputs)], updates[np.isfinite(updates)]
        if row.applied and inputs.size and updates.size and min(inputs.max(), updates.max()) > 0:
            self._points.append((float(row.edit), math.log(inputs.max()), math.log(updates.max())))
        if alarmed:  # from here on the strongest counts: that the run has saturated later must not hide the growth
            self._strongest = self.growth
        if nonfinite:
            self._frozen = True
            self._infinite = {
                (kind_of(metric), site)
                for (metric, site), at in self._at.items()
                if metric.endswith(".max_abs") and math.isinf(row.values[at])
            }

    def _look_up(self, row: Flat) -> None:
        self._at = {self._columns.keys[place]: position for position, place in enumerate(row.places)}
        chosen = {
            name: [position for (metric, _), position in self._at.items() if metric == name]
            for name in (f"{_INPUT}_max", "update.norm")
        }
        self._inputs = np.array(chosen[f"{_INPUT}_max"], dtype=np.intp)
        self._updates = np.array(chosen["update.norm"], dtype=np.intp)
        for (metric, site), position in self._at.items():
            kind, largest = kind_of(metric), float(row.values[position])
            bits = self._value(row, f"{kind}.headroom_bits", site)
            if metric == f"{kind}.max_abs" and bits is not None and math.isfinite(bits) and 0 < largest < math.inf:
                # fp64 itself ends at 2^1024, where rounding would tip this over into infinity.
                exponent = min(math.log2(largest) + bits, 1024 - 1e-9)
                self._largest_finite.setdefault((kind, site), 2.0**exponent)

    def _value(self, row: Flat, metric: str, site: str) -> float | None:
        at = self._at.get((metric, site))
        return None if at is None else float(row.values[at])

    def _follow_inputs(self, row: Flat) -> None:
        """The first editor input past a limit (the higher limit takes over), and how far the same unit went."""
        for position in self._inputs:
            site, value = self._columns.keys[row.places[position]][1], float(row.values[position])
            if not INPUT_DRIFTING <= value < math.inf:
                continue
            unit, std = self._value(row, f"{_INPUT}_unit", site), self._value(row, f"{_INPUT}_unit_std", site)
            number = int(unit) if unit is not None and math.isfinite(unit) else None
            here, known = EditorInput(row.edit, site, value, number, std), self._crossed
            if known is None or known.largest < INPUT_DIVERGING <= value:
                self._crossed = here
            elif (known.site, known.unit) == (site, number) and known.largest < value:
                self._crossed = replace(here, std=known.std)

    @property
    def crossed(self) -> EditorInput | None:
        """The first editor input past a limit, at the edit where that unit was furthest out."""
        return self._crossed

    @property
    def growth(self) -> Growth | None:
        """The joint growth of the largest editor input and update up to now; from the alarm on, the strongest seen."""
        best = self._strongest
        if self._frozen:
            return best
        for window in WINDOWS:
            points = np.array(self._points)[-window:]
            if len(points) < LEAST:
                continue
            slope, lower, _ = theil_sen(np.stack((points[:, 0],) * 2), points[:, 1:].T, CONFIDENCE)
            if (lower <= 0).any():
                continue
            factors = np.exp(np.minimum(slope * (points[-1, 0] - points[0, 0]), 700.0))
            here = Growth(int(points[0, 0]), int(points[-1, 0]), float(factors[0]), float(factors[1]))
            if best is None or here.least > best.least:
                best = here
        return best

    def largest_finite(self, bad: Finding | None) -> float | None:
        """What the dtype of a finding's weights or activations can hold; None where nothing says it."""
        return None if bad is None else self._largest_finite.get((kind_of(bad.metric), bad.site))

    def overflowed(self, bad: Finding | None) -> bool:
        """Whether the weights or activations of a finding became infinite, not NaN, at the first non-finite edit."""
        return bad is not None and (kind_of(bad.metric), bad.site) in self._infinite
