"""The pass over a weight that lies nowhere as a whole: each piece of it is made, and read while it is in the cache.

Where all that is made is one product of few columns, native code does both in one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.native_scan import LowRankSum, Swept, sweep_sum
from stabilitylab.probes.weight_pass import (
    Scanned,
    number_here,
    reduce_weight,
    rows_of_a_chunk,
    same_bits,
    scan_weight,
    told,
)

_TILE: Final = 16
_PIECE: Final = 196_608


def rows_of_a_piece(columns: int) -> int:
    """So many that a piece of fp32 stays in a core's L2 cache, and few calls make all of it.

    A multiple of 16: products of matrices round alike whether they are made by such pieces or as a whole.
    """
    return max(_TILE, _PIECE // max(columns, 1) // _TILE * _TILE)


@dataclass(frozen=True, eq=False)
class InPieces:
    """A matrix on a CPU. make: gives its rows in order, some at a time; each piece is only valid until the next.

    sum: what it is the sum of, where that is all.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    make: Callable[[], Iterator[Tensor]]
    sum: LowRankSum | None = None

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Each piece with the rows that it is."""
        start = 0
        for piece in self.make():
            yield slice(start, start + piece.shape[0]), piece
            start += piece.shape[0]

    def whole(self) -> Tensor:
        """A tensor that holds all of it."""
        made = torch.empty(self.shape, dtype=self.dtype)
        for rows, piece in self.rows():
            made[rows] = piece
        return made

    def is_same(self, other: Tensor) -> bool:
        """Whether a matrix of its shape and dtype holds the same bits."""
        return all(same_bits(piece, other[rows]) for rows, piece in self.rows())


def scan_pieces(weight: InPieces) -> Tensor:
    """What `scan_weight` packs."""
    swept = _swept(weight, None)
    if swept is not None:
        return torch.tensor(told(swept, weight.make), dtype=torch.float64)
    return torch.from_numpy(_together([scan_weight(piece).numpy() for piece in weight.make()]))


def reduce_pieces(
    weight: InPieces, reference: Tensor, previous: Tensor, reference_norm: Tensor, want_change: bool = False
) -> Scanned:
    """What `reduce_weight` gives; `previous` becomes W."""
    swept = _swept(weight, (reference, previous), want_change)
    if swept is not None:
        values = told(swept, weight.make)
        packed = torch.tensor([values[0], number_here(reference_norm), *values[1:]], dtype=torch.float64)
        change = None if swept.moved is None else swept.moved.reshape(-1, weight.shape[1])
        return Scanned(packed, values[2], change)
    return _reduce_by_pieces(weight, reference, previous, reference_norm, want_change)


def _swept(weight: InPieces, references: tuple[Tensor, Tensor] | None, want_change: bool = False) -> Swept | None:
    """One sweep that makes the weight as it reads it, where native code can."""
    if weight.sum is None:
        return None
    return sweep_sum(weight.sum, references, rows_of_a_chunk(weight.shape[1]), keeps_moved=want_change)


def _reduce_by_pieces(
    weight: InPieces, reference: Tensor, previous: Tensor, reference_norm: Tensor, want_change: bool
) -> Scanned:
    parts, change, most = [], None, -1.0
    for rows, piece in weight.rows():
        seen = reduce_weight(piece, reference[rows], previous[rows], reference_norm, want_change)
        update = float(seen.packed[3])
        if not update <= most:
            change, most = seen.change, update
        parts.append(seen.packed.numpy())
    together = _together(parts)
    together[1] = number_here(reference_norm)
    return Scanned(torch.from_numpy(together), float(together[3]), change)


def _together(parts: list[Host]) -> Host:
    """Of the pieces' norms, extremes and counts those of the whole."""
    table = np.array(parts)
    norms = [math.nan if np.isnan(norms).any() else math.hypot(*norms) for norms in table[:, :-3].T]
    return np.array([*norms, table[:, -3].min(), table[:, -2].max(), table[:, -1].sum()])
