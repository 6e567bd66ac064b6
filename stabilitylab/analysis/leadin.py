"""What led up to the first bad edit: a bounded memory of the editor's inputs, its updates and the weights' extremes."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Final

import numpy as np

from stabilitylab.analysis.causes import EditorInput, Growth
from stabilitylab.analysis.columns import Columns, Flat, kind_of
from stabilitylab.analysis.drift import theil_sen
from stabilitylab.analysis.facts import INPUT_DIVERGING, INPUT_DRIFTING
from stabilitylab.analysis.findings import Finding

WINDOW: Final = 12
LEAST: Final = 5
CONFIDENCE: Final = 0.9

_FOLLOWED: Final = (
    "editor.input_max",
    "editor.input_unit",
    "editor.input_unit_std",
    "update.norm",
    "weight.max_abs",
    "weight.headroom_bits",
    "activation.max_abs",
    "activation.headroom_bits",
)


class LeadIn:
    """Remembers until the first non-finite value, then holds still: what comes after it is consequence."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._at: list[tuple[int, str, str]] = []
        self._points: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)
        self._growth: Growth | None = None
        self._crossed: EditorInput | None = None
        self._largest_finite: dict[tuple[str, str], float] = {}
        self._infinite: set[tuple[str, int]] = set()
        self._frozen = False

    def observe(self, row: Flat, nonfinite: bool) -> None:
        """Take in a row. nonfinite: whether anything has been non-finite up to and including this row."""
        if row.fresh:
            keys = [self._columns.keys[place] for place in row.places]
            self._at = [(at, metric, site) for at, (metric, site) in enumerate(keys) if metric in _FOLLOWED]
        if self._frozen:
            return
        self._frozen = nonfinite
        read = {(metric, site): float(row.values[at]) for at, metric, site in self._at}
        inputs = {site: value for (metric, site), value in read.items() if metric == "editor.input_max"}
        updates = [value for (metric, _), value in read.items() if metric == "update.norm" and math.isfinite(value)]
        self._inputs(row.edit, inputs, read)
        self._ranges(row.edit, read)
        finite = [value for value in inputs.values() if math.isfinite(value)]
        if row.applied and finite and updates and min(max(finite), max(updates)) > 0:
            self._points.append((row.edit, math.log(max(finite)), math.log(max(updates))))
            self._grow()

    def _inputs(self, edit: int, inputs: dict[str, float], read: dict[tuple[str, str], float]) -> None:
        """The first input past a limit (a higher limit takes over), and how far the same unit went."""
        for site, value in inputs.items():
            unit, std = read.get(("editor.input_unit", site)), read.get(("editor.input_unit_std", site))
            here = EditorInput(edit, site, value, None if unit is None or not math.isfinite(unit) else int(unit), std)
            known = self._crossed
            if known is None or known.largest < INPUT_DIVERGING <= value < math.inf:
                if INPUT_DRIFTING <= value < math.inf:
                    self._crossed = here
            elif known.site == site and known.unit == here.unit and known.largest < value < math.inf:
                self._crossed = replace(here, std=known.std)

    def _ranges(self, edit: int, read: dict[tuple[str, str], float]) -> None:
        for (metric, site), largest in read.items():
            if not metric.endswith(".max_abs"):
                continue
            kind = kind_of(metric)
            bits = read.get((f"{kind}.headroom_bits", site))
            if bits is not None and math.isfinite(bits) and math.isfinite(largest):
                self._largest_finite[kind, site] = largest * 2.0**bits
            if math.isinf(largest):
                self._infinite.add((site, edit))

    def _grow(self) -> None:
        """Keep the strongest joint growth seen: later edits of a run that has saturated must not hide it."""
        if len(self._points) < LEAST:
            return
        points = np.array(self._points)
        edits = np.broadcast_to(points[:, 0], (2, len(points)))
        slope, lower, _ = theil_sen(edits, points[:, 1:].T, CONFIDENCE)
        if (lower <= 0).any():
            return
        factors = np.exp(np.minimum(slope * (points[-1, 0] - points[0, 0]), 700.0))
        if self._growth is None or factors.min() > min(self._growth.input_factor, self._growth.update_factor):
            self._growth = Growth(int(points[0, 0]), int(points[-1, 0]), float(factors[0]), float(factors[1]))

    @property
    def worst_input(self) -> EditorInput | None:
        """The first editor input past a limit, at the edit where the same unit was furthest out."""
        return self._crossed

    @property
    def growth(self) -> Growth | None:
        """The strongest joint growth of editor input and update."""
        return self._growth

    def largest_finite(self, bad: Finding | None) -> float | None:
        """What the dtype at the site of a finding can hold, in units of the value; None where nothing says it."""
        return None if bad is None else self._largest_finite.get((kind_of(bad.metric), bad.site))

    def overflowed(self, bad: Finding | None) -> bool:
        """Whether a weight or activation became infinite, not NaN, at the edit of a finding."""
        return bad is not None and (bad.site, bad.edit) in self._infinite
