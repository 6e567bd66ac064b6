"""The side memory of an edited layer, as WISE keeps it: a weight of its own, while the original stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

_SOURCE = "WISE (arXiv 2405.14768), §2.3"
_CHUNK = 1 << 17  # entries on a CPU: two of them in float64 fit a core's L2 cache
_DEVICE_CHUNK = 1 << 22


@dataclass(frozen=True)
class SideMemoryPass:
    """original: ‖W‖. norm, drift: the largest ‖W'‖ and ‖W' − W‖ of any side memory W'. stored: how many are stored.

    Frobenius norms, formed in float64.
    """

    original: float
    norm: float
    drift: float
    stored: float

    @classmethod
    def from_host(cls, values: Host, stored: int) -> SideMemoryPass:
        """From [‖W‖, max ‖W'‖, max ‖W' − W‖]."""
        return cls(float(values[0]), float(values[1]), float(values[2]), float(stored))


def _norms(side: Tensor, original: Tensor) -> Tensor:
    """[‖W‖, ‖W'‖, ‖W' − W‖] in one pass over the chunks."""
    chunk = _CHUNK if original.device.type == "cpu" else _DEVICE_CHUNK
    parts = []
    chunks = (torch.split(weight.reshape(-1), chunk) for weight in (side, original))
    for there, first in zip(*chunks, strict=True):
        new, old = there.to(original.device, torch.float64), first.double()
        parts.append(torch.stack([torch.linalg.vector_norm(each) for each in (old, new, new - old)]))
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms


@torch.no_grad()
def reduce_side_memory(sides: Sequence[Tensor], original: Tensor) -> Tensor:
    """The numbers of `SideMemoryPass` but the last, as float64 on the original's device.

    sides: at least one weight of the shape of the original. Raises ValueError without one, or when a shape differs.
    """
    if not sides or any(side.shape != original.shape for side in sides) or original.numel() == 0:
        raise ValueError(
            f"side memories of shapes {[list(side.shape) for side in sides]} beside a weight {list(original.shape)}; "
            "expected at least one, of the same shape, and not empty"
        )
    return torch.stack([_norms(side.detach(), original.detach()) for side in sides]).amax(dim=0)


class SideMemory(Probe[SideMemoryPass]):
    """How far the side memory is from the weight it stands beside."""

    needs = SideMemoryPass
    metrics = (
        Metric("editor.side_norm", "1", "log", "after", "The norm of the largest side memory.", "max ‖W'‖_F", _SOURCE),
        Metric(
            "editor.side_drift",
            "1",
            "log",
            "after",
            "How far the furthest side memory (in training, stored last, or merged) is from the original weight.",
            "max ‖W' − W‖_F",
            _SOURCE,
        ),
        Metric(
            "editor.side_ratio",
            "1",
            "log",
            "after",
            "The same against the original's own size. Absent when the original is zero.",
            "max ‖W' − W‖_F / ‖W‖_F",
            _SOURCE,
        ),
        Metric(
            "editor.side_memories",
            "memories",
            "count",
            "after",
            "How many side memories are stored beside the one in training.",
            "n",
            _SOURCE,
        ),
    )

    def compute(self, seen: SideMemoryPass) -> Readings:
        """The ratio is left out where the original is zero."""
        ratio = {} if seen.original == 0 else {"editor.side_ratio": seen.drift / seen.original}
        return {
            "editor.side_norm": seen.norm,
            "editor.side_drift": seen.drift,
            **ratio,
            "editor.side_memories": seen.stored,
        }
