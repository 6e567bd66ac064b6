"""How large edits are, which way they point, at which learning rate, and whether they reach what they ask for."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import numpy as np

from stabilitylab.analysis.causes.evidence import Ascent, Learning, Step, Way
from stabilitylab.analysis.columns import Columns, Flat, PerSchema, Places, Schema
from stabilitylab.analysis.findings import Finding
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE

STEPS: Final = 30
LARGE: Final = 0.5
"""An update of half of a weight's original norm: one edit replaces what training put there."""
REACHED: Final = 0.05
"""Of an edit's first gradient, at most so much is left in its last pass: it has reached what it asked for."""
CHANGES: Final = 0.01
"""Of a gradient from an edit's first pass to its last: in between the model, or the request, was another."""
FIRST: Final = 8
"""Edits that say which learning rate is usual, as many as a baseline is made of."""
STEPPED: Final = (1.0, 4.0)
"""Codes of `gradient.source`: an optimizer steps with the weight, or with parts that it is made of."""

_LOSS: Final = ("logits.loss", "logits.loss_weight")
_KEYS: Final = f"{EDITOR_SITE}.keys"
_RATE: Final = "gradient.learning_rate"
_ASCENDS: Final = "gradient.ascends"
_ALONE: Final = ("update.norm", "update.ratio", "drift.ratio", _RATE, _ASCENDS, _KEYS)
_BESIDE: Final = ("gradient.norm", "gradient.source", "drift.ratio", "weight.norm")


@dataclass(frozen=True)
class _Where:
    """Positions in a row. alone: by metric. weights: of each weight's update, drift and relative drift, where all
    three are read, [weights, 3]. passes: of the gradient of an edit's last pass and of its first, [layers, 2]. rates:
    of update and drift, and of what is `_BESIDE` them, −1 for what isn't read, [layers, 6].
    """

    alone: dict[str, Places]
    weights: Places
    passes: Places
    rates: Places


def _where(schema: Schema) -> _Where:
    alone: dict[str, list[int]] = {name: [] for name in _ALONE}
    sites: dict[str, list[str]] = {}
    for position, (metric, site) in enumerate(schema.keys):
        sites.setdefault(metric, []).append(site)
        if metric in alone:
            alone[metric].append(position)

    def beside(first: str, *others: str) -> Places:
        lines = [
            [schema.position.get((metric, site), -1) for metric in (first, *others)] for site in sites.get(first, ())
        ]
        known = np.array(lines, dtype=np.intp).reshape(-1, 1 + len(others))
        return known[(known >= 0).all(axis=1)]

    def with_others(lines: Places) -> Places:
        found = [[schema.position.get((metric, schema.keys[at][1]), -1) for metric in _BESIDE] for at in lines[:, 0]]
        return np.column_stack((lines, np.array(found, dtype=np.intp).reshape(-1, len(_BESIDE))))

    return _Where(
        {name: np.array(positions, dtype=np.intp) for name, positions in alone.items()},
        beside("update.norm", "drift.norm", "drift.ratio"),
        beside("gradient.norm_last", "gradient.norm"),
        with_others(beside("update.norm", "drift.norm")),
    )


class Steps:
    """Follows edits, as long as it is given them.

    learning: of all edits. ascent: None until one steps up the model's own loss. moved: whether any watched weight ever
    moved; moved_before: whether one had before the last row. codebook: whether one holds keys. changes_inside: whether
    the gradient changed within the last edit.
    """

    def __init__(self, columns: Columns) -> None:
        self.learning = Learning(0, 0)
        self.ascent: Ascent | None = None
        self._weighed = 0
        self.moved = self.moved_before = False
        self.codebook = False
        self.changes_inside = False
        self._columns = columns
        self._wheres = PerSchema(_where)
        self._steps: deque[Step] = deque(maxlen=STEPS)
        self._kept: dict[str, tuple[Step, ...]] = {}
        self._ways: dict[str, Way] = {}
        self._first_rates: list[float] = []
        self._first_updates: list[float] = []

    @property
    def latest(self) -> Step | None:
        """The last edit's."""
        return self._steps[-1] if self._steps else None

    @property
    def ways(self) -> tuple[Way, ...]:
        """Of each layer that moved."""
        return tuple(self._ways.values())

    def observe(self, row: Flat, *, alarmed: bool, lost: bool) -> None:
        """Take in a row. alarmed: whether the run is, up to and including this row. lost: whether it is by a hard fact.

        The steps up to the alarm are held on to, and those up to the first hard fact: either may be the first bad one.
        """
        self._follow(row)
        for name, holds in (("alarmed", alarmed), ("lost", lost)):
            if holds and name not in self._kept:
                self._kept[name] = tuple(self._steps)

    def up_to(self, bad: Finding | None) -> tuple[Step, ...]:
        """The last ones up to the alarm or the first hard fact, whichever holds the edit of this finding."""
        kept = [steps for steps in self._kept.values() if bad is not None and any(s.edit == bad.start for s in steps)]
        return kept[0] if kept else ()

    def _follow(self, row: Flat) -> None:
        self.moved_before = self.moved
        where = self._wheres.of(row.schema)
        keys, updates = where.alone[_KEYS], where.alone["update.norm"]
        self.codebook = self.codebook or (keys.size > 0 and bool((row.values[keys] > 0).any()))
        self.moved = self.moved or (row.edit > 0 and updates.size > 0 and bool((row.values[updates] != 0).any()))
        if not row.applied:
            return
        self._follow_passes(row, where)
        self._follow_ways(row, where)
        self._follow_loss(row, where)
        ratios, drifts = where.alone["update.ratio"], where.alone["drift.ratio"]
        if not ratios.size or not drifts.size:
            return
        # A ratio may be NaN or infinite for a weight of zeros; that is no size to go by.
        sizes = np.where(row.finite[ratios], row.values[ratios], 0.0)
        ways = np.where(row.finite[drifts], row.values[drifts], 0.0)
        update, drift = int(sizes.argmax()), int(ways.argmax())
        before = self.latest
        rate, rate_factor, update_factor = self._follow_rate(row, where)
        self._steps.append(
            Step(
                row.edit,
                float(sizes[update]),
                self._site(row, ratios[update]),
                float(ways[drift]),
                self._site(row, drifts[drift]),
                (before.number if before else 0) + bool(sizes.any()),
                (before.large if before else 0) + _is_large(row, where),
                max(float(sizes[update]), before.largest if before else 0.0),
                rate,
                rate_factor,
                update_factor,
            )
        )

    def _follow_rate(self, row: Flat, where: _Where) -> tuple[float | None, float, float]:
        """See `Step`: rate, rate_factor, update_factor."""
        rates, updates = (row.values[where.alone[name]] for name in (_RATE, "update.norm"))
        rates, updates = rates[np.isfinite(rates) & (rates > 0)], updates[np.isfinite(updates) & (updates > 0)]
        if not rates.size or not updates.size:
            return None, 1.0, 1.0
        rate, update = float(rates.max()), float(updates.max())
        if len(self._first_rates) < FIRST:
            self._first_rates.append(rate)
            self._first_updates.append(update)
        with np.errstate(over="ignore"):
            factors = np.array([rate, update]) / [median(self._first_rates), median(self._first_updates)]
        return rate, float(factors[0]), float(factors[1])

    def _follow_loss(self, row: Flat, where: _Where) -> None:
        at = [row.schema.position.get((metric, MODEL_SITE)) for metric in _LOSS]
        if at[0] is None or at[1] is None:
            return
        loss, weight = float(row.values[at[0]]), float(row.values[at[1]])
        # An optimizer that maximises steps up what the loop differentiates.
        at_sites = where.alone[_ASCENDS]
        maximised = next((self._site(row, at) for at in at_sites[row.values[at_sites] > 0]), None)
        weight = weight if maximised is None else -weight
        self._weighed += 1
        if weight < 0 and math.isfinite(loss):
            before = self.ascent or Ascent(0, 0, row.edit, loss, row.edit, loss)
            self.ascent = replace(before, up=before.up + 1, last_edit=row.edit, last_loss=loss, maximised=maximised)
        if self.ascent is not None:
            self.ascent = replace(self.ascent, known=self._weighed)

    def _site(self, row: Flat, position: np.intp) -> str:
        return self._columns.keys[int(row.places[position])][1]

    def _follow_passes(self, row: Flat, where: _Where) -> None:
        """Whether the last edit's gradient changed from pass to pass, and whether it fell to next to nothing."""
        self.changes_inside = False
        if not where.passes.size:
            return
        last, first = row.values[where.passes].T
        with np.errstate(over="ignore", invalid="ignore"):
            self.changes_inside = bool((np.abs(last - first) > CHANGES * np.abs(first)).any())
        known = np.isfinite(first) & (first != 0)
        if known.any():
            with np.errstate(over="ignore"):
                left = (last[known] / first[known]).tolist()
            reached = self.learning.reached + (median(left) <= REACHED)
            self.learning = Learning(self.learning.tried + 1, reached)

    def _follow_ways(self, row: Flat, where: _Where) -> None:
        """Whether updates point one way, and how large they are beside their gradients, at each layer."""
        rates = where.rates
        if not rates.size:
            return
        update, drift = row.values[rates[:, :2]].T
        beside = np.where(rates[:, 2:] >= 0, row.values[rates[:, 2:]], 0.0)  # or nothing asks for it
        gradient, source, ratio, norm = beside.T
        with np.errstate(divide="ignore", invalid="ignore"):
            original = drift / ratio
        measured = np.isfinite(original) & np.isfinite(norm) & (norm > 0)
        original, norm = np.where(measured, original, 0.0), np.where(measured, norm, 0.0)
        known = np.isfinite(update) & np.isfinite(drift) & np.isfinite(gradient) & (update > 0)
        stepped = np.logical_or.reduce([source == code for code in STEPPED])
        seen = (column[known].tolist() for column in (update, drift, gradient, stepped, original, norm))
        for position, size, way, slope, by_optimizer, first_norm, last_norm in zip(rates[known, 0], *seen, strict=True):
            site, rate = self._site(row, position), size / slope if slope else 0.0
            before = self._ways.get(site, Way(site, 0, 0.0, 0.0, 0.0, size, size, rate, rate, 0))
            self._ways[site] = replace(
                before,
                edits=before.edits + 1,
                added=before.added + size,
                largest=max(before.largest, size),
                drift=way,
                last=size,
                last_rate=rate,
                stepped=before.stepped + by_optimizer,
                original=first_norm,
                norm=last_norm,
            )


def _is_large(row: Flat, where: _Where) -> bool:
    """Whether an edit moved some weight by at least half of the norm that it had originally."""
    update, drift, share = row.values[where.weights].T
    with np.errstate(invalid="ignore", over="ignore"):
        large = np.isfinite(drift) & (drift != 0) & (share != 0) & (update * share >= LARGE * drift)
    return bool(large.any())
