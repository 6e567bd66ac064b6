"""A row's readings as bytes, and back: values in the order of a layout, and a mask of those that were taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabilitylab.record.packed import Frame, Names, PackedReadings, as_packed
from stabilitylab.record.readings import Array, Key

Layout = tuple[tuple[str, str, int], ...]
"""(metric, site, length) of each reading, in the order of the row's values."""


@dataclass(frozen=True)
class Placed:
    """Where a layout has the values of rows that share a frame. at: of each value. present: their mask, as bytes.
    size: of the layout.
    """

    at: NDArray[np.intp]
    present: bytes
    size: int

    @classmethod
    def in_layout(cls, frame: Frame, layout: Layout) -> Placed | None:
        """None where the layout can't hold all of them."""
        starts, start = {}, 0
        for metric, site, length in layout:
            starts[metric, site] = start, length
            start += length
        at: list[int] = []
        for key, size in zip(frame.keys, frame.sizes.tolist(), strict=True):
            first, length = starts.get(key, (0, 0))
            if size > length:
                return None
            at.extend(range(first, first + size))
        mask = np.zeros(start, dtype=bool)
        mask[at] = True
        return cls(np.array(at, dtype=np.intp), np.packbits(mask).tobytes(), start)

    def data(self, flat: Array) -> bytes:
        """The values of one row as bytes; absent ones are stored as 0."""
        values = np.zeros(self.size, dtype="<f8")
        values[self.at] = flat
        return values.tobytes()


def pack(readings: Mapping[Key, Array], layout: Layout) -> tuple[bytes, bytes]:
    """(presence mask, values) of one row as bytes. Raises ValueError where the layout can't hold it."""
    packed = as_packed(readings)
    placed = Placed.in_layout(packed.frame, layout)
    if placed is None:
        raise ValueError("a row has readings for which the layout has no place")
    return placed.present, placed.data(packed.flat)


class Unpacker:
    """Reads the rows of one file. Rows with the same readings share what is known of them."""

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        """layouts: by the number that rows refer to them by."""
        self._layouts = dict(layouts)
        self._named: dict[int, tuple[Names, NDArray[np.int64]]] = {}
        self._known: dict[tuple[int, bytes, int], tuple[Frame, NDArray[np.bool_]]] = {}

    @property
    def frames(self) -> tuple[Frame, ...]:
        """Those of the rows so far, in order of their first row."""
        return tuple(frame for frame, _ in self._known.values())

    def learn(self, layouts: Mapping[int, Layout]) -> None:
        """Take in layouts that were added since."""
        self._layouts.update(layouts)

    def knows(self, number: int) -> bool:
        """Whether rows can refer to this layout."""
        return number in self._layouts

    def __call__(self, number: int, present: bytes, data: bytes) -> PackedReadings:
        """The readings of one row; those that were not taken are left out."""
        values, kind = np.frombuffer(data, dtype="<f8"), (number, present, len(data))
        if kind not in self._known:
            if number not in self._named:
                self._named[number] = _named(self._layouts[number])
            self._known[kind] = _frame(present, values.size, *self._named[number])
        frame, mask = self._known[kind]
        return PackedReadings(frame, values[mask].astype(np.float64, copy=False))


def _named(layout: Layout) -> tuple[Names, NDArray[np.int64]]:
    """(its readings, where each ends among the values of a row)."""
    names = Names(tuple((metric, site) for metric, site, _ in layout))
    return names, np.cumsum([length for _, _, length in layout], dtype=np.int64)


def _frame(present: bytes, size: int, names: Names, ends: NDArray[np.int64]) -> tuple[Frame, NDArray[np.bool_]]:
    """(which readings a row holds, which of its `size` values are theirs)."""
    ends = ends[: np.searchsorted(ends, size) + 1]
    mask = np.unpackbits(np.frombuffer(present, dtype=np.uint8), count=size).astype(bool)
    mask[ends[-1] if ends.size else 0 :] = False
    counted = np.concatenate(([0], np.cumsum(mask)))[np.minimum(ends, size)]
    return Frame.among(names, np.diff(counted, prepend=0)), mask


def unpack(present: bytes, data: bytes, layout: Layout) -> PackedReadings:
    """The readings of one row; those that were not taken are left out."""
    return Unpacker({0: layout})(0, present, data)
