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


class Names:
    """(metric, site) pairs that many frames take theirs from."""

    __slots__ = ("keys", "numbers")

    def __init__(self, keys: tuple[Key, ...]) -> None:
        """Raises ValueError where two are alike."""
        self.keys = keys
        self.numbers = {key: number for number, key in enumerate(keys)}
        if len(self.numbers) != len(keys):
            raise ValueError("a layout names a reading twice; expected each (metric, site) once")


class Frame:
    """Which readings a row holds, and where each stands in its flat array.

    starts: of each reading in the flat array, [readings]. Compared by identity: rows that share a frame hold the same
    readings, and of the same sizes. A file may have a frame for each row: so it takes no more room than a row does.
    """

    __slots__ = ("__weakref__", "_begins", "_names", "_places", "_sizes", "starts")

    def __init__(self, keys: tuple[Key, ...], sizes: NDArray[np.integer]) -> None:
        """keys: in the order of the row. sizes: of each, none of them 0. Raises ValueError where two keys are alike."""
        self._take(Names(keys), sizes)
        # Such frames are few, and their rows are read again and again as they come.
        self._places: Mapping[object, slice | None] | None = {key: self.place(key) for key in keys}

    @classmethod
    def among(cls, names: Names, sizes: NDArray[np.integer]) -> Frame:
        """sizes: of the first readings among `names`, in their order; 0 for one that was not taken, as those after."""
        made = cls.__new__(cls)
        made._take(names, sizes)
        return made

    def _take(self, names: Names, sizes: NDArray[np.integer]) -> None:
        self._places = None
        self._names = names
        self._sizes = sizes.astype(np.int32)
        self._begins = np.cumsum(self._sizes, dtype=np.int32) - self._sizes
        self.starts: NDArray[np.intp] = self._begins[self._sizes > 0].astype(np.intp)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Of each reading, in that order, [readings]; none of them is 0."""
        return self._sizes[self._sizes > 0]

    @property
    def keys(self) -> tuple[Key, ...]:
        """In the order of the row."""
        return tuple(self._names.keys[number] for number in np.flatnonzero(self._sizes).tolist())

    def place(self, key: object) -> slice | None:
        """Where a reading stands; None where it was not taken."""
        if self._places is not None:
            return self._places.get(key)
        number = self._names.numbers.get(key)  # type: ignore[call-overload]
        if number is None or number >= self._sizes.size or not self._sizes[number]:
            return None
        begin = int(self._begins[number])
        return slice(begin, begin + int(self._sizes[number]))


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
        place = self.frame.place(key)
        if place is None:
            raise KeyError(key)
        return self.flat[place]

    def __contains__(self, key: object) -> bool:
        return self.frame.place(key) is not None

    def __iter__(self) -> Iterator[Key]:
        return iter(self.frame.keys)

    def __len__(self) -> int:
        return self.frame.starts.size

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
