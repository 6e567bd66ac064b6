"""The normaliser of a hypernetwork editor (MEND, MALMEN), and what enters the hypernetwork through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.native_scan import scan_entering, scan_statistics
from stabilitylab.probes.weight_pass import as_array, number_here, on_cpu

MEND_GUARD = 1e-7
"""What MEND adds to the std before it divides (arXiv 2110.11309, §3.2, and the authors' code)."""
LISTED: Final = 8
"""Units without a spread that are listed; the others are counted."""


@dataclass(frozen=True)
class NormaliserPass:
    """std_min, std_zeros: the smallest entry of the normaliser's std, and how many are exactly 0 (NaN: any is NaN).

    nonfinite: entries of its mean and std that are NaN or infinite. zero_units: the first units whose std is 0, float64
    of shape [at most `LISTED`]. no_spread: whether no entry of the std is above 0 while all of the mean are finite: 0
    or 1. rows: how many it was made from; None where nothing tells. empty: whether it has seen no row yet. input_max,
    input_unit, input_unit_std: the largest magnitude among the normalised inputs of this edit, the unit it occurred at,
    and the std that it was divided by; None when nothing entered.
    """

    std_min: float
    std_zeros: float
    nonfinite: float
    input_max: float | None
    input_unit: float | None
    input_unit_std: float | None
    zero_units: Host
    no_spread: float
    rows: float | None
    empty: bool

    @property
    def unused(self) -> bool:
        """Whether it has seen no row yet and nothing was normalised with it: what it holds are no statistics."""
        return self.empty and self.input_max is None

    @classmethod
    def from_host(cls, values: Host) -> NormaliserPass:
        """From the numbers that `reduce_normaliser` packed; those of the inputs are last, where something entered."""
        std_min, std_zeros, nonfinite, no_spread, rows, empty = (float(value) for value in values[:_FIRST])
        listed, entered = values[_FIRST : _FIRST + LISTED], values[_FIRST + LISTED :]
        largest, unit, unit_std = (float(value) for value in entered) if entered.size else (None, None, None)
        return cls(
            std_min,
            std_zeros,
            nonfinite,
            largest,
            unit,
            unit_std,
            zero_units=np.asarray(listed[~np.isnan(listed)], dtype=np.float64),
            no_spread=no_spread,
            rows=None if math.isnan(rows) else rows,
            empty=empty == 1,
        )


_FIRST: Final = 6
"""Numbers in front of the list of units."""


@dataclass(frozen=True)
class LearningRates:
    """The editor's learned edit learning rates, one per edited layer: float64 of shape [layers]."""

    rates: Host


@torch.no_grad()
def reduce_normaliser(
    mean: Tensor,
    std: Tensor,
    inputs: Sequence[Tensor],
    guard: float = MEND_GUARD,
    rows: Tensor | None = None,
    *,
    learns: bool = False,
    beside: Sequence[Tensor | None] = (),
) -> Tensor:
    """The numbers of `NormaliserPass` as a float64 tensor on the statistics' device.

    mean, std: [units], at least one. inputs: what entered during the edit, each [..., units]; rows that are all zero
    (padding) are left out, as MEND leaves them out. guard: what the editor adds to the std. rows: the normaliser's own
    count of the rows it has seen, one number, NaN where it has none; None where it doesn't count. Then what it holds
    tells whether it has seen any: a mean of zeros with a std of zeros, or of NaN, is what buffers are begun with.
    beside: with each of the inputs, where it is given: rows in which this is all zero are left out too, [..., others].
    learns: whether rows are still to come. Then NaN in all of both is a beginning too; else they were never loaded.
    """
    natively = _reduce_natively(mean.detach(), std.detach(), inputs, beside, guard, rows, learns)
    if natively is not None:
        return natively
    inputs = [_only(*each) for each in zip(inputs, beside or [None] * len(inputs), strict=True)]
    std, mean = std.detach().double().reshape(-1), mean.detach().double().reshape(-1)
    if all(map(on_cpu, (std, mean, *inputs, *(() if rows is None else (rows,))))):
        entering = [_as_rows(entered, std.numel()) for entered in inputs]
        count = math.nan if rows is None else number_here(rows)
        return torch.from_numpy(_reduce_on_host(as_array(mean), as_array(std), entering, guard, count, learns))
    return _reduce_on_device(mean, std, inputs, guard, rows, learns)


def _only(values: Tensor, beside: Tensor | None) -> Tensor:
    """The rows with something beside them; zeros in place of the others."""
    if beside is None:
        return values
    return torch.where((beside != 0).any(dim=-1, keepdim=True), values, values.new_zeros(()))


def _reduce_natively(
    mean: Tensor,
    std: Tensor,
    inputs: Sequence[Tensor],
    beside: Sequence[Tensor | None],
    guard: float,
    rows: Tensor | None,
    learns: bool,
) -> Tensor | None:
    """In a fifth of the time of the small arrays below; None where a tensor is not for native code."""
    seen = scan_statistics(mean, std)
    if seen is None or not all(map(on_cpu, () if rows is None else (rows,))):
        return None
    entering = [
        scan_entering(values.detach(), None if other is None else other.detach(), mean, std, guard)
        for values, other in zip(inputs, beside or [None] * len(inputs), strict=True)
        if values.numel()
    ]
    units, listed = std.numel(), [math.nan] * LISTED
    no_spread = not (seen.positive or seen.centres_nonfinite)
    blank = (seen.centres_zero == units and units in (seen.zeros, seen.lost)) or (
        learns and seen.centres_lost == seen.lost == units
    )
    count = math.nan if rows is None else number_here(rows)
    count = 0.0 if math.isnan(count) and blank else count
    if seen.zeros:
        first = (std.reshape(-1) == 0).nonzero().reshape(-1)[:LISTED].tolist()
        listed[: len(first)] = first
    nonfinite = seen.nonfinite + seen.centres_nonfinite
    numbers = [seen.least, seen.zeros, nonfinite, no_spread, count, count == 0, *listed]
    if entering:
        known = [one for one in entering if one is not None]
        if len(known) < len(entering):
            return None
        # The first unit of the largest, and a NaN before all numbers, as over all rows at once.
        largest, unit = min(known, key=lambda one: (not math.isnan(one.largest), -one.largest, one.unit))
        numbers += [largest, unit, number_here(std.reshape(-1)[unit])]
    return torch.tensor(numbers, dtype=torch.float64)


def _as_rows(entered: Tensor, units: int) -> Host:
    return as_array(entered.detach().reshape(-1, units).double())


def _reduce_on_host(mean: Host, std: Host, entering: Sequence[Host], guard: float, count: float, learns: bool) -> Host:
    """In a fifth of the time that some thirty small tensors take: there are two normalisers a layer."""
    least = float(std.min())
    if least > 0 and math.isfinite(float(std.max())) and np.isfinite(mean).all():  # as it mostly is: all is well
        numbers = [least, 0.0, 0.0, 0.0, count, float(count == 0)] + [math.nan] * LISTED
    else:
        numbers = _odd(mean, std, count, learns)
    entered = np.concatenate(entering) if len(entering) > 1 else entering[0] if entering else np.empty((0, std.size))
    if entered.shape[0]:
        with np.errstate(all="ignore"):
            size = np.abs((entered - mean) / (std + guard))
        size[~entered.any(axis=1)] = 0.0
        size = size.max(axis=0)
        unit = int(np.argmax(size))  # a NaN wins the comparison, as it would win everything downstream
        numbers += [size[unit], unit, std[unit]]
    return np.array(numbers, dtype=np.float64)


def _odd(mean: Host, std: Host, count: float, learns: bool) -> list[float]:
    """The numbers of statistics of which some are zero or not finite."""
    zero, lost, unset = std == 0, np.isnan(std), np.isnan(mean)
    nonfinite = np.count_nonzero(~np.isfinite(mean)) + np.count_nonzero(~np.isfinite(std))
    no_spread = not ((std > 0).any() or not np.isfinite(mean).all())
    blank = ((mean == 0).all() and (zero.all() or lost.all())) or (learns and unset.all() and lost.all())
    count = 0.0 if math.isnan(count) and blank else count
    first = np.flatnonzero(zero)[:LISTED].tolist()
    numbers = [std.min(), np.count_nonzero(zero), nonfinite, no_spread, count, count == 0]
    return [*numbers, *first, *[math.nan] * (LISTED - len(first))]


def _reduce_on_device(
    mean: Tensor, std: Tensor, inputs: Sequence[Tensor], guard: float, rows: Tensor | None, learns: bool
) -> Tensor:
    """The same without waiting."""
    nonfinite = torch.isfinite(torch.cat([mean, std])).logical_not().sum()
    zero = std == 0
    no_spread = ((std > 0).any() | torch.isfinite(mean).logical_not().any()).logical_not()
    lost, unset = torch.isnan(std).all(), torch.isnan(mean).all()
    blank = ((mean == 0).all() & (zero.all() | lost)) | (unset & lost if learns else torch.zeros_like(lost))
    if rows is None:
        count = torch.full_like(std[0], torch.nan)
    else:
        count = rows.detach().to(std.device, torch.float64).reshape(())
    count = torch.where(torch.isnan(count) & blank, torch.zeros_like(count), count)
    numbers = (std.amin(), zero.sum(), nonfinite, no_spread, count, count == 0)
    parts = [torch.stack([number.double() for number in numbers]), _first_of(zero)]
    entering = [entered.detach().reshape(-1, std.numel()).to(std.device, torch.float64) for entered in inputs]
    if entering and sum(part.shape[0] for part in entering):
        entered = torch.cat(entering)
        real = (entered != 0).any(dim=-1, keepdim=True)
        size = torch.where(real, ((entered - mean) / (std + guard)).abs(), torch.zeros_like(entered)).amax(dim=0)
        # A NaN wins the comparison, as it would win everything downstream.
        unit = torch.where(torch.isnan(size), torch.full_like(size, torch.inf), size).argmax()
        parts.append(torch.stack([size.take(unit), unit.double(), std.take(unit)]))
    return torch.cat(parts)


def _first_of(chosen: Tensor) -> Tensor:
    """The first `LISTED` places that are chosen, in order, float64 [LISTED]; NaN behind the last of them."""
    places = torch.arange(chosen.numel(), device=chosen.device, dtype=torch.float64)
    places = torch.where(chosen, places, torch.full_like(places, torch.inf))
    first = torch.topk(places, min(LISTED, places.numel()), largest=False, sorted=True).values
    first = torch.where(torch.isinf(first), torch.full_like(first, torch.nan), first)
    return torch.nn.functional.pad(first, (0, LISTED - first.numel()), value=torch.nan)
