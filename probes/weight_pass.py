"""One chunked pass over a weight: norms, distances and extremes together, while each chunk is in the cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.native_scan import Swept, bits_alike, rows_alike, scan_extremes, sweep
from stabilitylab.probes.triton_scan import sweep_on_device

_CHUNK = 98_304  # entries on a CPU: of fp32 with two references and the scratch, 1.5 MiB, which fits a core's L2 cache
_DEVICE_CHUNK = 1 << 22  # on an accelerator: fewer kernels, 16 MiB of scratch
_SAFE = {torch.float32: (1e-24, 1e30), torch.float64: (1e-200, 1e300)}
"""A sum of squares outside this range may have over- or underflowed: it is taken anew, scaled."""


@dataclass(frozen=True, kw_only=True)
class WeightScan:
    """Of one weight W alone. All float64.

    norm: ‖W‖, Frobenius. low, high: its extremes (NaN when W has one). nonfinite: entries that are NaN or infinite.
    largest_finite: of the live dtype.
    """

    norm: float
    low: float
    high: float
    nonfinite: float
    largest_finite: float

    @classmethod
    def from_scan(cls, values: Host, dtype: torch.dtype) -> WeightScan:
        """From the four numbers that `scan_weight` packed."""
        norm, low, high, nonfinite = (float(value) for value in values)
        largest = torch.finfo(dtype).max
        return WeightScan(norm=norm, low=low, high=high, nonfinite=nonfinite, largest_finite=largest)


@dataclass(frozen=True, kw_only=True)
class WeightPass(WeightScan):
    """The same with the references W₀ (before any edit) and W₋ (before this edit).

    reference_norm ‖W₀‖, drift ‖W−W₀‖, update ‖W−W₋‖: Frobenius.
    """

    reference_norm: float
    drift: float
    update: float

    @classmethod
    def from_host(cls, values: Host, dtype: torch.dtype) -> WeightPass:
        """From the seven numbers that `reduce_weight` packed."""
        norm, reference_norm, drift, update, low, high, nonfinite = (float(value) for value in values)
        return cls(
            norm=norm,
            low=low,
            high=high,
            nonfinite=nonfinite,
            largest_finite=torch.finfo(dtype).max,
            reference_norm=reference_norm,
            drift=drift,
            update=update,
        )

    @staticmethod
    def unmoved(packed: Tensor) -> Tensor:
        """What `reduce_weight` packs of a weight that did not move since it packed this."""
        return torch.cat([packed[:3], packed.new_zeros(1), packed[4:]])


@dataclass(frozen=True)
class WeightWrites:
    """writes: how often the weight was written in place within an edit, by torch's version counter; float64."""

    writes: float

    @classmethod
    def from_host(cls, values: Host) -> WeightWrites:
        """From [writes]."""
        return cls(float(values[0]))


def on_cpu(tensor: Tensor) -> bool:
    """Whether reading a value of it back waits for nothing."""
    return tensor.device.type == "cpu"


def number_here(scalar: Tensor) -> float:
    """The value of a scalar on a CPU. Elsewhere it would be a wait: raises RuntimeError."""
    if not on_cpu(scalar):
        raise RuntimeError(
            f"the number is on {scalar.device}; expected it on a CPU, where reading it waits for nothing"
        )
    return float(scalar.item())


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor on a CPU as an array over the same memory, to be read.

    Not by ``Tensor.numpy``: that marks the memory as one that is never resized again, and FSDP lets go of the weights
    that it has gathered by resizing them.
    """
    found: NDArray[Any] = np.from_dlpack(tensor.detach())
    return found


def is_within(value: Tensor, least: float, most: float) -> bool:
    """Whether a scalar on a CPU lies between the two; False for NaN."""
    return least < value.item() < most


def _flat(tensor: Tensor) -> Tensor:
    """`tensor` as one dimension; a view wherever the memory order allows it."""
    return tensor.detach().reshape(-1)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What its statistics are formed in: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _norm(chunk: Tensor) -> float:
    """‖chunk‖ on a CPU, of fp32 or fp64. BLAS takes half the time of torch's reduction."""
    square: float = torch.dot(chunk, chunk).item()
    least, most = _SAFE[chunk.dtype]
    if least < square < most:
        return math.sqrt(square)
    values = as_array(chunk)
    low, high = float(values.min()), float(values.max())
    largest = math.nan if math.isnan(low) else max(-low, high)
    if not math.isfinite(largest) or largest == 0:
        return largest
    scaled: float = torch.linalg.vector_norm(chunk.double() / largest).item()
    return largest * scaled


def _combined(norms: Host) -> float:
    """The norm of the whole from those of its parts."""
    return math.nan if np.isnan(norms).any() else math.hypot(*norms)


def unit(vector: Tensor) -> Tensor:
    """`vector` divided by its norm, in its own dtype; zeros stay zeros."""
    scaled: Tensor = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
    return scaled


def safe_norm(chunk: Tensor) -> Tensor:
    """‖chunk‖ as a float64 scalar that neither overflows nor underflows where the result does not.

    fp32 is faster on a CPU and safe in the middle of its range; on an accelerator the check would be a synchronisation,
    so fp64 is used at once.
    """
    if on_cpu(chunk) and chunk.dtype == torch.float32:
        norm: Tensor = torch.linalg.vector_norm(chunk, dtype=torch.float32)
        least, most = _SAFE[chunk.dtype]
        if least < norm.double().item() ** 2 < most:
            return norm.double()
    wide: Tensor = torch.linalg.vector_norm(chunk, dtype=torch.float64)
    return wide


def extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest, largest) entry as float64 scalars; NaN where the tensor has one.

    On a CPU in one read, or by NumPy, piece by piece in the cache: half the time of ``torch.aminmax``.
    """
    tensor = tensor.detach()
    found = scan_extremes(tensor)
    if found is not None:
        return torch.tensor(found[0], dtype=torch.float64), torch.tensor(found[1], dtype=torch.float64)
    if not on_cpu(tensor) or tensor.dtype not in _SAFE or not tensor.is_contiguous():
        low, high = torch.aminmax(tensor)
        return low.double(), high.double()
    pieces = [as_array(piece) for piece in torch.split(tensor.reshape(-1), _CHUNK)]
    lows, highs = np.array([piece.min() for piece in pieces]), np.array([piece.max() for piece in pieces])
    return torch.tensor(float(lows.min()), dtype=torch.float64), torch.tensor(float(highs.max()), dtype=torch.float64)


def count_nonfinite(chunk: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The number of NaN and infinite entries; on a CPU the entries are only looked at when the extremes show some."""
    if on_cpu(chunk) and math.isfinite(low.item()) and math.isfinite(high.item()):
        return torch.zeros((), dtype=torch.float64)
    return torch.isfinite(chunk).logical_not().sum().double()


@dataclass(frozen=True)
class Scanned:
    """What a pass over one weight found.

    packed: 1-d float64 on the weight's device. update: ‖W−W₋‖ where reading it waits for nothing, else None.
    change: of W−W₋ as a matrix the rows that moved most, or on an accelerator all of them; None if not asked for.
    """

    packed: Tensor
    update: float | None = None
    change: Tensor | None = None


def _rows_at_once(matrix: Tensor) -> int:
    return _rows_of(matrix.shape[1], _CHUNK if on_cpu(matrix) else _DEVICE_CHUNK)


def _rows_of(columns: int, chunk: int) -> int:
    return max(1, chunk // columns)


def rows_of_a_chunk(columns: int) -> int:
    """Rows of a weight on a CPU that stay in a core's cache, with two references."""
    return _rows_of(columns, _CHUNK)


def as_matrix(tensor: Tensor) -> Tensor:
    """`tensor` [rows, …] as a matrix [rows, columns]; anything below two dimensions is one row."""
    tensor = tensor.detach()
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _pieces(matrix: Tensor, rows: int) -> Iterator[Tensor]:
    """`matrix` in pieces of so many rows, each as one dimension: views, where the memory order allows it."""
    if matrix.is_contiguous():
        yield from torch.split(matrix.view(-1), rows * matrix.shape[1])
    else:
        yield from (piece.reshape(-1) for piece in torch.split(matrix, rows))


def _scan_on_cpu(
    weight: Tensor, references: tuple[Tensor, Tensor] | None, want_change: bool = False
) -> tuple[list[float], Tensor | None]:
    """([‖W‖, ‖W−W₀‖ and ‖W−W₋‖ if there are any, low, high, non-finite], the rows of W−W₋ that moved most, if asked).

    weight: [rows, …]. The second reference takes W's values.
    """
    # Nothing is made of the tensors before native code has them: with cold caches, each view costs what a tenth of a
    # small weight does.
    columns = math.prod(weight.shape[1:]) if weight.dim() > 1 else max(weight.numel(), 1)
    swept = sweep(weight, references, rows_of_a_chunk(columns) * columns, keeps_moved=want_change)
    if swept is None:
        values, hottest = _scan_in_numpy(as_matrix(weight), references)
        return values, hottest.reshape(-1, columns) if want_change else None
    change = None if swept.moved is None else swept.moved.reshape(-1, columns)
    return told(swept, lambda: _pieces(as_matrix(weight), _rows_at_once(as_matrix(weight)))), change


def told(swept: Swept, pieces: Callable[[], Iterable[Tensor]]) -> list[float]:
    """[‖W‖, other norms, low, high, non-finite] of a native sweep. pieces: gives W, to be looked at where an extreme
    is not finite.
    """
    lost = math.isnan(swept.low) or math.isnan(swept.high)
    low, high = (math.nan, math.nan) if lost else (swept.low, swept.high)
    bad = 0 if math.isfinite(low) and math.isfinite(high) else sum(_nonfinite_in(piece) for piece in pieces())
    return [*map(math.sqrt, swept.squares), low, high, float(bad)]


def _nonfinite_in(piece: Tensor) -> int:
    return int(torch.isfinite(piece).logical_not().sum().item())


@torch.no_grad()
def _scan_in_numpy(weight: Tensor, references: tuple[Tensor, Tensor] | None) -> tuple[list[float], Tensor]:
    """The same, piece by piece while each is in the cache."""
    references = None if references is None else (as_matrix(references[0]), as_matrix(references[1]))
    rows, dtype = _rows_at_once(weight), wide_dtype(weight)
    scratch = torch.empty(rows * weight.shape[1], dtype=dtype)
    wide = None if weight.dtype == dtype else torch.empty_like(scratch)
    # One array for all pieces, where that can be: to make one takes a tenth of the time that a piece takes.
    held = as_array(weight.view(-1)) if wide is None and weight.is_contiguous() else None
    held = held if wide is None else as_array(wide)
    start, hottest, most = 0, scratch[:0], -1.0
    parts = []
    for own, *others in zip(*(_pieces(matrix, rows) for matrix in (weight, *(references or ()))), strict=True):
        live = own if wide is None else wide[: own.numel()].copy_(own)
        values = as_array(live) if held is None else held[start : start + own.numel()]
        start, moved = start + own.numel() if wide is None else 0, scratch[: own.numel()]
        low, high = float(values.min()), float(values.max())
        nonfinite = 0.0 if math.isfinite(low) and math.isfinite(high) else float(np.sum(~np.isfinite(values)))
        norms = [_norm(live), *(_norm(torch.sub(live, past, out=moved)) for past in others)]
        if others:
            if not norms[-1] <= most:
                hottest, most = moved.clone(), norms[-1]
            others[-1].copy_(own)
        parts.append([*norms, low, high, nonfinite])
    table = np.array(parts)
    lows, highs, counts = table[:, -3:].T
    whole = [_combined(part) for part in table[:, :-3].T]
    return [*whole, float(lows.min()), float(highs.max()), float(counts.sum())], hottest


def _scan_on_device(weight: Tensor, references: tuple[Tensor, ...]) -> Tensor:
    """The same numbers as a float64 tensor, without waiting for the device. The second reference takes W's values."""
    swept = sweep_on_device(weight, references)
    return _scan_by_operators(weight, references) if swept is None else swept


def _scan_by_operators(weight: Tensor, references: tuple[Tensor, ...]) -> Tensor:
    rows, parts = _rows_at_once(weight), []
    for start in range(0, weight.shape[0], rows):
        live = weight[start : start + rows].to(wide_dtype(weight))
        low, high = torch.aminmax(live)
        norms = [safe_norm(live)]
        norms += [safe_norm(live - past[start : start + rows].to(live.dtype)) for past in references]
        parts.append(torch.stack([*norms, low.double(), high.double(), count_nonfinite(live, low, high)]))
    table = torch.stack(parts)
    if references:
        references[-1].copy_(weight)
    return torch.cat(
        [
            torch.linalg.vector_norm(table[:, :-3], dim=0),
            torch.stack([table[:, -3].amin(), table[:, -2].amax(), table[:, -1].sum()]),
        ]
    )


def reduce_weight(
    weight: Tensor, reference: Tensor, previous: Tensor, reference_norm: Tensor, want_change: bool = False
) -> Scanned:
    """The numbers of `WeightPass` as one float64 tensor of shape [7] on the weight's device; `previous` becomes W.

    weight, reference, previous: same shape, any floating dtype; the references contiguous. Differences are formed in
    fp32 (fp64 for fp64 weights), norms accumulated so that they overflow only where ‖·‖ exceeds fp64.
    """
    if not on_cpu(weight):
        live, first, before = as_matrix(weight), as_matrix(reference), as_matrix(previous)
        return _reduce_on_device(live, first, before, reference_norm, want_change)
    values, change = _scan_on_cpu(weight, (reference, previous), want_change)
    packed = torch.tensor([values[0], reference_norm.item(), *values[1:]], dtype=torch.float64)
    return Scanned(packed, values[2], change)


@torch.no_grad()
def _reduce_on_device(live: Tensor, first: Tensor, before: Tensor, norm: Tensor, want_change: bool) -> Scanned:
    change = live.to(wide_dtype(live)) - before.to(wide_dtype(live)) if want_change else None
    found = _scan_on_device(live, (first, before))
    return Scanned(torch.cat([found[:1], norm.reshape(1), found[1:]]), None, change)


def scan_weight(weight: Tensor) -> Tensor:
    """The numbers of `WeightScan` as one float64 tensor of shape [4] on the weight's device. Keeps no copy of it."""
    if on_cpu(weight):
        return torch.tensor(_scan_on_cpu(weight, None)[0], dtype=torch.float64)
    with torch.no_grad():
        return _scan_on_device(as_matrix(weight), ())


@torch.no_grad()
def pass_at_rest(weight: Tensor) -> Tensor:
    """What `reduce_weight` packs of a weight that is as its references are, from one read; an empty one has norm 0."""
    if weight.numel() == 0:
        return torch.zeros(7, dtype=torch.float64, device=weight.device)
    norm, low, high, nonfinite = scan_weight(weight)
    distance = torch.where(nonfinite == 0, 0.0, torch.nan).to(norm)  # no distance to what is not finite is 0
    return torch.stack([norm, norm, distance, distance, low, high, nonfinite])


@torch.no_grad()
def norm_of(weight: Tensor) -> Tensor:
    """‖W‖ as a float64 scalar on the weight's device."""
    return scan_weight(weight)[0]


@torch.no_grad()
def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals the same NaN.

    Synchronises an accelerator. On a CPU 64-bit words of memory are compared natively, else by NumPy: three times
    faster than torch.equal.
    """
    alike = bits_alike(left, right)
    if alike is not None:
        return alike
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    a, b = _flat(left).contiguous().view(ints), _flat(right).contiguous().view(ints)
    if not on_cpu(a):
        return bool(torch.equal(a, b))
    # A parameter may begin anywhere in a buffer that it shares with others.
    if not any(count * a.element_size() % 8 for count in (a.numel(), a.storage_offset(), b.storage_offset())):
        a, b = a.view(torch.int64), b.view(torch.int64)
    return bool((as_array(a) == as_array(b)).all())


_SAMPLE = 16  # entries: a cache line of fp32


@functools.lru_cache(maxsize=64)
def _sample_starts(rows: int, columns: int) -> NDArray[np.int64]:
    """Where the sample of each row begins: 16 entries further right from row to row, and from the left again."""
    row = np.arange(rows)
    places = -(-columns // _SAMPLE)
    return row * columns + np.minimum(row % places * _SAMPLE, columns - _SAMPLE)


def same_sample(left: Tensor, right: Tensor) -> bool:
    """Whether two contiguous tensors on a CPU agree in 16 entries of each row, further right from row to row.

    Together they touch each row, and each column of a matrix with a sixteenth as many rows or more.
    """
    rows = left.shape[0] if left.dim() > 1 else 1
    columns = left.numel() // max(rows, 1)
    if columns < _SAMPLE:
        return same_bits(left, right)
    alike = rows_alike(left, right, _SAMPLE)
    if alike is not None:
        return alike
    a, b = as_matrix(left), as_matrix(right)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    starts = _sample_starts(rows, columns)
    samples = (as_array(m.reshape(-1).view(ints).unfold(0, _SAMPLE, 1))[starts] for m in (a, b))
    return bool(np.equal(*samples).all())
