"""A row's readings as bytes, and back: values in the order of a layout, and a mask of those that were taken."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from stabilitylab.record.packed import Frame, Names, PackedReadings
from stabilitylab.record.readings import Array, Key

Layout = tuple[tuple[str, str, int], ...]
"""(metric, site, length) of each reading, in the order of the row's values."""


def pack(readings: Mapping[Key, Array], layout: Layout) -> tuple[bytes, bytes]:
    """(presence mask, values) of one row as bytes; absent values are stored as 0 under a cleared bit."""
    total = sum(length for _, _, length in layout)
    values, present, offset = np.zeros(total, dtype="<f8"), np.zeros(total, dtype=bool), 0
    for metric, site, length in layout:
        reading = readings.get((metric, site))
        if reading is not None:
            values[offset : offset + reading.size] = reading
            present[offset : offset + reading.size] = True
        offset += length
    return np.packbits(present).tobytes(), values.tobytes()


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


def fits(readings: Mapping[Key, Array], layout: Layout) -> bool:
    """Whether a row of this layout can hold them all."""
    places = {(metric, site): length for metric, site, length in layout}
    return all(places.get(key, 0) >= reading.size for key, reading in readings.items())
