"""The sweep over a weight on a CUDA device as one kernel, where triton is there: it comes with torch's CUDA builds.

One read of W, W₀ and W₋ and one write of W₋, where torch's own operators pass over them again and again. Nothing waits
for the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, Final

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # such as torch's CPU builds
    triton = tl = None

_BLOCK: Final = 2_048
_PROGRAMS: Final = 1_024
"""So many parts are reduced apart, and then together: enough for any device, and few enough to be summed at once."""
_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OPTIONS: Final = {"enable_fp_fusion": True}
"""Said, since triton 3.9 warns where it is not. No sum here depends on it."""
_SUMS: Final = 3
_COLUMNS: Final = 7
"""Of a part: three sums of squares, lowest, highest, entries that are not finite, and those that are NaN."""


_log = logging.getLogger("stabilitylab")
_failed: set[str] = set()
"""Why it is not used any more."""


def is_interpreted() -> bool:
    """Whether triton runs its kernels on a CPU, entry by entry, for tests."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def is_there() -> bool:
    """Whether there is a kernel, and it has not failed."""
    return triton is not None and not _failed


def fits(weight: Tensor, references: tuple[Tensor, ...]) -> bool:
    """Whether the kernel can do it: contiguous tensors of one floating dtype on one CUDA device."""
    held = (weight, *references)
    return (
        is_there()
        and (weight.is_cuda or is_interpreted())
        and weight.numel() > 0
        and weight.dtype in _DTYPES
        and all(each.is_contiguous() and each.dtype == weight.dtype and each.device == weight.device for each in held)
    )


def sweep_on_device(weight: Tensor, references: tuple[Tensor, ...]) -> Tensor | None:
    """[‖W‖, ‖W−W₀‖ and ‖W−W₋‖ if there are references, low, high, non-finite] as float64 on the weight's device.

    The second reference, W₋, takes W's values. None where it does not fit, or can't be compiled here: then nothing was
    done. Differences are formed in fp32 (fp64 for fp64), squares and their sums in fp64; the extremes are NaN where W
    has one.
    """
    if not fits(weight, references):
        return None
    here = torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext()
    try:
        with here:
            table = _parts(weight, references)
    except Exception as error:  # no compiler for what starts it, a device that is too old: torch's operators serve
        _failed.add(f"{type(error).__name__}: {error}")
        _log.warning("stabilitylab: no triton kernel here, weights take some more passes: %s", *_failed)
        return None
    norms = table[:, : _SUMS if references else 1].sum(dim=0).sqrt()
    has_nan = table[:, 6].sum() > 0
    ends = torch.stack([table[:, 3].amin(), table[:, 4].amax()])
    return torch.cat([norms, torch.where(has_nan, torch.nan, ends), table[:, 5].sum().reshape(1)])


def _parts(weight: Tensor, references: tuple[Tensor, ...]) -> Tensor:
    blocks = -(-weight.numel() // _BLOCK)
    programs = min(blocks, _PROGRAMS)
    table = torch.empty(programs, _COLUMNS, dtype=torch.float64, device=weight.device)
    first, before = references or (weight, weight)
    kernel: Any = _kernel
    kernel[(programs,)](
        weight,
        first,
        before,
        table,
        weight.numel(),
        -(-blocks // programs),
        COMPARES=bool(references),
        WIDE=weight.dtype == torch.float64,
        BLOCK=_BLOCK,
        COLUMNS=_COLUMNS,
        **_OPTIONS,
    )
    return table


# Triton's compiler reads what follows: it takes types from the call, and knows no name of this module.
def _kernel_source(  # type: ignore[no-untyped-def]
    weight,
    first,
    before,
    table,
    entries,
    rounds,
    COMPARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    own = tl.zeros((BLOCK,), tl.float64)
    drift = tl.zeros((BLOCK,), tl.float64)
    update = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    lost = tl.zeros((BLOCK,), tl.float64)
    nans = tl.zeros((BLOCK,), tl.float64)
    for turn in range(rounds):
        at = (part * rounds + turn) * BLOCK + tl.arange(0, BLOCK)
        there = at < entries
        stored = tl.load(weight + at, mask=there, other=0.0)
        live = stored.to(tl.float64) if WIDE else stored.to(tl.float32)
        wide = live.to(tl.float64)
        own += wide * wide
        is_nan = there & (live != live)  # noqa: PLR0124
        finite = tl.abs(wide) < float("inf")
        nans += tl.where(is_nan, 1.0, 0.0)
        lost += tl.where(there & (finite == 0), 1.0, 0.0)
        seen = there & (is_nan == 0)
        low = tl.minimum(low, tl.where(seen, wide, float("inf")))
        high = tl.maximum(high, tl.where(seen, wide, float("-inf")))
        if COMPARES:
            original = tl.load(first + at, mask=there, other=0.0)
            previous = tl.load(before + at, mask=there, other=0.0)
            from_original = (live - original.to(live.dtype)).to(tl.float64)
            from_previous = (live - previous.to(live.dtype)).to(tl.float64)
            drift += from_original * from_original
            update += from_previous * from_previous
            tl.store(before + at, stored, mask=there)
    row = table + part * COLUMNS
    tl.store(row, tl.sum(own, axis=0))
    tl.store(row + 1, tl.sum(drift, axis=0))
    tl.store(row + 2, tl.sum(update, axis=0))
    tl.store(row + 3, tl.min(low, axis=0))
    tl.store(row + 4, tl.max(high, axis=0))
    tl.store(row + 5, tl.sum(lost, axis=0))
    tl.store(row + 6, tl.sum(nans, axis=0))


_kernel: Final = None if triton is None else triton.jit(_kernel_source)
