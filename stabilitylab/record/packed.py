"""A row of readings as it lies in the run file: one flat array, with what many rows have in common kept once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from stabilitylab.record.readings import Array, Key

Found = TypeVar("Found")
KEPT: Final = 64
"""Frames that are kept of rows that are read now: probes that read every so many edits make several alternate."""


class Frame:
    """Which readings a row holds, and where each stands in its flat array.

    keys: in the order of the row. starts, sizes: of each reading in the flat array, [readings]; no size is 0. Compared
    by identity: rows that share a frame hold the same readings, and of the same sizes.
    """

    __slots__ = ("__weakref__", "keys", "places", "sizes", "starts")

    def __init__(self, keys: tuple[Key, ...], sizes: NDArray[np.intp]) -> None:
        """Raises ValueError where two keys are alike."""
        self.keys = keys
        self.sizes = sizes
        self.starts: NDArray[np.intp] = np.cumsum(sizes) - sizes
        ends = self.starts + sizes
        self.places = {key: slice(*ends) for key, *ends in zip(keys, self.starts.tolist(), ends.tolist(), strict=True)}
        """Where each reading stands."""
        if len(self.places) != len(keys):
            raise ValueError("a layout names a reading twice; expected each (metric, site) once")


class PerFrame(Generic[Found]):
    """What follows from a frame alone, worked out once for each that is still in use."""

    def __init__(self, work_out: Callable[[Frame], Found]) -> None:
        self._work_out = work_out
        self._known: WeakKeyDictionary[Frame, Found] = WeakKeyDictionary()

    def of(self, frame: Frame) -> Found:
        """What follows from this one."""
        found = self._known.get(frame)
        if found is None:
            found = self._known[frame] = self._work_out(frame)
        return found


class PackedReadings(Mapping[Key, Array]):
    """Readings by (metric, site), read-only: float64 arrays that are views of one flat array."""

    __slots__ = ("flat", "frame")

    def __init__(self, frame: Frame, flat: Array) -> None:
        """flat: the values of all readings, in the order of the frame; it becomes read-only."""
        flat.flags.writeable = False
        self.frame = frame
        self.flat = flat

    def __getitem__(self, key: Key) -> Array:
        return self.flat[self.frame.places[key]]

    def __contains__(self, key: object) -> bool:
        return key in self.frame.places

    def __iter__(self) -> Iterator[Key]:
        return iter(self.frame.keys)

    def __len__(self) -> int:
        return len(self.frame.keys)

    def __eq__(self, other: object) -> bool:
        """Like a dict's: the order does not count, and NaN is equal to nothing, unless a row is compared to itself."""
        if self is other:
            return True
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(np.array_equal(values, other[key]) for key, values in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(dict(self))


class Frames:
    """Packs rows as they are read. Those with the same readings, of the same sizes, share a frame while it is kept."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[Key, ...], tuple[int, ...]], Frame] = {}

    def packed(self, readings: Mapping[Key, float | Array]) -> PackedReadings:
        """One row, in the order of the mapping. No array in it is empty."""
        flat: list[float] = []
        sizes: list[int] = []
        for value in readings.values():
            if isinstance(value, float):
                flat.append(value)
                sizes.append(1)
            else:
                flat.extend(value.tolist())
                sizes.append(value.size)
        kind = tuple(readings), tuple(sizes)
        frame = self._known.get(kind)
        if frame is None:
            if len(self._known) >= KEPT:
                del self._known[next(iter(self._known))]
            frame = self._known[kind] = Frame(kind[0], np.array(sizes, dtype=np.intp))
        return PackedReadings(frame, np.array(flat, dtype=np.float64))


@dataclass(frozen=True)
class Alike:
    """Rows that share a frame. numbers: where among all rows. flats: the values of each."""

    frame: Frame
    numbers: list[int] = field(default_factory=list)
    flats: list[Array] = field(default_factory=list)


def by_frame(rows: Sequence[Mapping[Key, Array]]) -> tuple[Alike, ...]:
    """All rows, those that share a frame together: a series is then read without asking each row for it."""
    found: dict[Frame, Alike] = {}
    for number, row in enumerate(rows):
        packed = as_packed(row)
        alike = found.get(packed.frame)
        if alike is None:
            alike = found[packed.frame] = Alike(packed.frame)
        alike.numbers.append(number)
        alike.flats.append(packed.flat)
    return tuple(found.values())


def as_packed(row: Mapping[Key, Array]) -> PackedReadings:
    """The same readings, packed; those without any value are left out."""
    if isinstance(row, PackedReadings):
        return row
    taken = {key: values for key, values in row.items() if values.size}
    sizes = np.array([values.size for values in taken.values()], dtype=np.intp)
    return PackedReadings(Frame(tuple(taken), sizes), np.concatenate([np.zeros(0), *taken.values()]))
