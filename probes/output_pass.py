"""A layer's output, reduced inside the forward hook: an in-place activation may overwrite it a moment later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stabilitylab.probes.base import Host
from stabilitylab.probes.weight_pass import count_nonfinite, safe_norm
from torch import Tensor

_SEQUENCE_DIMENSIONS = 3


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


def _rms_and_max(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = torch.aminmax(wide)
    low, high = low.double(), high.double()
    largest = torch.maximum(low.abs(), high.abs())
    # A norm that is safe: the squares of fp32 activations past 1e19 overflow, and such models still run.
    rms = safe_norm(wide) / wide.numel() ** 0.5
    return rms, largest, count_nonfinite(wide, low, high)


@torch.no_grad()
def reduce_output(output: Tensor) -> Tensor:
    """The numbers of `OutputPass` as a float64 tensor on the output's device. output: [..., positions, features]."""
    wide = output.detach()
    wide = wide.to(torch.float64 if wide.dtype == torch.float64 else torch.float32)
    rms, largest, nonfinite = _rms_and_max(wide)
    parts = [rms, largest, nonfinite]
    if wide.dim() >= _SEQUENCE_DIMENSIONS and wide.shape[-2] > 1:
        rms, largest, _ = _rms_and_max(wide[..., 1:, :])
        parts += [rms, largest]
    return torch.stack(parts)
