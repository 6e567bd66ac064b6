"""The gradient that the loop itself steps with: what a weight's `.grad` holds when the optimizer, or the edit, uses it.

It is not always what one pass's factors give: a loss scale, accumulation over micro-batches, several passes, a shared
weight, a layer that computes with another weight than its own, an all-reduce and clipping all change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.gradient_factors import GradientSize, GradientSpectrum, reduce_matrix, reduce_matrix_size
from stabilitylab.probes.gradient_passes import LaterPasses
from stabilitylab.probes.weight_pass import on_cpu, safe_norm, wide_dtype
from stabilitylab.record.readings import Rebuild

FACTORS, STEP, END, SCALED_FACTORS, PARTS = 0.0, 1.0, 2.0, 3.0, 4.0
"""Where a layer's gradient was read, as `gradient.source` codes it: from the factors of its first pass; from `.grad` at
an optimizer's step; from `.grad` as the backward left it, where no optimizer stepped; from factors in float16, which
may hold a loss scale that nobody told of; from the factors, of a weight that is made of parts, such as an adapter's, of
which an optimizer stepped some."""

AGREES = 0.01
"""Two norms of one gradient may differ by so much, relatively: it is kept in the weight's dtype, and bfloat16 has eight
bits. A bias-free difference is far below it, and every other kind of gradient far above."""


@dataclass(frozen=True, kw_only=True)
class AccumulatedGradient:
    """What `.grad` of one weight held in one edit, each time that it was used. All float64.

    source: one of the codes above. norms: ‖.grad‖_F at each use, before clipping and without the loss scale; NaN or
    infinite where an entry is; empty where nothing was accumulated. stepped: the same as the optimizer got it, after
    clipping; empty where none stepped. scales: the loss scale that was divided out of each, 1 where none is known.
    carried: how many steps used what a step had used already. learning_rate: the largest that an optimizer stepped
    with, or NaN if one was; None where none is known. ascends: whether it maximises, and stepped up the gradient.
    """

    source: float
    norms: Host
    stepped: Host
    scales: Host
    carried: float
    learning_rate: float | None
    ascends: bool = False

    @property
    def is_used(self) -> bool:
        """Whether this, and not the factors, is what the loop steps with."""
        return self.source in (STEP, END)

    @property
    def nonfinite(self) -> int:
        """How many uses held a NaN or an infinity."""
        return int(np.count_nonzero(~np.isfinite(self.norms)))

    @property
    def worst(self) -> int:
        """Which use was worst: the first that is not finite, else the largest."""
        bad = np.flatnonzero(~np.isfinite(self.norms))
        return int(bad[0]) if bad.size else int(np.argmax(self.norms))


@torch.no_grad()
def gradient_norm(gradient: Tensor) -> Tensor:
    """‖gradient‖_F as a float64 scalar, formed in fp32 or above."""
    return safe_norm(gradient.detach().to(wide_dtype(gradient)))


@dataclass
class Use:
    """One use of `.grad`: its norm as a backward left it, None where that was not seen; as the optimizer got it, None
    where none stepped; and the loss scale that the former holds, None where none is known. Scalars on the device.
    """

    before: Tensor | None
    stepped: Tensor | None = None
    scale: Tensor | None = None


def _of(use: Use) -> tuple[Tensor, Tensor, Tensor]:
    known = use.stepped if use.before is None else use.before
    assert known is not None
    scale = torch.ones_like(known) if use.scale is None else use.scale.detach().double().reshape(()).to(known.device)
    if use.before is None:
        return known, known, scale
    stepped = torch.full_like(known, float("nan")) if use.stepped is None else use.stepped
    return known / scale, stepped, scale


def reduce_uses(
    uses: Sequence[Use], source: float, carried: int = 0, learning_rate: float | None = None, ascends: bool = False
) -> tuple[Tensor, Rebuild[AccumulatedGradient]]:
    """What `AccumulatedGradient` is made from as one float64 tensor, and how to make it."""
    packed = torch.stack([value for use in uses for value in _of(use)]) if uses else torch.empty(0, dtype=torch.float64)

    def rebuild(values: Host) -> AccumulatedGradient:
        norms, stepped, scales = values.reshape(-1, 3).T
        stepped = stepped if source == STEP else np.empty(0)
        return AccumulatedGradient(
            source=source,
            norms=norms,
            stepped=stepped,
            scales=scales,
            carried=carried,
            learning_rate=learning_rate,
            ascends=ascends,
        )

    return packed, rebuild


def needs_matrix(gradient: Tensor, norm: Tensor, factors: Tensor | None, is_plain: bool) -> bool:
    """Whether the spectrum of `gradient` must be found from it itself, and not from the first pass's factors.

    norm: its own. factors: that of the factors, under the same loss scale. is_plain: whether the layer was passed once
    and forms plain products; on an accelerator that decides, where comparing would have to wait.
    """
    if factors is None:
        return True
    return not bool((factors - norm).abs() <= AGREES * norm) if on_cpu(gradient) else not is_plain


def reduce_used(gradient: Tensor, transposed: bool, with_spectrum: bool = True) -> tuple[Tensor, Rebuild[Any]]:
    """The spectrum of `.grad` itself, or its size. transposed: whether it is [in, out]."""
    return (reduce_matrix if with_spectrum else reduce_matrix_size)(gradient.detach().T if transposed else gradient)


def _like(seen: GradientSize, norm: float) -> GradientSize:
    """`seen` at this norm: clipping and loss scales change a gradient's size alone."""
    if not isinstance(seen, GradientSpectrum):
        return replace(seen, norm=norm)
    if not np.isfinite(norm):
        return replace(seen, singular_values=np.full(1, np.nan), norm=norm)
    known = np.isfinite(seen.norm) and seen.norm > 0
    values = (seen.singular_values / seen.norm) * norm if known else np.zeros_like(seen.singular_values)
    return replace(seen, singular_values=values if known or norm == 0 else np.empty(0), norm=norm)


def _agree(factors: GradientSize, norm: float, scale: float) -> bool:
    return abs(factors.norm / scale - norm) <= AGREES * norm


def gradient_used(factors: GradientSize | None, used: AccumulatedGradient, matrix: GradientSize | None) -> GradientSize:
    """The gradient of an edit's first step: its norm from `used`, the rest from whatever shows it.

    factors: of the first pass. matrix: of `.grad` itself. Raises ValueError when neither factors nor `.grad` were used.
    """
    if not used.is_used:
        if factors is None:
            raise ValueError("a gradient needs its factors or what was accumulated; got neither")
        return _like(factors, factors.norm / float(used.scales[0])) if used.scales.size else factors
    norm = float(used.norms[0])
    if factors is not None and matrix is not None:
        # What is wrong with the factors, and which units are dead, only they can tell.
        matrix = replace(matrix, nonfinite=factors.nonfinite, dead_share=factors.dead_share)
    if matrix is not None:
        return _like(matrix, norm)
    if factors is None:
        return GradientSize(norm=norm, zero_share=np.nan, dead_share=np.nan, nonfinite=np.nan)
    if _agree(factors, norm, float(used.scales[0])) or not np.isfinite(norm):
        return _like(factors, norm)
    if isinstance(factors, GradientSpectrum):
        return replace(factors, singular_values=np.empty(0), norm=norm, exact=False)
    return replace(factors, norm=norm)


def passes_used(passes: LaterPasses, used: AccumulatedGradient) -> LaterPasses:
    """Last and worst are steps, not passes, where the loop's own gradient was seen; None where it took one step."""
    if not used.is_used:
        return passes
    if used.norms.size == 1:
        return replace(passes, last=None, worst=None)

    def at(step: int, factors: GradientSize | None) -> GradientSize:
        alone = replace(used, norms=used.norms[step : step + 1], scales=used.scales[step : step + 1])
        return gradient_used(factors, alone, None)

    return replace(passes, last=at(used.norms.size - 1, passes.last), worst=at(used.worst, passes.worst))
