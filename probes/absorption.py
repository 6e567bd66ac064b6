"""What the dtype swallowed of an update: entries that were to change, and are the same as before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

_MATRIX = 2  # dimensions


@dataclass(frozen=True)
class AbsorptionPass:
    """meant: entries where the editor's Δ is not 0. swallowed: those of them whose weight did not change; float64."""

    meant: float
    swallowed: float

    @classmethod
    def from_host(cls, values: Host) -> AbsorptionPass:
        """From [meant, swallowed]."""
        return cls(float(values[0]), float(values[1]))


@torch.no_grad()
def reduce_absorption(update: Tensor, weight: Tensor, previous: Tensor) -> Tensor:
    """The numbers of `AbsorptionPass` as a float64 tensor on the weight's device.

    update: Δ as the editor meant it, in its own dtype, of the weight's shape or its transpose. Raises ValueError for
    another shape.
    """
    delta = update.detach()
    if delta.shape != weight.shape and delta.dim() == _MATRIX:
        delta = delta.T
    if delta.shape != weight.shape:
        raise ValueError(f"the editor's update has shape {list(update.shape)}; expected {list(weight.shape)}")
    meant = delta.to(weight.device) != 0
    swallowed = meant & (weight.detach() == previous)
    return torch.stack([meant.sum().double(), swallowed.sum().double()])


@dataclass(frozen=True)
class MovedEntries:
    """moved: entries of a weight that an edit changed; entries: how many it has; float64."""

    moved: float
    entries: float

    @classmethod
    def from_host(cls, values: Host) -> MovedEntries:
        """From [moved, entries]."""
        return cls(float(values[0]), float(values[1]))


@torch.no_grad()
def reduce_moved(weight: Tensor, previous: Tensor) -> Tensor:
    """The numbers of `MovedEntries` as a float64 tensor on the weight's device."""
    moved = torch.count_nonzero(weight.detach() != previous).double()
    return torch.stack([moved, torch.full_like(moved, weight.numel())])


class Absorption(Probe[AbsorptionPass]):
    """How much of an update is lost to rounding."""

    needs = AbsorptionPass
    metrics = (
        Metric(
            "update.swallowed_share",
            "share",
            "linear",
            "after",
            "Share of the entries that the editor meant to change whose weight is the same as before: the dtype rounds "
            "the change away, as bfloat16 does 1 + 0.003. Only where the editor tells its Δ, by `edit.report`.",
            "#{Δ ≠ 0, W_t = W_{t−1}} / #{Δ ≠ 0}",
            "bfloat16 training: Zamirai et al. (arXiv 2010.06192)",
        ),
    )

    def compute(self, seen: AbsorptionPass) -> Readings:
        """Left out where nothing was meant to change."""
        return {} if seen.meant == 0 else {"update.swallowed_share": seen.swallowed / seen.meant}


class MovedShare(Probe[MovedEntries]):
    """How many entries an edit moved at all, of weights of 16 bits."""

    needs = MovedEntries
    metrics = (
        Metric(
            "update.moved_share",
            "share",
            "linear",
            "after",
            "Share of the weight's entries that the edit changed. Only of weights of 16 bits: far below the share of "
            "entries that have a gradient, the rest of the step was rounded away.",
            "#{W_t ≠ W_{t−1}} / #W",
            "bfloat16 training: Zamirai et al. (arXiv 2010.06192)",
        ),
    )

    def compute(self, seen: MovedEntries) -> Readings:
        """From the counts."""
        return {"update.moved_share": seen.moved / seen.entries}
