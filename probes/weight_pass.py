"""One chunked pass over a weight: norms, distances and extremes together, while each chunk is in the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from stabilitylab.probes.base import Host
from torch import Tensor

_CHUNK = 262_144  # entries: 1 MiB of fp32, which fits a core's L2 cache with its two references
_SAFE = (1e-12, 1e15)  # a chunk's fp32 norm outside this range may have over- or underflowed: redo it in fp64


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


def _flat(tensor: Tensor) -> Tensor:
    """`tensor` as one dimension; a view wherever the memory order allows it."""
    return tensor.detach().reshape(-1)


def _all_zero(chunk: Tensor) -> bool:
    """Whether every entry is 0: what no edit moved. Eight times faster on a CPU than `Tensor.any`."""
    low, high = torch.aminmax(chunk)
    return low.item() == high.item() == 0


def safe_norm(chunk: Tensor) -> Tensor:
    """‖chunk‖ as a float64 scalar that neither overflows nor underflows where the result does not.

    fp32 reduction is three times faster on a CPU and safe in the middle of its range; on an accelerator the check would
    be a synchronisation, so fp64 is used at once.
    """
    if chunk.device.type == "cpu" and chunk.dtype != torch.float64:
        norm: Tensor = torch.linalg.vector_norm(chunk, dtype=torch.float32)
        size = norm.item()
        if _SAFE[0] < size < _SAFE[1] or (size == 0 and _all_zero(chunk)):
            return norm.double()
    wide: Tensor = torch.linalg.vector_norm(chunk, dtype=torch.float64)
    return wide


def count_nonfinite(chunk: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The number of NaN and infinite entries; on a CPU the entries are only looked at when the extremes show some."""
    if chunk.device.type == "cpu" and math.isfinite(low.item()) and math.isfinite(high.item()):
        return torch.zeros((), dtype=torch.float64)
    return torch.isfinite(chunk).logical_not().sum().double()


def _parts(weight: Tensor, reference: Tensor, previous: Tensor, scratch: Tensor) -> Tensor:
    """Of one chunk: ‖W‖, ‖W−W₀‖, ‖W−W₋‖, low, high, non-finite; then W₋ takes W's values."""
    live, moved = weight.to(scratch.dtype), scratch[: weight.numel()]
    low, high = torch.aminmax(live)
    low, high = low.double(), high.double()
    norm = safe_norm(live)
    drift = safe_norm(torch.sub(live, reference.to(scratch.dtype), out=moved))
    update = safe_norm(torch.sub(live, previous.to(scratch.dtype), out=moved))
    previous.copy_(weight)
    return torch.stack([norm, drift, update, low, high, count_nonfinite(live, low, high)])


@torch.no_grad()
def reduce_weight(weight: Tensor, reference: Tensor, previous: Tensor, reference_norm: Tensor) -> Tensor:
    """The numbers of `WeightPass` as one float64 tensor of shape [7] on the weight's device; `previous` becomes W.

    weight, reference, previous: same shape, any floating dtype; the references contiguous. Differences are formed in
    fp32 (fp64 for fp64 weights), norms accumulated so that they overflow only where ‖·‖ exceeds fp64.
    """
    flat, base, last = _flat(weight), _flat(reference), _flat(previous)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # One buffer for all differences: a fresh megabyte per chunk costs as much in page faults as the arithmetic.
    scratch = torch.empty(min(_CHUNK, flat.numel()), dtype=wide, device=flat.device)
    chunks = zip(*(torch.split(part, _CHUNK) for part in (flat, base, last)), strict=True)
    rows = torch.stack([_parts(live, first, before, scratch) for live, first, before in chunks])
    norms = torch.linalg.vector_norm(rows[:, :3], dim=0)
    return torch.cat(
        [
            norms[:1],
            reference_norm.reshape(1),
            norms[1:],
            rows[:, 3].amin().reshape(1),
            rows[:, 4].amax().reshape(1),
            rows[:, 5].sum().reshape(1),
        ]
    )


@torch.no_grad()
def scan_weight(weight: Tensor) -> Tensor:
    """The numbers of `WeightScan` as one float64 tensor of shape [4] on the weight's device. Keeps no copy of it."""
    parts = []
    for chunk in torch.split(_flat(weight), _CHUNK):
        live = chunk.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        low, high = torch.aminmax(live)
        low, high = low.double(), high.double()
        parts.append(torch.stack([safe_norm(live), low, high, count_nonfinite(live, low, high)]))
    rows = torch.stack(parts)
    return torch.stack([torch.linalg.vector_norm(rows[:, 0]), rows[:, 1].amin(), rows[:, 2].amax(), rows[:, 3].sum()])


@torch.no_grad()
def norm_of(weight: Tensor) -> Tensor:
    """‖W‖ as a float64 scalar on the weight's device."""
    flat = _flat(weight)
    chunks = [flat[start : start + _CHUNK] for start in range(0, flat.numel(), _CHUNK)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([safe_norm(chunk) for chunk in chunks]))
    return norm


@torch.no_grad()
def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals the same NaN.

    Synchronises an accelerator. On a CPU, NumPy compares 64-bit words of memory: three times faster than torch.equal.
    """
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    a, b = _flat(left).view(ints), _flat(right).view(ints)
    if a.device.type != "cpu":
        return bool(torch.equal(a, b))
    if a.numel() * a.element_size() % 8 == 0:
        a, b = a.view(torch.int64), b.view(torch.int64)
    return bool((a.numpy() == b.numpy()).all())
