"""The sweep over a weight as native code, `native/weight_scan.c`, where it was built and is this source's."""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

ASKED: Final = "STABILITYLAB_WEIGHT_PASS"
"""Environment variable: ``numpy`` for the sweep in NumPy although there is native code."""
_SOURCE: Final = Path(__file__).parent / "native" / "weight_scan.c"
_DTYPES: Final = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
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
    try:
        built = importlib.import_module("stabilitylab.probes._weight_scan")
    except ImportError:
        return None
    stale = hashlib.sha256(_SOURCE.read_bytes()).hexdigest() != built.SOURCE
    return None if stale else built


_BUILT: Final = _load()


def weight_pass() -> Literal["native", "numpy"]:
    """Which sweep is used on a CPU; see `triton_scan` for a CUDA device."""
    return "numpy" if _BUILT is None or os.environ.get(ASKED) == "numpy" else "native"


def sweep(
    weight: Tensor, references: tuple[Tensor, Tensor] | None, chunk: int, *, keeps_moved: bool = False
) -> Swept | None:
    """One sweep; the second reference, W₋, takes W's values. None where that is not for native code: then nothing was
    done yet.

    weight, references: contiguous, on a CPU, of one shape and dtype, which is one of the four floating dtypes.
    """
    code = _DTYPES.get(weight.dtype)
    held = (weight, *(references or ()))
    fits = all(each.is_contiguous() and each.dtype == weight.dtype and each.is_cpu for each in held)
    if _BUILT is None or code is None or not fits or not weight.numel() or weight_pass() == "numpy":
        return None
    wide = weight.dtype == torch.float64
    moved = torch.empty(2, chunk, dtype=torch.float64 if wide else torch.float32) if keeps_moved else None
    first, before = (0, 0) if references is None else (each.data_ptr() for each in references)
    place = 0 if moved is None else moved.data_ptr()
    if wide and not _is_safe(
        _BUILT.sweep(weight.data_ptr(), first, before, 0, weight.numel(), chunk, code, False), len(held)
    ):
        return None
    *squares, low, high, at, half = _BUILT.sweep(
        weight.data_ptr(), first, before, place, weight.numel(), chunk, code, True
    )
    hottest = None if moved is None else moved[half, : min(chunk, weight.numel() - at)]
    return Swept(tuple(squares[: len(held)]), low, high, hottest)


def _is_safe(found: tuple[float, ...], sums: int) -> bool:
    least, most = _SAFE_SQUARES
    return all(least < square < most for square in found[:sums])
