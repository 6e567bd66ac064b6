"""A row of readings as flat arrays, with a place for every (metric, site) and its order in the dataflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.readings import Array, EditRow, Key, Metric

Places = NDArray[np.intp]

_PHASES: Final = {"before": 0, "during": 1, "after": 2}
_KINDS: Final = {
    kind: rank
    for rank, kind in enumerate(
        ("activation", "attention", "logits", "gradient", "editor", "weight", "canary", "feedback")
    )
}
_KIND_OF: Final = {"update": "weight", "drift": "weight"}
_DEFAULT_PHASE: Final = {"activation": 1, "attention": 1, "logits": 1, "gradient": 1, "editor": 1}


def kind_of(metric: str) -> str:
    """What a metric is about: its family, with ``update`` and ``drift`` counted to ``weight``."""
    family = metric.partition(".")[0]
    return _KIND_OF.get(family, family)


@dataclass(frozen=True)
class Flat:
    """One row as parallel arrays over the readings that were taken.

    places: where each belongs among all (metric, site) pairs of the run. values: its first value. finite: whether all
    of its values are. fresh: whether the set of readings differs from the row before, so that lookups must be redone.
    """

    edit: int
    applied: bool
    places: Places
    values: Array
    finite: NDArray[np.bool_]
    fresh: bool


class Columns:
    """Numbers the (metric, site) pairs of a run in the order of their first appearance.

    That order, and not the order within a later row, is what the run file keeps: so a run reads back the same.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.keys: list[Key] = []
        self._place: dict[Key, int] = {}
        self._sites: dict[str, int] = {}
        self._phase = {metric.name: _PHASES[metric.phase] for metric in metrics}
        self._last_keys: tuple[Key, ...] | None = None
        self._last_places: Places = np.zeros(0, dtype=np.intp)

    def order(self, place: int) -> tuple[int, int, int, int]:
        """A sort key: what comes earlier within one edit can be the cause of what comes later.

        By phase; within one, activations before logits before gradients before the editor's inputs, and weights before
        the canary; then by site, forwards, but backwards for gradients, since that is how they flow.
        """
        metric, site = self.keys[place]
        kind, rank = kind_of(metric), self._sites[site]
        phase = self._phase.get(metric, _DEFAULT_PHASE.get(kind, 2))
        return (phase, _KINDS.get(kind, len(_KINDS)), -rank if kind == "gradient" else rank, place)

    def flatten(self, row: EditRow) -> Flat:
        """The row as arrays. A reading without any value counts as not taken."""
        keys, readings = tuple(row.readings), list(row.readings.values())
        sizes = np.fromiter(map(len, readings), dtype=np.intp, count=len(readings))
        if keys != self._last_keys:
            self._register(keys)
        if not sizes.all():
            keys = tuple(key for key, size in zip(keys, sizes, strict=True) if size)
            readings = [reading for reading in readings if len(reading)]
            sizes = sizes[sizes > 0]
        fresh = keys != self._last_keys
        if fresh:
            self._last_keys = keys
            self._last_places = np.array([self._place[key] for key in keys], dtype=np.intp)
        values, finite = np.zeros(0), np.zeros(0, dtype=bool)
        if readings:
            flat = np.concatenate(readings)
            starts = np.cumsum(sizes) - sizes
            values, finite = flat[starts], np.logical_and.reduceat(np.isfinite(flat), starts)
        return Flat(row.edit, row.status == "applied", self._last_places, values, finite, fresh)

    def _register(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key not in self._place:
                self._place[key] = len(self.keys)
                self.keys.append(key)
                self._sites.setdefault(key[1], len(self._sites))


class Once:
    """Remembers at which places a rule has spoken, so that a claim that holds on is made once."""

    def __init__(self) -> None:
        self._said: dict[str, NDArray[np.bool_]] = {}

    def said(self, rule: str, places: Places) -> NDArray[np.bool_]:
        """Whether `rule` has spoken, per place."""
        said = self._said.get(rule)
        if said is None:
            return np.zeros(places.size, dtype=bool)
        known = places < said.size
        return known & said[np.where(known, places, 0)]

    def new(self, rule: str, places: Places) -> NDArray[np.bool_]:
        """Whether `rule` speaks for the first time, per place; from then on it has spoken at all of them."""
        if not places.size:
            return np.zeros(0, dtype=bool)
        fresh = ~self.said(rule, places)
        if fresh.any():
            said = self._said.get(rule, np.zeros(0, dtype=bool))
            more = int(places.max()) + 1 - said.size
            self._said[rule] = said = np.concatenate((said, np.zeros(max(more, 0), dtype=bool)))
            said[places] = True
        return fresh
