"""What the entries of one tensor are like, in one pass over pieces that fit into the processor's cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.weight_pass import as_array
from stabilitylab.record.scanned import LISTED, Some

PIECE: Final = 1 << 17
"""Entries that are looked at together: half a megabyte in float32."""
PIECE_ELSEWHERE: Final = 1 << 24
"""The same on an accelerator, where each piece is waited for."""
LOUD: Final = 10.0
"""Times the median row's RMS from which a row is named. On real models a few rows that feed massive activations are
past it (Sun et al., arXiv 2402.17762, find those in single units), and no others."""
_SQUARED: Final = (1e-15, 1e15)
"""Magnitudes between which squares of float32 and their sums are safe."""
_WITHOUT_SIGN: Final = 0x7FFF
_FIRST_NORMAL: Final = 0x0400
"""The smallest normal value of float16, as bits."""
_MATRIX: Final = 2  # dimensions


@dataclass(frozen=True)
class Entries:
    """The figures of `record.scanned.TensorScan` that come of looking at each entry."""

    norm: float
    least: float | None
    greatest: float | None
    nonfinite: int
    masking: int
    zeros: int
    subnormal: int
    first_bad: tuple[int, ...] | None
    zero_rows: Some
    zero_columns: Some
    loud_rows: Some
    loud_columns: Some
    worst_output: float | None


class _Sums:
    """What is gathered piece by piece. Sums of squares are kept in units of a scale that can be squared."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rows = torch.zeros(rows, dtype=torch.float64)
        self._row_scales = torch.ones(rows, dtype=torch.float64)
        self._columns = torch.zeros(columns, dtype=torch.float64)
        self._scale = 0.0
        self.least, self.greatest = math.inf, -math.inf
        self.nonfinite = self.masking = self.zeros = self.subnormal = 0
        self.first_bad: int | None = None

    def add(self, start: int, piece: Tensor) -> None:
        """piece: [rows, columns], from row `start` on."""
        work = piece if piece.dtype in (torch.float32, torch.float64) else piece.float()
        zeros, subnormal = _count_small(piece, work)
        self.zeros += zeros
        self.subnormal += subnormal
        least, greatest = (end.item() for end in work.aminmax())
        if not (math.isfinite(least) and math.isfinite(greatest)):
            work = self._without_bad(start, work)
            least, greatest = self._ends(work)
        if least <= greatest:
            self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
            self._add_squares(start, work, max(abs(least), abs(greatest)))

    def _without_bad(self, start: int, work: Tensor) -> Tensor:
        """The same with 0 in place of what is not finite, which is counted."""
        bad = ~work.isfinite()
        count = int(bad.sum())
        self.nonfinite += count
        self.masking += int(torch.isneginf(work).sum())
        if self.first_bad is None:
            self.first_bad = start * work.shape[1] + int(bad.flatten().to(torch.uint8).argmax())
        self._bad = bad
        return work.masked_fill(bad, 0.0)

    def _ends(self, work: Tensor) -> tuple[float, float]:
        """Of the finite entries."""
        good = work[~self._bad]
        return (good.min().item(), good.max().item()) if good.numel() else (math.inf, -math.inf)

    def _add_squares(self, start: int, work: Tensor, largest: float) -> None:
        if largest == 0.0:
            return
        scale = 1.0
        if not _SQUARED[0] < largest < _SQUARED[1]:
            scale, work = largest, work.double() / largest
        squares = work.square()  # sums of it take a tenth of what norms along the first dimension take
        here = slice(start, start + work.shape[0])
        self._rows[here] = squares.sum(dim=1)
        self._row_scales[here] = scale
        if scale > self._scale:
            self._columns *= (self._scale / scale) ** 2
            self._scale = scale
        columns = squares.sum(dim=0).cpu()
        self._columns += columns if scale == self._scale else columns.double() * (scale / self._scale) ** 2

    @property
    def rows(self) -> Tensor:
        """The norm of each row, float64."""
        return self._rows.sqrt() * self._row_scales

    @property
    def columns(self) -> Tensor:
        """The norm of each column, float64."""
        return self._columns.sqrt() * self._scale


def entries_of(tensor: Tensor, *, inputs_first: bool = False) -> Entries:
    """Look at all of a tensor. inputs_first: whether its rows are the layer's inputs.

    Matrices have rows and columns; of tensors of more dimensions the first counts as rows. Figures are formed in
    float32 of numbers that float32 can square, else in float64; non-finite entries are counted and left out.
    """
    matrix = tensor.reshape(tensor.shape[0], -1) if tensor.dim() >= _MATRIX else tensor.reshape(1, -1)
    sums = _Sums(matrix.shape[0], matrix.shape[1])
    for start, piece in _pieces(matrix):
        sums.add(start, piece)
    is_matrix = tensor.dim() == _MATRIX and min(tensor.shape) > 1
    rows = sums.rows
    outputs, inputs = (sums.columns, rows) if inputs_first else (rows, sums.columns)
    ends = (sums.least, sums.greatest) if sums.least <= sums.greatest else (None, None)
    peak = float(rows.max()) if rows.numel() else 0.0
    bad = None if sums.first_bad is None else _index(sums.first_bad, tensor)
    return Entries(
        norm=float(torch.linalg.vector_norm(rows / peak)) * peak if peak > 0 else 0.0,
        least=ends[0],
        greatest=ends[1],
        nonfinite=sums.nonfinite,
        masking=sums.masking,
        zeros=sums.zeros,
        subnormal=sums.subnormal,
        first_bad=bad,
        zero_rows=_zero(outputs) if is_matrix and not sums.nonfinite else Some(),
        zero_columns=_zero(inputs) if is_matrix and not sums.nonfinite else Some(),
        loud_rows=_loud(outputs) if is_matrix else Some(),
        loud_columns=_loud(inputs) if is_matrix else Some(),
        worst_output=float(outputs.max()) * math.sqrt(inputs.numel()) if is_matrix else None,
    )


def _count_small(piece: Tensor, work: Tensor) -> tuple[int, int]:
    """(zeros, subnormal entries): the latter of float16 only, where entries of ordinary weights' size are. Non-finite
    entries are neither.
    """
    if piece.dtype == torch.float16:
        sizes = piece.view(torch.int16) & _WITHOUT_SIGN
        # NumPy counts ten times as fast.
        bits = sizes.numpy() if sizes.is_cpu else sizes.cpu().numpy()
        zeros = int(np.count_nonzero(bits == 0))
        return zeros, int(np.count_nonzero(bits < _FIRST_NORMAL)) - zeros
    return int(np.count_nonzero(as_array(work) == 0)) if work.is_cpu else int((work == 0).sum()), 0


def _pieces(matrix: Tensor) -> list[tuple[int, Tensor]]:
    step = max(1, (PIECE if matrix.is_cpu else PIECE_ELSEWHERE) // max(1, matrix.shape[1]))
    return [(start, matrix[start : start + step]) for start in range(0, matrix.shape[0], step)]


def _index(place: int, tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(each) for each in torch.unravel_index(torch.tensor(place), tensor.shape))


def _zero(norms: Tensor) -> Some:
    found = (norms == 0).nonzero().flatten()
    return Some(found.numel(), tuple(found[:LISTED].tolist()), (0.0,) * min(LISTED, found.numel()))


def _loud(norms: Tensor) -> Some:
    """Those whose RMS is many times that of the median one; of those that are not 0."""
    median = norms[norms > 0].median() if bool((norms > 0).any()) else None
    if median is None:
        return Some()
    times = norms / median
    count = int((times >= LOUD).sum())
    values, places = times.topk(min(LISTED, count))
    return Some(count, tuple(places.tolist()), tuple(values.tolist()))
