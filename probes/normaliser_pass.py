"""The normaliser of a hypernetwork editor (MEND, MALMEN), and what enters the hypernetwork through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitylab.probes.base import Host

MEND_GUARD = 1e-7
"""What MEND adds to the std before it divides (arXiv 2110.11309, §3.2, and the authors' code)."""


@dataclass(frozen=True)
class NormaliserPass:
    """std_min, std_zeros: the smallest entry of the normaliser's std, and how many are exactly 0 (NaN: any is NaN).

    nonfinite: entries of its mean and std that are NaN or infinite. input_max, input_unit, input_unit_std: the largest
    magnitude among the normalised inputs of this edit, the unit it occurred at, and the std that it was divided by;
    None when nothing entered.
    """

    std_min: float
    std_zeros: float
    nonfinite: float
    input_max: float | None
    input_unit: float | None
    input_unit_std: float | None

    @classmethod
    def from_host(cls, values: Host) -> NormaliserPass:
        """From the numbers that `reduce_normaliser` packed: three, or six when something entered."""
        std_min, std_zeros, nonfinite, *entered = (float(value) for value in values)
        if not entered:
            return cls(std_min, std_zeros, nonfinite, None, None, None)
        return cls(std_min, std_zeros, nonfinite, entered[0], entered[1], entered[2])


@dataclass(frozen=True)
class LearningRates:
    """The editor's learned edit learning rates, one per edited layer: float64 of shape [layers]."""

    rates: Host


@torch.no_grad()
def reduce_normaliser(mean: Tensor, std: Tensor, inputs: Sequence[Tensor], guard: float = MEND_GUARD) -> Tensor:
    """The numbers of `NormaliserPass` as a float64 tensor on the statistics' device.

    mean, std: [units], at least one. inputs: what entered during the edit, each [..., units]; rows that are all zero
    (padding) are left out, as MEND leaves them out. guard: what the editor adds to the std.
    """
    std, mean = std.detach().double().reshape(-1), mean.detach().double().reshape(-1)
    nonfinite = torch.isfinite(torch.cat([mean, std])).logical_not().sum()
    parts = [std.amin(), (std == 0).sum().double(), nonfinite.double()]
    rows = [entered.detach().reshape(-1, std.numel()).to(std.device, torch.float64) for entered in inputs]
    if rows and sum(row.shape[0] for row in rows):
        entered = torch.cat(rows)
        real = (entered != 0).any(dim=-1, keepdim=True)
        size = torch.where(real, ((entered - mean) / (std + guard)).abs(), torch.zeros_like(entered)).amax(dim=0)
        # A NaN wins the comparison, as it would win everything downstream.
        unit = torch.where(torch.isnan(size), torch.full_like(size, torch.inf), size).argmax()
        parts += [size.take(unit), unit.double(), std.take(unit)]
    return torch.stack(parts)
