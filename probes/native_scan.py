"""Reductions as native code, `native/`, where it was built and is this source's: the sweep over a weight, and of small
tensors in one call what would be many.

Each returns None where what it is given is not for native code. Whoever calls has another way.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ASKED: Final = "STABILITYLAB_WEIGHT_PASS"
"""Environment variable: ``numpy`` as this is imported for the sweep in NumPy although there is native code."""
_NATIVE: Final = Path(__file__).parent / "native"
_DTYPES: Final = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_MOST_COLUMNS: Final = 64
"""Of a product that native code makes: of more columns BLAS makes it sooner."""
_SAFE_SQUARES: Final = (1e-280, 1e280)
"""Sums of squares of float64 outside of this range may have over- or underflowed. Those of floats can't, in double."""


class Swept(NamedTuple):
    """squares: of ‖W‖, and with references of ‖W−W₀‖ and ‖W−W₋‖. low, high: NaN or infinite where W has such an entry.
    moved: W−W₋ of the chunk that moved most, 1-d, if asked for.
    """

    squares: tuple[float, ...]
    low: float
    high: float
    moved: Tensor | None


def _load() -> ModuleType | None:
    if os.environ.get(ASKED) == "numpy":
        return None
    try:
        built = importlib.import_module("stabilitylab.probes._weight_scan")
    except ImportError:
        return None
    return built if _hash_of_sources() == built.SOURCE else None


def _hash_of_sources() -> str:
    """As `setup.py` forms it."""
    sources = sorted(_NATIVE.glob("*.[ch]"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()


_BUILT: Final = _load()


def weight_pass() -> Literal["native", "numpy"]:
    """Which sweep is used on a CPU; see `triton_scan` for a CUDA device."""
    return "numpy" if _BUILT is None else "native"


def sweep(
    weight: Tensor, references: tuple[Tensor, Tensor] | None, chunk: int, *, keeps_moved: bool = False
) -> Swept | None:
    """One sweep; the second reference, W₋, takes W's values. Where it returns None, nothing was done yet.

    weight, references: contiguous, on a CPU, of one shape and dtype, which is one of the four floating dtypes.
    """
    held = (weight, *(references or ()))
    built = _for(weight)
    if built is None or not all(_fits(each, weight.dtype) for each in held):
        return None
    code = _DTYPES[weight.dtype]
    wide = weight.dtype == torch.float64
    moved = weight.new_empty(2, chunk, dtype=torch.float64 if wide else torch.float32) if keeps_moved else None
    first, before = (0, 0) if references is None else (each.data_ptr() for each in references)
    place = 0 if moved is None else moved.data_ptr()
    count, address = weight.numel(), weight.data_ptr()
    if wide and not _is_safe(built.sweep(address, first, before, 0, count, chunk, code, False)[: len(held)]):
        return None
    *squares, low, high, at, half = built.sweep(address, first, before, place, count, chunk, code, True)
    hottest = None if moved is None else moved[half, : min(chunk, count - at)]
    return Swept(tuple(squares[: len(held)]), low, high, hottest)


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """W = base + scale · left @ right in fp32, rounded as torch rounds it: the product, then its scaling, then the sum.

    base: [rows, columns] in fp32, fp16 or bf16. left: [rows, rank], right: [rank, columns], both in fp32. All of them
    contiguous, on a CPU.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    scale: float


def sweep_sum(
    made: LowRankSum, references: tuple[Tensor, Tensor] | None, rows: int, *, keeps_moved: bool = False
) -> Swept | None:
    """What `sweep` does, with a weight that is made as it is read; a chunk has so many rows. References are in fp32."""
    (height, columns), rank = made.base.shape, made.left.shape[1]
    held = (made.left, made.right, *(references or ()))
    built = _for(made.base)
    if built is None or made.base.dtype == torch.float64 or not all(_fits(each, torch.float32) for each in held):
        return None
    highest = torch.get_float32_matmul_precision() == "highest"
    if not rank or not highest or not makes_as_torch(height, columns, rank):
        return None
    chunk = min(rows, height) * columns
    strips = made.left.new_empty(rank * columns)
    moved = made.left.new_empty(2, chunk) if keeps_moved else None
    first, before = (0, 0) if references is None else (each.data_ptr() for each in references)
    *squares, low, high, at, half = built.sweep_made(
        *(each.data_ptr() for each in (made.base, made.left, made.right, strips)),
        *(made.scale, columns, rank, _DTYPES[made.base.dtype]),
        *(first, before, 0 if moved is None else moved.data_ptr(), made.base.numel(), chunk),
    )
    hottest = None if moved is None else moved[half, : min(chunk, made.base.numel() - at)]
    return Swept(tuple(squares[: 1 if references is None else 3]), low, high, hottest)


_ENTRIES: Final = 1_024
"""Of a product, at least, that agree with torch's to the bit before it is taken for the same."""


@functools.lru_cache(maxsize=64)
def makes_as_torch(rows: int, columns: int, rank: int) -> bool:
    """Whether the native code makes of such factors, and of those transposed, the bits that torch does here.

    It adds up each entry of a product in order, as libraries do where there are few columns. Where one does not, a
    merge of the adapters would look like an edit.
    """
    if _BUILT is None or not _BUILT.MULTIPLIES_AND_ADDS or rank > _MOST_COLUMNS:
        return False
    generator = torch.Generator("cpu").manual_seed(rank)
    empty = torch.empty(0, dtype=torch.float32, device="cpu")  # whatever the user has made the usual ones
    base, made, strips = (empty.new_zeros(height, columns) for height in (rows, rows, rank))
    # Of few entries the bits may agree by chance: those of other factors are asked for, too.
    for _ in range(-(-_ENTRIES // (rows * columns))):
        left, right = (empty.new_empty(shape).normal_(generator=generator) for shape in ((rows, rank), (rank, columns)))
        places = [each.data_ptr() for each in (base, left, right, strips, base, made)]
        own = (_DTYPES[torch.float32], *places[4:], 0, *[rows * columns] * 2)
        _BUILT.sweep_made(*places[:4], 1.0, columns, rank, *own)
        transposed = (right.T.contiguous() @ left.T.contiguous()).T
        if not (torch.equal(made, left @ right) and torch.equal(made, transposed)):
            return False
    return True


def bare_sweep(weight: Tensor, references: tuple[Tensor, Tensor]) -> Callable[[], object] | None:
    """The loop alone over a weight and its references, with nothing around it: what benchmarks compare with."""
    built = _for(weight)
    if built is None or not all(_fits(each, weight.dtype) for each in references):
        return None
    held, count = (weight, *references), weight.numel()

    def loop() -> object:
        addresses = (each.data_ptr() for each in held)
        return built.sweep(*addresses, 0, count, count, _DTYPES[weight.dtype], True)

    return loop


class Rows(NamedTuple):
    """square: the sum of squares. low, high: NaN both where there is one, and infinite where there is."""

    square: float
    low: float
    high: float


def scan_whole(tensor: Tensor) -> Rows | None:
    """Of all of a contiguous tensor on a CPU, in few calls: of each pass through a layer several are looked at."""
    built = _for(tensor)
    if built is None:
        return None
    count = tensor.numel()
    square, _, _, low, high, _, _ = built.sweep(tensor.data_ptr(), 0, 0, 0, count, count, _DTYPES[tensor.dtype], False)
    if tensor.dtype is torch.float64 and not _is_safe((square,)):
        return None
    return Rows(square, math.nan, math.nan) if math.isnan(low) or math.isnan(high) else Rows(square, low, high)


def scan_extremes(tensor: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest entry of a contiguous tensor on a CPU; both NaN where it has one."""
    seen = scan_whole(tensor)
    return None if seen is None else (seen.low, seen.high)


def scan_rows(tensor: Tensor) -> tuple[Rows, Rows] | None:
    """Of a contiguous tensor [..., rows, columns] on a CPU: all of it, and that without the first row of each matrix.

    The latter is infinite and of no meaning where there is but one row.
    """
    built = _for(tensor)
    if built is None or tensor.dim() < 2:
        return None
    period, columns = tensor.shape[-2:]
    found = built.rows(tensor.data_ptr(), tensor.numel() // columns, columns, period, _DTYPES[tensor.dtype])
    whole, beyond = Rows(*found[:3]), Rows(*found[3:])
    if tensor.dtype == torch.float64 and not _is_safe((whole.square, beyond.square if period > 1 else 1.0)):
        return None
    return _lost_alike(whole), _lost_alike(beyond)


def _lost_alike(rows: Rows) -> Rows:
    lost = math.isnan(rows.low) or math.isnan(rows.high)
    return Rows(rows.square, math.nan, math.nan) if lost else rows


def table_of(tensors: Sequence[tuple[Tensor, int]]) -> NDArray[np.int64] | None:
    """What `count_nonfinite_in` is to look at, int64 [tensors, 5]: of each address, count, step, kind, and a place for
    what is found. It holds as long as the tensors lie where they do.

    tensors: contiguous, on a CPU, each with its step: 1 for all entries, n for each n-th.
    """
    if not all(_for(tensor) for tensor, _ in tensors) or _BUILT is None:
        return None
    rows = [(tensor.data_ptr(), tensor.numel(), step, _DTYPES[tensor.dtype], 0) for tensor, step in tensors]
    return np.array(rows, dtype=np.int64)


ADDRESS: Final = 0
STEP: Final = 2
"""The columns of a table that have the addresses and the steps."""


def count_nonfinite_in(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many entries are NaN or infinite, of each tensor of a table as many as its step leaves."""
    assert _BUILT is not None  # it made the table
    _BUILT.nonfinite(table.ctypes.data, len(table))
    return table[:, 4]


class FactorSeen(NamedTuple):
    """norm: ‖F‖. silent_share: of columns that are all 0. lives: bool [rows], where any entry is not 0."""

    norm: float
    silent_share: float
    lives: Tensor


def scan_factor(factor: Tensor) -> FactorSeen | None:
    """One look at a factor [rows, columns] in fp32 or fp64, contiguous and on a CPU. A NaN is not 0."""
    built = _for(factor)
    if built is None or factor.element_size() < 4:
        return None
    rows, columns = factor.shape
    lives = factor.new_empty(rows, dtype=torch.bool)
    wide = factor.dtype == torch.float64
    square, silent = built.factor(factor.data_ptr(), lives.data_ptr(), rows, columns, wide)
    return None if wide and not _is_safe((square,)) else FactorSeen(math.sqrt(square), silent / columns, lives)


_MOST_PRODUCTS: Final = 1 << 20
"""Of entries of rows, each with each, that native code multiplies: of more BLAS does it sooner."""


class ProductSeen(NamedTuple):
    """square: ‖LᵀR‖². bound: Σ ‖l_i‖ ‖r_i‖ over the rows, which ‖LᵀR‖ does not exceed."""

    square: float
    bound: float


def scan_product(left: Tensor, right: Tensor) -> ProductSeen | None:
    """Of two small factors [rows, ..] in fp32, contiguous and on a CPU; from their Gram matrices, in double."""
    rows, lefts, rights = left.shape[0], left.shape[1], right.shape[1]
    built = _for(left)
    if built is None or not (_fits(left, torch.float32) and _fits(right, torch.float32)) or not right.numel():
        return None
    if rows * rows * (lefts + rights) > _MOST_PRODUCTS:
        return None
    return ProductSeen(*built.product(left.data_ptr(), right.data_ptr(), rows, lefts, rights))


_MOST_IN_GRAMS: Final = 1 << 28
"""The same of `scan_grams`, times the threads that BLAS would have."""
_MOST_ROWS: Final = 512


class GramsSeen(NamedTuple):
    """square, bound: as `ProductSeen` has them. least, most: ‖l_i‖² and ‖r_i‖² of rows, at the extremes."""

    square: float
    bound: float
    least: float
    most: float


def scan_grams(left: Tensor, right: Tensor, lives: Tensor | None) -> GramsSeen | None:
    """What `scan_product` gives of larger factors, from sums in fp32: good for six digits of the bound, or more.

    lives: bool [rows], contiguous and on a CPU: the rows that count in `least` and `most`; None for all of them.
    """
    rows, lefts, rights = left.shape[0], left.shape[1], right.shape[1]
    built = _for(left)
    if built is None or not built.MULTIPLIES_AND_ADDS or not right.numel():
        return None
    if not (_fits(left, torch.float32) and _fits(right, torch.float32)) or rows > _MOST_ROWS:
        return None
    if rows * rows * (lefts + rights) * torch.get_num_threads() > _MOST_IN_GRAMS:
        return None
    place = 0 if lives is None else lives.data_ptr()
    return GramsSeen(*built.grams(left.data_ptr(), right.data_ptr(), place, rows, lefts, rights))


class SoftmaxSums(NamedTuple):
    """Of one row of logits: the largest, the second, and with d = logit − largest the sums of eᵈ and of d eᵈ."""

    largest: float
    second: float
    total: float
    weighted: float


def softmax_sums(row: Tensor) -> SoftmaxSums | None:
    """Of a contiguous row on a CPU, with no memory of its size; None where an entry is NaN or the largest infinite."""
    built = _for(row)
    if built is None:
        return None
    found = SoftmaxSums(*built.softmax(row.data_ptr(), row.numel(), _DTYPES[row.dtype]))
    return None if math.isnan(found.total) else found


def rows_alike(left: Tensor, right: Tensor, sample: int) -> bool | None:
    """Whether two contiguous tensors [rows, ..] on a CPU hold the same bits in so many entries of each row, which are
    further right from row to row, and from the left again. One dimension is one row.

    sample: of whole 64-bit words, and no longer than a row.
    """
    built = _for(left)
    if built is None or not _fits(right, left.dtype):
        return None
    rows, width = left.shape[0] if left.dim() > 1 else 1, left.element_size()
    same: bool = built.alike(left.data_ptr(), right.data_ptr(), rows, left.numel() // rows * width, sample * width)
    return same


_WORD: Final = 8


def bits_alike(left: Tensor, right: Tensor) -> bool | None:
    """Whether two contiguous tensors on a CPU hold the same bits in all entries, which are whole 64-bit words."""
    built, bytes_held = _for(left), left.numel() * left.element_size()
    if built is None or not _fits(right, left.dtype) or right.numel() != left.numel() or bytes_held % _WORD:
        return None
    same: bool = built.alike(left.data_ptr(), right.data_ptr(), 1, bytes_held, bytes_held)
    return same


class Spread(NamedTuple):
    """least: of std, NaN where there is one. zeros, lost, positive, nonfinite: how many of std are 0, NaN, above 0, not
    finite. centres_zero, centres_lost, centres_nonfinite: how many of mean are.
    """

    least: float
    zeros: int
    lost: int
    positive: int
    nonfinite: int
    centres_zero: int
    centres_lost: int
    centres_nonfinite: int


class Entering(NamedTuple):
    """largest: |value − mean| / (std + guard), NaN where one is. unit: where that is."""

    largest: float
    unit: int


def scan_statistics(mean: Tensor, std: Tensor) -> Spread | None:
    """One look at a mean and a std [units] in fp32 or fp64, contiguous and on a CPU."""
    built = _for(std)
    if built is None or std.element_size() < 4 or not _fits(mean, std.dtype) or mean.numel() != std.numel():
        return None
    wide = std.dtype == torch.float64
    return Spread(*built.spread(mean.data_ptr(), std.data_ptr(), std.numel(), wide))


def scan_entering(values: Tensor, beside: Tensor | None, mean: Tensor, std: Tensor, guard: float) -> Entering | None:
    """What enters a normaliser with these statistics, [..., units] in fp32 or fp64: the largest that it becomes.

    Rows that are all 0 don't count, nor those that are so in `beside`, [..., others] of the same rows.
    """
    built = _for(values)
    if built is None or min(values.element_size(), std.element_size()) < 4 or values.shape[-1] != std.numel():
        return None
    if not (_fits(mean, std.dtype) and _fits(std, std.dtype)):
        return None
    if beside is not None and not (_fits(beside, values.dtype) and beside.shape[:-1] == values.shape[:-1]):
        return None
    units, others = std.numel(), 0 if beside is None else beside.shape[-1]
    kind = 2 * (values.dtype == torch.float64) + (std.dtype == torch.float64)
    places = (0 if each is None else each.data_ptr() for each in (values, beside, mean, std))
    largest, unit, lost = built.entering(*places, values.numel() // units, units, others, guard, kind)
    return Entering(math.nan, lost) if lost < units else Entering(largest, unit)


def _for(tensor: Tensor) -> ModuleType | None:
    """The native code, where it was built and can read this tensor."""
    readable = tensor.is_cpu and tensor.dtype in _DTYPES and tensor.numel() and tensor.is_contiguous()
    return _BUILT if readable else None


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_cpu and tensor.dtype == dtype and dtype in _DTYPES and tensor.is_contiguous()


def _is_safe(squares: Sequence[float]) -> bool:
    least, most = _SAFE_SQUARES
    return all(least < square < most for square in squares)
