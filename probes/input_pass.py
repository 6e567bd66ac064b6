"""The floating point numbers that a model is called with: whether any of them is no number to go on from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host


@dataclass(frozen=True)
class InputPass:
    """Of all calls of one edit. bad: how many entries are NaN or +∞; float64."""

    bad: float

    @classmethod
    def from_host(cls, values: Host) -> InputPass:
        """From the sum of what `count_bad_inputs` gave."""
        return cls(float(values[0]))


@torch.no_grad()
def count_bad_inputs(tensor: Tensor) -> Tensor:
    """How many entries of a floating point tensor are NaN or +∞, as a float64 scalar on its device."""
    tensor = tensor.detach()
    return (torch.isnan(tensor) | torch.isposinf(tensor)).sum().double()
