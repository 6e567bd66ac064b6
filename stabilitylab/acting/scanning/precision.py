"""What a dtype would cost: weights that it can't hold, updates that it rounds away, and what the canary makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from stabilitylab.acting.scanning.answers import Distance, Original
from stabilitylab.acting.scanning.entries import PIECE, PIECE_ELSEWHERE
from stabilitylab.acting.scanning.opening import one_line
from stabilitylab.errors import EditError, UsageError, did_you_mean
from stabilitylab.record.scanned import FLOATS, PrecisionScan, headroom
from stabilitylab.watching.canary import Batch
from stabilitylab.watching.snapshot import RandomStates, take

SHORT: Final[Mapping[str, str]] = {
    "fp64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}
"""What else the dtypes are called."""


def dtype_called(name: str) -> torch.dtype:
    """The dtype of a name in `record.scanned.FLOATS` or in `SHORT`. Raises UsageError for another one."""
    full = SHORT.get(name, name)
    if full not in FLOATS:
        known = ", ".join([*FLOATS, *SHORT])
        raise UsageError(
            f"precision {name!r} is not known; expected one of {known}{did_you_mean(name, known.split(', '))}"
        )
    found: torch.dtype = getattr(torch, full)
    return found


class PrecisionCount:
    """Counts what one dtype would do to weights and updates, tensor by tensor: a folder need not fit into memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: one of `record.scanned.FLOATS`."""
        self.dtype = dtype
        self._name = str(dtype).removeprefix("torch.")
        largest, _, eps = FLOATS[self._name]
        # Past it nothing rounds to the largest value. Where a dtype has no infinity, torch may give that value still.
        self._end = largest + eps * 2.0 ** (math.frexp(largest)[1] - 2)
        self._entries = self._overflowing = self._vanishing = 0
        self._largest = 0.0
        self._updates = self._swallowed = 0
        self._has_updates = False

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        """Count a weight, of any shape; one that is no tensor of floating-point numbers is passed over.

        Entries that are not finite now are counted among the entries only.
        """
        if not tensor.is_floating_point():
            return
        self._entries += tensor.numel()
        for piece in _pieces(tensor):
            rounded, wide = self._rounded(piece), _wide(piece)
            finite = wide.isfinite()
            too_large = ~rounded.isfinite() | (wide.abs() > self._end)
            self._overflowing += int((finite & too_large).sum())
            self._vanishing += int(((wide != 0) & (rounded == 0)).sum())
            self._largest = max(self._largest, float(wide.abs().masked_fill_(~finite, 0.0).max()))

    @torch.no_grad()
    def add_update(self, weight: Tensor, update: Tensor) -> None:
        """Count what the dtype would swallow of an update of `weight`; both of one shape, of any floating dtype.

        The weight is rounded to the dtype; the sum is formed in float32 (float64 where one of them is) and rounded
        once, as an addition in the dtype is. Entries whose weight does not fit into the dtype are none of the updates.
        """
        self._has_updates = True
        for old, change in zip(_pieces(weight), _pieces(update), strict=True):
            kept = self._rounded(old)
            wide = torch.promote_types(kept.dtype, _wide(change).dtype)
            moved = kept.to(wide) + change.to(device=kept.device, dtype=wide)
            meant = (change.to(kept.device) != 0) & kept.isfinite()
            self._updates += int(meant.sum())
            self._swallowed += int((meant & (self._rounded(moved) == kept)).sum())

    def _rounded(self, piece: Tensor) -> Tensor:
        """What the dtype keeps of it, in float32 or above: the smallest dtypes can't be compared."""
        return _wide(piece.to(self.dtype))

    def result(self, *, cast: Distance | str | None = None, largest_activation: float | None = None) -> PrecisionScan:
        """What was counted so far.

        cast: what `try_cast` gave, if it was tried. largest_activation: the largest magnitude of the canary's forward.
        """
        limit = FLOATS[self._name][0]
        return PrecisionScan(
            dtype=self._name,
            entries=self._entries,
            overflowing=self._overflowing,
            vanishing=self._vanishing,
            headroom_bits=headroom(self._largest, limit) if self._entries else None,
            activation_headroom_bits=headroom(largest_activation, limit),
            updates=self._updates if self._has_updates else None,
            swallowed=self._swallowed if self._has_updates else None,
            kl_nats=None if not isinstance(cast, Distance) else cast.kl_nats if cast.is_finite else math.nan,
            agreement=cast.agreement if isinstance(cast, Distance) else None,
            error=cast if isinstance(cast, str) else None,
        )


def precision_of_tensors(tensors: Iterable[Tensor], dtype: torch.dtype) -> PrecisionScan:
    """What `dtype` would do to these weights. No model is needed, and one of them at a time is looked at."""
    count = PrecisionCount(dtype)
    for tensor in tensors:
        count.add(tensor)
    return count.result()


def try_cast(model: nn.Module, original: Original, dtype: torch.dtype) -> Distance | str:
    """How far the canary's answer moves with the model cast to `dtype`, as ``model.to(dtype)`` does; then put back.

    Parameters, buffers and activations are in it, so that what overflows on the way shows. Floating-point tensors among
    the canary's arguments are cast too; a canary that is a function of the model has to see to that itself. Memory: a
    copy of the model as it is, and one in `dtype`.

    Returns the distance, or one line that says why it could not be tried.

    Raises:
        UsageError: the model holds a tensor that can't be copied.
        EditError: something was not bit for bit as before after it was put back.
    """
    before = take({"": model})
    random = RandomStates(before.generators)
    found: Distance | str
    try:
        model.to(dtype)
        found = original.distance_of(model, _cast_batch(original.canary.batch, dtype))
    except Exception as error:  # whatever a dtype lacks: a kernel, a layer that takes it
        found = one_line(error)
    finally:
        left = before.put_back()
        random.put_back()
    if left:
        raise EditError(f"{left[0]!r} could not be put back after the model was cast to {dtype}; load the model anew")
    return found


def _cast_batch(batch: Batch, dtype: torch.dtype) -> Batch:
    if isinstance(batch, Mapping):
        return {name: _cast(value, dtype) for name, value in batch.items()}
    return batch.to(dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _wide(piece: Tensor) -> Tensor:
    return piece if piece.dtype in (torch.float32, torch.float64) else piece.float()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    flat = tensor.detach().reshape(-1)
    return torch.split(flat, PIECE if flat.is_cpu else PIECE_ELSEWHERE) if flat.numel() else ()
