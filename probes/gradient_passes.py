"""Several passes through one layer in an edit, and the angles between gradients, from their factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.gradient_factors import NONFINITE, SIZE, GradientSize, reduce_factors, reduce_size
from stabilitylab.probes.native_scan import scan_whole
from stabilitylab.probes.weight_pass import as_matrix, number_here, on_cpu, safe_norm, wide_dtype
from stabilitylab.record.readings import Rebuild

_ROWS_BYTES = 1 << 20
_MATRIX = 2  # dimensions


@dataclass(frozen=True)
class LaterPasses:
    """How many passes an edit made through a layer, how many were not finite, and its last and worst; float64.

    last, worst: None where there was one pass only, or where a factor of it was overwritten before the edit's end.
    """

    passes: float
    nonfinite_passes: float
    last: GradientSize | None = None
    worst: GradientSize | None = None


@dataclass(frozen=True)
class LaterSpectra(LaterPasses):
    """The same with the singular values of those two."""


@dataclass(frozen=True)
class Alignment:
    """Cosines of a gradient with that of the edit before and with the update; None where there is none."""

    previous: float | None
    update: float | None


@dataclass(frozen=True)
class Factors:
    """What a gradient δᵀX is made of. x: [tokens, in]. delta: [tokens, out].

    Both may share memory with tensors of the edit. versions: of these two when they were taken; None where it is known
    that nobody else writes to them.
    """

    x: Tensor
    delta: Tensor
    versions: tuple[int, int] | None = None

    @classmethod
    def of(cls, x: Tensor, delta: Tensor) -> Factors:
        """With all leading dimensions flattened to tokens. Both are without a graph."""
        x = x if x.dim() == _MATRIX else x.reshape(-1, x.shape[-1])
        delta = delta if delta.dim() == _MATRIX else delta.reshape(-1, delta.shape[-1])
        inference = x.is_inference() or delta.is_inference()
        return cls(x, delta, None if inference else (x._version, delta._version))

    @property
    def intact(self) -> bool:
        """Whether no operation has written to them since."""
        return self.versions is None or self.versions == (self.x._version, self.delta._version)


def _norm(factor: Tensor) -> Tensor:
    return safe_norm(factor.reshape(-1).to(wide_dtype(factor)))


def _size(now: Factors) -> Tensor | float:
    """‖X‖ ‖δ‖: a number where reading it waits for nothing, in one look at each."""
    if not on_cpu(now.delta):
        return _norm(now.x) * _norm(now.delta)
    x, delta = scan_whole(now.x), scan_whole(now.delta)
    return (number_here(_norm(now.x)) if x is None else math.sqrt(x.square)) * (
        number_here(_norm(now.delta)) if delta is None else math.sqrt(delta.square)
    )


class PassKeeper:
    """Counts the passes of one site in one edit, and holds on to the factors of the last and of the worst later one.

    Of the first pass only its reduction is kept, so that an edit with one pass holds no factors. Later ones cost two
    norms each, and two sizes or spectra at the end, however many there are. The worst is the first that is not finite,
    else that with the largest ‖X‖ ‖δ‖; on an accelerator, of those with as many tokens as the second.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._nonfinite: Tensor | None = None
        self._first: tuple[Tensor, Rebuild[Any]] | None = None
        self._last: Factors | None = None
        self._worst: Factors | None = None
        self._worst_size: Tensor | float | None = None

    def first(self, packed: Tensor, rebuild: Rebuild[Any]) -> None:
        """The first pass, as `reduce_factors` or `reduce_size` reduced it."""
        self.passes = 1
        self._first = packed, rebuild
        self._nonfinite = (packed[NONFINITE] > 0).double()

    def later(self, x: Tensor, delta: Tensor) -> None:
        """One more pass; its factors are without a graph."""
        self.passes += 1
        self._last = now = Factors.of(x, delta)
        size = _size(now)
        assert self._nonfinite is not None
        if isinstance(size, Tensor):
            self._nonfinite = self._nonfinite + torch.isfinite(size).logical_not().double()
        elif not math.isfinite(size):
            self._nonfinite = self._nonfinite + 1
        self._keep_worse(now, size)

    def _keep_worse(self, now: Factors, size: Tensor | float) -> None:
        if self._worst is None or self._worst_size is None:
            self._worst, self._worst_size = now, size
            return
        if not isinstance(size, Tensor) or not isinstance(self._worst_size, Tensor):
            worst = float(self._worst_size)
            if math.isfinite(worst) and not float(size) <= worst:
                self._worst, self._worst_size = now, size
            return
        worse = torch.isfinite(self._worst_size) & ~(size <= self._worst_size)
        if self._worst.intact and (now.x.shape, now.delta.shape) == (self._worst.x.shape, self._worst.delta.shape):
            # Which of the two it is must not be waited for: both are read, and one is written.
            x, delta = torch.where(worse, now.x, self._worst.x), torch.where(worse, now.delta, self._worst.delta)
            self._worst, self._worst_size = Factors(x, delta), torch.where(worse, size, self._worst_size)

    def reduce(self, with_spectra: bool = True) -> tuple[Tensor, Rebuild[LaterPasses]] | None:
        """What `LaterPasses` is made from, or `LaterSpectra`, as one float64 tensor, and how to make it; None where
        there was no pass.
        """
        made = LaterSpectra if with_spectra else LaterPasses
        if self._nonfinite is None or self._first is None:
            return None
        passes, head = float(self.passes), self._nonfinite.reshape(1)
        if self._last is None or self._worst is None or self._worst_size is None:
            return head, lambda values: made(passes, float(values[0]))
        last = _reduced(self._last, with_spectra)
        # Of growing gradients the last is the worst.
        worst = last if self._worst is self._last else _reduced(self._worst, with_spectra)
        parts = (self._first, last, worst)
        size_of_first = self._first[0][SIZE]
        sizes = torch.stack([size_of_first, torch.as_tensor(self._worst_size, dtype=size_of_first.dtype)])
        ends = np.cumsum([3, *(packed.numel() for packed, _ in parts)])

        def rebuild(values: Host) -> LaterPasses:
            first, last, worst = (
                make(values[start:stop]) for (_, make), start, stop in zip(parts, ends[:-1], ends[1:], strict=True)
            )
            first_size, worst_size = values[1], values[2]
            # The worst so far was the first pass: a later one must be worse to take its place.
            later_is_worse = np.isfinite(first_size) and not worst_size <= first_size
            return made(passes, float(values[0]), last, worst if later_is_worse else first)

        return torch.cat([head, sizes, *(packed for packed, _ in parts)]), rebuild

    @property
    def overwritten(self) -> bool:
        """Whether the last or the worst can't be told any more."""
        return any(kept is not None and not kept.intact for kept in (self._last, self._worst))


def _reduced(kept: Factors, with_spectra: bool) -> tuple[Tensor, Rebuild[GradientSize | None]]:
    if kept.intact:
        return (reduce_factors if with_spectra else reduce_size)(kept.x, kept.delta)
    return kept.delta.new_empty(0, dtype=torch.float64), lambda _: None


@torch.no_grad()
def inner_product(first: Factors, second: Factors) -> Tensor:
    """⟨δ₁ᵀX₁, δ₂ᵀX₂⟩ = Σ (δ₁δ₂ᵀ) ∘ (X₁X₂ᵀ) as a float64 scalar; no gradient is formed."""
    x, delta = first.x.double() @ second.x.double().T, first.delta.double() @ second.delta.double().T
    return torch.dot(x.reshape(-1), delta.reshape(-1))


@torch.no_grad()
def product_with_update(factors: Factors, weight: Tensor, previous: Tensor, transposed: bool) -> Tensor:
    """(⟨G, W − W₋⟩, ‖W − W₋‖) as a float64 tensor [2]. transposed: whether the weight is [in, out]."""
    live, past = as_matrix(weight), as_matrix(previous)
    left, right = (factors.x, factors.delta) if transposed else (factors.delta, factors.x)
    dtype, rows = wide_dtype(weight), max(1, _ROWS_BYTES // (live.shape[1] * 4))
    dots, norms = [], []
    for start in range(0, live.shape[0], rows):
        change = live[start : start + rows].to(dtype) - past[start : start + rows].to(dtype)
        part = left[:, start : start + rows].to(dtype)
        dots.append(((part @ change).double() * right.double()).sum())
        norms.append(safe_norm(change))
    return torch.stack([torch.stack(dots).sum(), torch.linalg.vector_norm(torch.stack(norms))])


def alignment_from(values: Host, has_previous: bool) -> Alignment:
    """From [‖G_t‖², ‖G_{t−1}‖², ⟨G_t, G_{t−1}⟩, ⟨G_t, ΔW⟩, ‖ΔW‖]; without a previous gradient its two are zero."""
    own, before, with_before, with_update, update = (float(value) for value in values)

    def cosine(product: float, square: float, other: float) -> float | None:
        # A square may come out below 0 by rounding where the gradient is 0; of what is not finite there is no angle.
        size = np.sqrt(max(square, 0.0)) * other if np.isfinite([square, other, product]).all() else 0.0
        return None if size == 0 else float(np.clip(product / size, -1.0, 1.0))

    return Alignment(
        cosine(with_before, own, np.sqrt(max(before, 0.0))) if has_previous else None, cosine(with_update, own, update)
    )
