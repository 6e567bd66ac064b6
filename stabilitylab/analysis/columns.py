"""A row of readings as flat arrays, with a place for every (metric, site) and its order in the dataflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from stabilitylab.record.packed import Frame, PackedReadings, as_packed
from stabilitylab.record.readings import Array, EditRow, Key, Metric

Places = NDArray[np.intp]
Found = TypeVar("Found")

SCHEMAS: Final = 16
"""Sets of readings that are remembered in any case: probes that read every so many edits make several alternate."""
MOST_SCHEMAS: Final = 64
"""And at most, of small sets."""
KEYS: Final = 1 << 18
"""Readings in all of these."""

_PHASES: Final = {"before": 0, "during": 1, "after": 2}
_KINDS: Final = {
    kind: rank
    for rank, kind in enumerate(
        ("inputs", "activation", "attention", "logits", "gradient", "editor", "state", "weight", "canary", "feedback")
    )
}
_LATER_PASSES: Final = ("_last", "_worst", "_passes")
"""How the names of what is read in later passes of an edit end."""
_KIND_OF: Final = {"update": "weight", "drift": "weight"}
_DEFAULT_PHASE: Final = {"inputs": 1, "activation": 1, "attention": 1, "logits": 1, "gradient": 1, "editor": 1}


def kind_of(metric: str) -> str:
    """What a metric is about: its family, with ``update`` and ``drift`` counted to ``weight``."""
    family = metric.partition(".")[0]
    return _KIND_OF.get(family, family)


@dataclass(frozen=True, eq=False)
class Schema:
    """Which readings a row holds. keys: in the row's order. places: where each belongs among all pairs of the run.

    Compared by identity, and may be weakly referred to: what follows from a schema alone is worked out once, and goes
    when it goes.
    """

    keys: tuple[Key, ...]
    places: Places

    @cached_property
    def position(self) -> dict[Key, int]:
        """Where in the row each reading stands."""
        return {key: position for position, key in enumerate(self.keys)}


@dataclass(frozen=True)
class Flat:
    """One row as parallel arrays over the readings that were taken.

    values: each reading's first value. finite: whether all of its values are.
    """

    edit: int
    applied: bool
    schema: Schema
    values: Array
    finite: NDArray[np.bool_]

    @property
    def places(self) -> Places:
        """Where each reading belongs among all (metric, site) pairs of the run."""
        return self.schema.places


class PerSchema(Generic[Found]):
    """What follows from a schema alone, worked out once for each schema that is remembered."""

    def __init__(self, work_out: Callable[[Schema], Found]) -> None:
        self._work_out = work_out
        self._known: WeakKeyDictionary[Schema, Found] = WeakKeyDictionary()

    def of(self, schema: Schema) -> Found:
        """What follows from this one."""
        found = self._known.get(schema)
        if found is None:
            found = self._known[schema] = self._work_out(schema)
        return found


class Columns:
    """Numbers the (metric, site) pairs of a run in the order of their first appearance.

    That order, and not the order within a later row, is what the run file keeps: so a run reads back the same.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.keys: list[Key] = []
        self._place: dict[Key, int] = {}
        self._sites: dict[str, int] = {}
        self._phase = {metric.name: _PHASES[metric.phase] for metric in metrics}
        self._schema = Schema((), np.zeros(0, dtype=np.intp))
        # The current one is always among them: of one set of keys there must never be two.
        self._schemas: dict[tuple[Key, ...], Schema] = {(): self._schema}
        self._frames: WeakKeyDictionary[Frame, Schema] = WeakKeyDictionary()

    def measures(self, metric: str) -> bool:
        """Whether the run has a probe for it, whether or not it was ever read."""
        return metric in self._phase

    def order(self, place: int) -> tuple[int, int, int, int]:
        """A sort key: what comes earlier within one edit can be the cause of what comes later.

        By phase; within one, an edit's first pass before its later ones, activations before logits before gradients
        before the editor's inputs, and weights before the canary; then by site, forwards, but backwards for gradients,
        since that is how they flow.
        """
        metric, site = self.keys[place]
        kind, rank = kind_of(metric), self._sites[site]
        phase = self._phase.get(metric, _DEFAULT_PHASE.get(kind, 2))
        moment = 2 * phase + metric.endswith(_LATER_PASSES)
        return (moment, _KINDS.get(kind, len(_KINDS)), -rank if kind == "gradient" else rank, place)

    def flatten(self, row: EditRow) -> Flat:
        """The row as arrays. A reading without any value counts as not taken."""
        if isinstance(row.readings, PackedReadings):
            flat, starts = row.readings.flat, row.readings.frame.starts
            self._schema = self._of_frame(row.readings.frame)
        else:
            flat, starts = self._joined(row.readings)
        values, finite = np.zeros(0), np.zeros(0, dtype=bool)
        if starts.size:
            values, finite = flat[starts], np.logical_and.reduceat(np.isfinite(flat), starts)
        return Flat(row.edit, row.status == "applied", self._schema, values, finite)

    def flatten_all(self, rows: Sequence[EditRow]) -> list[Flat]:
        """The same of each row in turn. The values of rows that share a frame lie in one array."""
        alike: dict[tuple[Frame, Schema], list[int]] = {}
        found: dict[int, Flat] = {}
        for number, row in enumerate(rows):
            if isinstance(row.readings, PackedReadings) and row.readings.frame.starts.size:
                frame = row.readings.frame
                self._schema = self._of_frame(frame)
                alike.setdefault((frame, self._schema), []).append(number)
            else:
                found[number] = self.flatten(row)
        for (frame, schema), numbers in alike.items():
            flats = np.stack([as_packed(rows[number].readings).flat for number in numbers])
            values = np.ascontiguousarray(flats[:, frame.starts])
            finite = np.logical_and.reduceat(np.isfinite(flats), frame.starts, axis=1)
            for at, number in enumerate(numbers):
                row = rows[number]
                found[number] = Flat(row.edit, row.status == "applied", schema, values[at], finite[at])
        return [found[number] for number in range(len(rows))]

    def _joined(self, row: Mapping[Key, Array]) -> tuple[Array, Places]:
        """(the values of all readings, where each begins)."""
        keys, readings = tuple(row), list(row.values())
        sizes = np.fromiter(map(len, readings), dtype=np.intp, count=len(readings))
        if not sizes.all():
            self._register(keys)
            keys = tuple(key for key, size in zip(keys, sizes, strict=True) if size)
            sizes = sizes[sizes > 0]
        self._schema = self._of_keys(keys)
        return np.concatenate(readings) if readings else np.zeros(0), np.cumsum(sizes) - sizes

    def _of_frame(self, frame: Frame) -> Schema:
        schema = self._frames.get(frame)
        if schema is None:
            schema = self._of_keys(frame.keys)
            self._frames[frame] = schema
        return schema

    def _of_keys(self, keys: tuple[Key, ...]) -> Schema:
        if keys == self._schema.keys:
            return self._schema
        schema = self._schemas.get(keys)
        if schema is None:
            self._forget_before(len(keys))
            self._register(keys)
            schema = Schema(keys, np.array([self._place[key] for key in keys], dtype=np.intp))
            self._schemas[keys] = schema
        return schema

    def _forget_before(self, more: int) -> None:
        """Let go of the oldest sets, and of all that follows from them, where there are too many with one of `more`."""
        size = more + sum(map(len, self._schemas))
        for keys, schema in list(self._schemas.items()):
            count = len(self._schemas)
            if count < SCHEMAS or (count < MOST_SCHEMAS and size <= KEYS):
                return
            if schema is not self._schema:
                size -= len(keys)
                del self._schemas[keys]
                for frame in [frame for frame, known in self._frames.items() if known is schema]:
                    del self._frames[frame]

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

    def forget(self, rule: str, place: int) -> None:
        """It may speak there again."""
        said = self._said.get(rule)
        if said is not None and place < said.size:
            said[place] = False


class First:
    """The first value that was read at each place."""

    def __init__(self) -> None:
        self._values = np.zeros(0)

    def of(self, places: Places, values: Array) -> Array:
        """The first value at each of these places, which is this one where there was none. values: none is NaN."""
        if not places.size:
            return np.zeros(0)
        more = int(places.max()) + 1 - self._values.size
        if more > 0:
            self._values = np.concatenate((self._values, np.full(more, np.nan)))
        known = self._values[places]
        first: Array = np.where(np.isnan(known), values, known)
        self._values[places] = first
        return first

    def at(self, place: int) -> float:
        """The first value at a place that was asked for before."""
        return float(self._values[place])

    def values(self, places: Places) -> Array:
        """The first value at each of these places; NaN where none is known."""
        known = places < self._values.size
        return np.append(self._values, np.nan)[np.where(known, places, self._values.size)]


class Before:
    """What was read in the row before."""

    def __init__(self) -> None:
        self._places: Places = np.zeros(0, dtype=np.intp)
        self._values = np.zeros(0)

    def forget(self) -> None:
        """Nothing was read in the row before."""
        self._places, self._values = self._places[:0], self._values[:0]

    def swap(self, places: Places, values: Array) -> tuple[NDArray[np.bool_], Array]:
        """(whether each of these places was read in the row before, what was: NaN where nothing was).

        From now on these are the row before.
        """
        if places.size == self._places.size and (places == self._places).all():
            was, read = self._values, np.ones(places.size, dtype=bool)
        else:
            was, read = np.full(places.size, np.nan), np.zeros(places.size, dtype=bool)
            _, here, there = np.intersect1d(places, self._places, assume_unique=True, return_indices=True)
            was[here], read[here] = self._values[there], True
        self._places, self._values = places, values
        return read, was
