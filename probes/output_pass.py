"""A layer's output, reduced inside the forward hook: an in-place activation may overwrite it a moment later."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.native_scan import scan_extremes, scan_rows
from stabilitylab.probes.weight_pass import (
    as_array,
    count_nonfinite,
    extremes,
    is_within,
    number_here,
    on_cpu,
    wide_dtype,
)

_SEQUENCE_DIMENSIONS = 3
_SAFE_NORM = (1e-12, 1e15)  # a largest norm in here: no square of fp32 has over- or underflowed that would count


@dataclass(frozen=True)
class OutputPass:
    """Of one layer's output: root mean square and largest magnitude over all positions, and over those beyond the
    first (a "sink" position may be a thousand times larger than the rest). The latter are None where there is no
    sequence, or only one position. largest_finite: of the output's dtype.
    """

    rms: float
    max_abs: float
    rms_beyond_first: float | None
    max_abs_beyond_first: float | None
    nonfinite: float
    largest_finite: float

    @classmethod
    def from_host(cls, values: Host, dtype: torch.dtype) -> OutputPass:
        """From the numbers that `reduce_output` packed: three, or five with a sequence."""
        rms, max_abs, nonfinite, *beyond = (float(value) for value in values)
        rms_beyond, max_beyond = (beyond[0], beyond[1]) if beyond else (None, None)
        return cls(rms, max_abs, rms_beyond, max_beyond, nonfinite, torch.finfo(dtype).max)


@dataclass(frozen=True)
class LaterOutputs:
    """Of all forwards through a layer in one edit: how many, how many not finite, and the largest magnitude in the
    last and in the worst of them (None where there was one only); float64.
    """

    passes: float
    nonfinite_passes: float
    max_abs_last: float | None = None
    max_abs_worst: float | None = None

    @classmethod
    def from_host(cls, values: Host) -> LaterOutputs:
        """From [passes, non-finite, last, worst], or the first two."""
        return cls(*(float(value) for value in values))


@dataclass(frozen=True)
class NormInput:
    """The largest magnitude that enters the normalisation after a layer, and the most that it may be: float64."""

    max_abs: float
    limit: float

    @classmethod
    def from_host(cls, values: Host, dtype: torch.dtype) -> NormInput:
        """From [max |h|]. The squares of half-precision inputs are summed in fp32, as torch and transformers do."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(float(values[0]), min(torch.finfo(dtype).max, torch.finfo(wide).max ** 0.5))


def largest_magnitude(tensor: Tensor) -> Tensor:
    """max |y| as a float64 scalar; NaN where the tensor has one."""
    return _largest(*extremes(tensor))


def largest_magnitude_here(tensor: Tensor) -> float:
    """The same of a tensor on a CPU as a number."""
    found = scan_extremes(tensor)
    return number_here(largest_magnitude(tensor)) if found is None else max(-found[0], found[1])


def _largest(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(low.abs(), high.abs())


def _by_position(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, smallest, largest) over the features, float64 of shape [..., positions]."""
    if not on_cpu(wide):
        norms = torch.linalg.vector_norm(wide, dim=-1, dtype=torch.float64)
        return norms, wide.amin(dim=-1).double(), wide.amax(dim=-1).double()
    values = as_array(wide)
    norms = torch.linalg.vector_norm(wide, dim=-1)
    if not is_within(norms.amax(), *_SAFE_NORM):
        # The squares of fp32 activations past 1e19 overflow, and such models still run.
        norms = torch.linalg.vector_norm(wide, dim=-1, dtype=torch.float64)
    low, high = torch.from_numpy(values.min(axis=-1)), torch.from_numpy(values.max(axis=-1))
    return norms.double(), low.double(), high.double()


@torch.no_grad()
def reduce_output(output: Tensor) -> Tensor:
    """The numbers of `OutputPass` as a float64 tensor on the output's device. output: [..., positions, features], or
    [features], as of an embedding that is asked for one row.
    """
    wide = output.detach()
    wide = wide[None] if wide.dim() == 1 else wide
    found = _reduced_at_once(wide)
    if found is not None:
        return found
    wide = wide.to(wide_dtype(wide))
    norms, lows, highs = _by_position(wide)
    low, high = lows.amin(), highs.amax()
    whole = torch.linalg.vector_norm(norms) / wide.numel() ** 0.5
    parts = [whole, _largest(low, high), count_nonfinite(wide, low, high)]
    if wide.dim() >= _SEQUENCE_DIMENSIONS and wide.shape[-2] > 1:
        beyond = norms[..., 1:]
        rms = torch.linalg.vector_norm(beyond) / (beyond.numel() * wide.shape[-1]) ** 0.5
        parts += [rms, _largest(lows[..., 1:].amin(), highs[..., 1:].amax())]
    return torch.stack(parts)


def _reduced_at_once(output: Tensor) -> Tensor | None:
    """The same by native code; None where it has to be done another way, or something is not finite."""
    scanned = scan_rows(output)
    if scanned is None or not all(map(math.isfinite, scanned[0])):
        return None
    whole, beyond = scanned
    parts = [math.sqrt(whole.square / output.numel()), max(abs(whole.low), abs(whole.high)), 0.0]
    positions = output.shape[-2]
    if output.dim() >= _SEQUENCE_DIMENSIONS and positions > 1:
        entries = output.numel() / positions * (positions - 1)
        parts += [math.sqrt(beyond.square / entries), max(abs(beyond.low), abs(beyond.high))]
    return torch.tensor(parts, dtype=torch.float64)


class OutputKeeper:
    """Counts the outputs of one site in one edit, and keeps the largest magnitude of the last and of the worst.

    One look at the extremes of each, however many there are. The worst is the first that is not finite, else the
    largest.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._nonfinite: Tensor | float = 0.0
        self._last: Tensor | float | None = None
        self._worst: Tensor | float = 0.0

    def add(self, output: Tensor, largest: Tensor | None = None) -> None:
        """One more output, without a graph. largest: its largest magnitude, where that is known already."""
        self.passes += 1
        if on_cpu(output):
            self._keep(largest_magnitude_here(output) if largest is None else number_here(largest))
            return
        now = largest_magnitude(output) if largest is None else largest
        bad = torch.isfinite(now).logical_not().double()
        worst = now if self._last is None else torch.as_tensor(self._worst)
        self._worst = torch.where(torch.isfinite(worst) & ~(now <= worst), now, worst)
        self._nonfinite, self._last = self._nonfinite + bad, now

    def _keep(self, now: float) -> None:
        """The same in numbers, where reading them waits for nothing."""
        worst = now if self._last is None else float(self._worst)
        self._worst = now if math.isfinite(worst) and not now <= worst else worst
        self._nonfinite, self._last = self._nonfinite + (0.0 if math.isfinite(now) else 1.0), now

    def reduce(self) -> Tensor | None:
        """The numbers of `LaterOutputs` as a float64 tensor; None where there was no output."""
        if self._last is None:
            return None
        if isinstance(self._last, Tensor):
            counted = [torch.full_like(self._last, float(self.passes)), torch.as_tensor(self._nonfinite)]
            return torch.stack(counted if self.passes == 1 else [*counted, self._last, torch.as_tensor(self._worst)])
        numbers = [float(self.passes), self._nonfinite, self._last, self._worst]
        return torch.tensor(numbers[:2] if self.passes == 1 else numbers, dtype=torch.float64)
