"""The gradient of a linear layer from its two factors, without forming it.

For T tokens the gradient is G = δᵀX, so its rank is at most min(T, in, out).

- Up to rank 256 all singular values are found, in float64. With C_x C_xᵀ = X Xᵀ and likewise for δ they are those of
  the small C_δᵀC_x (Golub and Van Loan, Matrix Computations, 4th ed., §5.2; the MEND paper, arXiv 2110.11309, §3, uses
  the same rank-T form). C is the Cholesky factor of the Gram matrix where that is well enough conditioned, else the
  triangle of a QR factorisation, which is slower and always accurate.
- Beyond, a block Krylov space of 32 directions gives the leading ones (Musco and Musco, arXiv 1504.05477, algorithm 2),
  of which those are kept that its last block no longer changed; and the norm, exact within that space and estimated
  from 16 random directions outside of it (Hutch++: Meyer et al., arXiv 2010.09649).

- The norm alone needs none of this (`reduce_size`). Where the backward has formed this very product, and in fp32 or
  above, one read of it does. Else ‖δᵀX‖² = ⟨δδᵀ, XXᵀ⟩: Gram matrices in fp32 do, as long as the tokens' gradients don't
  cancel nearly all of each other and no square leaves fp32; else they are formed in float64.

`reduce_matrix` does the same for a gradient that is there as a matrix, such as a weight's `.grad`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Host
from stabilitylab.probes.gram import lower_gram, norm_of_product
from stabilitylab.probes.native_scan import FactorSeen, scan_factor, scan_whole
from stabilitylab.probes.weight_pass import as_array, count_nonfinite, extremes, is_within, on_cpu, wide_dtype
from stabilitylab.record.readings import Rebuild

EXACT_RANK = 256
"""The highest possible rank of a gradient whose singular values are all found."""

_BLOCK, _STEPS, _OUTSIDE = 8, 4, 16
_CONVERGED = 1e-5  # relative change by the last block; the error that is left is far below it
_LEAST_PIVOT = 3e-5  # of a Cholesky factor, against its row's norm: the singular values then keep six digits or more
_SPARSE = 0.75  # share of tokens with a δ below which dropping the others pays for itself
_READ = 6  # multiplications of a Gram matrix in the time that one entry of a gradient takes to be read
_UNCANCELLED = 1e-2  # of ‖X‖ ‖δ‖: a product in fp32 whose norm is larger has it to five digits
_SAFE = (1e-15, 1e15)  # largest entries of which no power that is formed here leaves the range of fp32 or fp64


@dataclass(frozen=True, kw_only=True)
class GradientSize:
    """Of one gradient G [out, in], all float64.

    norm: ‖G‖_F. zero_share: share of entries that are exactly 0 since their input or their output unit has only zeros;
    dead_share: share of input units that are 0 at every token. nonfinite: NaN or infinite entries of the two factors
    together. All but the norm are NaN where only that is known.
    """

    norm: float
    zero_share: float
    dead_share: float
    nonfinite: float


@dataclass(frozen=True, kw_only=True)
class GradientSpectrum(GradientSize):
    """The same with its singular values, float64.

    singular_values: descending, all min(T, in, out) of them where `exact`, else the leading ones that converged, at
    least one; NaN when a factor is not finite, empty where only the norm is known.
    """

    singular_values: Host
    exact: bool

    @property
    def top(self) -> float:
        """The largest singular value; NaN where none is known."""
        return float(self.singular_values[0]) if self.singular_values.size else float("nan")


_HEAD = 6
SIZE = 5
"""Where the packed values hold ‖X‖ ‖δ‖: no less than the gradient's norm, NaN or infinite where a factor is."""

NONFINITE = 0
"""Where they hold the number of entries that are NaN or infinite."""


def _unpack(values: Host, shape: tuple[int, int], rank: int, known: int | None) -> GradientSpectrum:
    """From what `reduce_factors` packed: a head of six numbers, and a matrix with G's singular values up to scale.

    rank: how many values there are; those beyond the matrix are 0. known: None where the matrix has all of them, else
    how many of its columns were there before the last block.
    """
    nonfinite, scale_x, scale_delta, zero_share, dead_share, _ = (float(value) for value in values[:_HEAD])
    core = values[_HEAD : _HEAD + shape[0] * shape[1]].reshape(shape)
    if nonfinite or not np.isfinite(core).all():
        lost = np.full(rank if known is None else 1, np.nan)
        return GradientSpectrum(
            singular_values=lost,
            norm=float("nan"),
            exact=known is None,
            zero_share=zero_share,
            dead_share=dead_share,
            nonfinite=nonfinite,
        )
    found = _singular_values(core)
    squares, residual = float(np.sum(found**2)), 0.0
    if known is None:
        found = np.pad(found, (0, rank - found.size))
    else:
        residual = float(values[-1]) ** 2
        before = _singular_values(core[:, :known])
        same = np.abs(found[:_BLOCK] - before[:_BLOCK]) <= _CONVERGED * found[:_BLOCK]
        found = found[: max(int(np.argmin(same)) if not same.all() else same.size, 1)]
    # The scales are applied one after the other: their product alone may overflow where the result does not.
    return GradientSpectrum(
        singular_values=(found * scale_x) * scale_delta,
        norm=float((np.sqrt(squares + residual) * scale_x) * scale_delta),
        exact=known is None,
        zero_share=zero_share,
        dead_share=dead_share,
        nonfinite=nonfinite,
    )


def _unpack_size(values: Host) -> GradientSize:
    """From what `reduce_size` packed: the same head, and the norm up to scale."""
    nonfinite, scale_x, scale_delta, zero_share, dead_share, _, norm = (float(value) for value in values)
    norm = float("nan") if nonfinite else (norm * scale_x) * scale_delta
    return GradientSize(norm=norm, zero_share=zero_share, dead_share=dead_share, nonfinite=nonfinite)


def _singular_values(matrix: Host) -> Host:
    # torch, not NumPy: it keeps to the thread count that the user set, and a second pool would fight with theirs.
    found: Host = torch.linalg.svdvals(torch.from_numpy(np.ascontiguousarray(matrix))).numpy()
    return found


@dataclass(frozen=True)
class _Factor:
    """A factor [T, units] in fp32 or above, the power of two that it was divided by, and what was seen on the way.

    norm: its Frobenius norm before that, NaN or infinite where the factor is.
    """

    values: Tensor
    scale: Tensor
    norm: Tensor
    nonfinite: Tensor
    silent_share: Tensor
    """Share of units that are 0 at every token."""
    lives: Tensor | None = None
    """Bool [T], the tokens with an entry that is not 0; None where looking would be a wait."""


def _prepare(factor: Tensor) -> _Factor:
    wide, lives = factor.to(wide_dtype(factor)), None
    if on_cpu(wide):
        seen = scan_factor(wide)
        if seen is None:
            full = as_array(wide) != 0  # a third of the time that torch takes
            lives, speaks = torch.from_numpy(full.any(axis=1)), torch.from_numpy(full.any(axis=0))
            silent_share = 1 - speaks.double().mean()
            norm = torch.linalg.vector_norm(wide).double()
        else:
            lives, silent_share = seen.lives, torch.tensor(seen.silent_share, dtype=torch.float64)
            norm = torch.tensor(seen.norm, dtype=torch.float64)
        if is_within(norm, *_SAFE):  # then all entries are finite, and no power of them leaves the range
            return _Factor(wide, torch.ones_like(norm), norm, torch.zeros_like(norm), silent_share, lives)
    else:
        silent_share = 1 - (wide != 0).any(dim=0).double().mean()
    low, high = extremes(wide)
    largest = torch.maximum(low.abs(), high.abs())
    usable = (largest > 0) & torch.isfinite(largest)
    # A power of two: dividing by it rounds nothing, so that the smallest singular values stay those of the factor.
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    scale = torch.where(usable & torch.isfinite(power), power, torch.ones_like(power))
    # The values of a factor that is not finite are never used; LAPACK is only kept from choking on them.
    values = torch.where(usable, wide / scale.to(wide.dtype), torch.zeros_like(wide))
    norm = torch.linalg.vector_norm(values, dtype=torch.float64) * scale
    norm = torch.where(torch.isfinite(largest), norm, largest)
    return _Factor(values, scale, norm, count_nonfinite(wide, low, high), silent_share, lives)


def _compressed(factor: Tensor) -> Tensor:
    """C in float64 with C Cᵀ = F Fᵀ and at most T columns, for F [T, units]."""
    wide = factor.double()
    if wide.shape[1] <= wide.shape[0]:
        return wide
    if on_cpu(wide):
        gram = lower_gram(wide)
        lower, failed = torch.linalg.cholesky_ex(gram)
        # Cholesky does not mind rows of different size: each pivot counts against its own row's norm.
        kept = lower.diagonal() > _LEAST_PIVOT * gram.diagonal().sqrt()
        if not failed and bool(kept.all()):
            factor_of_gram: Tensor = lower
            return factor_of_gram
    triangle: Tensor = torch.linalg.qr(wide.T, mode="r").R
    return triangle.T


def _core(x: Tensor, delta: Tensor) -> Tensor:
    """A small float64 matrix with the singular values of δᵀX, at most 256 of them."""
    tokens = x.shape[0]
    core = _compressed(delta).T @ _compressed(x) if tokens <= EXACT_RANK else delta.double().T @ x.double()
    if max(core.shape) > 2 * min(core.shape):
        tall = core if core.shape[0] > core.shape[1] else core.T
        core = torch.linalg.qr(tall, mode="r").R
    return core


@functools.lru_cache(maxsize=16)
def _directions(units: int, count: int, device: torch.device) -> Tensor:
    """Fixed random directions [units, count], the same on every machine. Waits for an accelerator when they are new."""
    generator = torch.Generator().manual_seed(units)
    return torch.randn(units, count, generator=generator).to(device)


_Product = Callable[[Tensor], Tensor]


def _leading(forth: _Product, back: _Product, probes: Tensor) -> tuple[Tensor, Tensor]:
    """(R [32, 32] with the singular values of QᵀG for a block Krylov basis Q; the norm of G outside of Q).

    forth, back: V ↦ GV and V ↦ GᵀV. probes: random directions [in, 24].
    """
    image = forth(probes)
    block, outside = image[:, :_BLOCK], image[:, _BLOCK:]
    basis = torch.linalg.qr(block).Q
    rows = [back(basis)]
    for _ in range(_STEPS - 1):
        block = forth(rows[-1])
        for _ in range(2):  # twice is enough: Parlett, The Symmetric Eigenvalue Problem, §6.9
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        rows.append(back(block))
        basis = torch.cat([basis, block], dim=1)
    outside = outside - basis @ (basis.T @ outside)
    triangle = torch.linalg.qr(torch.cat(rows, dim=1).double(), mode="r").R
    return triangle, torch.linalg.vector_norm(outside.double()) / math.sqrt(_OUTSIDE)


def _packed(
    head: Tensor,
    rank: int,
    exact: Callable[[], Tensor] | None,
    forth: _Product,
    back: _Product,
    like: Tensor,
    size: Callable[[], Tensor | None] = lambda: None,
) -> tuple[Tensor, Rebuild[GradientSpectrum]]:
    """All singular values from the matrix that `exact` makes, or the leading ones. like: [.., in], of G's dtype. size:
    gives what `reduce_size` packs, where that holds the norm and no estimate.
    """
    if exact is not None:
        core = exact()
        shape = (core.shape[0], core.shape[1])
        return torch.cat([head, core.reshape(-1)]), functools.partial(_unpack, shape=shape, rank=rank, known=None)
    probes = _directions(like.shape[1], _BLOCK + _OUTSIDE, like.device).to(like.dtype)
    triangle, outside = _leading(forth, back, probes)
    known = size()
    if known is not None:
        outside = (known[-1].square() - triangle.double().square().sum()).clamp_min(0).sqrt()
    shape = (triangle.shape[0], triangle.shape[1])
    packed = torch.cat([head, triangle.reshape(-1), outside.reshape(1)])
    return packed, functools.partial(_unpack, shape=shape, rank=rank, known=(_STEPS - 1) * _BLOCK)


def norm_of(packed: Tensor) -> Tensor:
    """‖G‖_F of what was packed, spectrum or size, as a scalar on its device; 0 where a factor is not finite."""
    norm: Tensor = (torch.linalg.vector_norm(packed[_HEAD:]) * packed[1]) * packed[2]
    return norm


@torch.no_grad()
def reduce_factors(x: Tensor, delta: Tensor, product: Tensor | None = None) -> tuple[Tensor, Rebuild[GradientSpectrum]]:
    """What `GradientSpectrum` is made from as one float64 tensor on the factors' device, and how to make it.

    x: [..., in], the layer's input. delta: [..., out], the loss's gradient at its output. All leading dimensions are
    tokens and agree in number. Raises ValueError when they do not, or when there is none. product: see `reduce_size`;
    beyond rank 256 the norm is no estimate then.
    """
    size = functools.partial(_size_of_product, x, delta, product)
    return _reduced(_speaking(_both(x, delta)), size)


@torch.no_grad()
def reduce_size(x: Tensor, delta: Tensor, product: Tensor | None = None) -> tuple[Tensor, Rebuild[GradientSize]]:
    """What `GradientSize` is made from, likewise, for a fraction of the work.

    product: Xᵀδ [in, out] as a backward has formed it, if it did. Without one that can be used the norm is beyond rank
    256 an estimate that the leading singular values are a part of: they come along.
    """
    size = _size_of_product(x, delta, product)
    if size is not None:
        return size, _unpack_size
    both = _both(x, delta)
    if both.rank > EXACT_RANK:
        both = _speaking(both)
        if both.left.shape[0] > EXACT_RANK:
            return _reduced(both)
    left, right = both.left, both.right
    (tokens, outputs), inputs = left.shape, right.shape[1]
    if tokens * (outputs + inputs) <= outputs * inputs or tokens <= EXACT_RANK:
        norm = norm_of_product(left, right, both.lives)
    else:
        norm = torch.linalg.vector_norm(left.double().T @ right.double())
    return torch.cat([both.head, norm.reshape(1)]), _unpack_size


def _size_of_product(x: Tensor, delta: Tensor, product: Tensor | None) -> Tensor | None:
    """The same numbers, the norm from one read; None where that is not as good, or takes longer.

    On an accelerator it would be a wait to find that out.
    """
    if product is None:
        return None
    x, delta = x.detach().reshape(-1, x.shape[-1]), delta.detach().reshape(-1, delta.shape[-1])
    (tokens, inputs), outputs = x.shape, delta.shape[1]
    whole = product if product.is_contiguous() else product.T
    is_exact = torch.get_float32_matmul_precision() == "highest" or product.dtype == torch.float64
    if (
        delta.shape[0] != tokens
        or product.shape != (inputs, outputs)
        or type(product) is not Tensor
        or product.dtype != wide_dtype(product)
        or not is_exact
        or tokens * tokens * (inputs + outputs) < _READ * inputs * outputs
    ):
        return None
    seen, other = scan_factor(x), scan_factor(delta)
    if seen is None or other is None or not all(_SAFE[0] < each.norm < _SAFE[1] for each in (seen, other)):
        return None
    read, size = scan_whole(whole), seen.norm * other.norm
    norm = math.nan if read is None else math.sqrt(read.square)
    if not _UNCANCELLED * size < norm < math.inf:
        return None
    zero_share = 1 - (1 - seen.silent_share) * (1 - other.silent_share)
    return torch.tensor([0.0, 1.0, 1.0, zero_share, seen.silent_share, size, norm], dtype=torch.float64)


@dataclass(frozen=True)
class _Both:
    """left: δ [T, out]. right: X [T, in]. Both finite, and scaled as the head says. rank: the highest possible of δᵀX.

    lives: bool [T], the tokens that have a δ; None where looking would be a wait, or all that are left have one.
    """

    head: Tensor
    left: Tensor
    right: Tensor
    rank: int
    lives: Tensor | None


def _both(x: Tensor, delta: Tensor) -> _Both:
    x, delta = x.detach().reshape(-1, x.shape[-1]), delta.detach().reshape(-1, delta.shape[-1])
    if x.shape[0] != delta.shape[0]:
        raise ValueError(f"the factors have {x.shape[0]} and {delta.shape[0]} tokens; expected as many in both")
    if x.shape[0] == 0:
        raise ValueError("the factors have no tokens; expected at least one")
    right, left = x.to(wide_dtype(x)), delta.to(wide_dtype(delta))
    a, d = _plain(right), _plain(left)
    if a is not None and d is not None:  # as they mostly are: then what is said of them are a few numbers
        zero_share = 1 - (1 - a.silent_share) * (1 - d.silent_share)
        head = torch.tensor([0.0, 1.0, 1.0, zero_share, a.silent_share, a.norm * d.norm], dtype=torch.float64)
        lives: Tensor | None = d.lives
    else:
        head, right, left, lives = _scaled(right, left)
    return _Both(head, left, right, min(left.shape[0], left.shape[1], right.shape[1]), lives)


def _speaking(both: _Both) -> _Both:
    """Only the tokens that have a δ: the others, such as each row's last, add nothing and make Gram matrices singular.

    Beyond the rank whose spectrum is exact only where they are so few that a copy is worth its time by itself.
    """
    rows = both.lives
    if rows is None:
        return both
    count = int(rows.sum())
    most = rows.numel() - 1 if both.rank <= EXACT_RANK else _SPARSE * rows.numel()
    if not 0 < count <= most:
        return both
    return replace(both, left=both.left[rows], right=both.right[rows], lives=None)


def _plain(factor: Tensor) -> FactorSeen | None:
    """What one native look at a factor says; None where there is none, or its size is none that can be squared."""
    seen = scan_factor(factor) if on_cpu(factor) else None
    least, most = _SAFE
    return seen if seen is not None and least < seen.norm < most else None


def _scaled(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(head, X and δ scaled as it says, the tokens that have a δ)."""
    a, d = _prepare(x), _prepare(delta)
    zero_share = 1 - (1 - a.silent_share) * (1 - d.silent_share)
    size = a.norm * d.norm
    head = torch.stack([a.nonfinite + d.nonfinite, a.scale, d.scale, zero_share, a.silent_share, size])
    return head, a.values, d.values, d.lives


def _reduced(both: _Both, size: Callable[[], Tensor | None] = lambda: None) -> tuple[Tensor, Rebuild[GradientSpectrum]]:
    left, right = both.left, both.right
    return _packed(
        both.head,
        both.rank,
        (lambda: _core(right, left)) if min(both.rank, left.shape[0]) <= EXACT_RANK else None,
        # From the left: to multiply a transposed factor with few columns takes BLAS four times as long.
        lambda directions: ((directions.T @ right.T) @ left).T,
        lambda directions: ((directions.T @ left.T) @ right).T,
        right,
        size,
    )


@torch.no_grad()
def reduce_matrix(gradient: Tensor) -> tuple[Tensor, Rebuild[GradientSpectrum]]:
    """The same of a gradient [out, in] that is there itself. `nonfinite` counts its own entries.

    All singular values are found where the smaller side is at most 256.
    """
    head, values = _alone(gradient)
    tall = values if values.shape[0] >= values.shape[1] else values.T
    rank = min(values.shape)
    return _packed(
        head,
        rank,
        (lambda: torch.linalg.qr(tall.double(), mode="r").R) if rank <= EXACT_RANK else None,
        lambda directions: values @ directions,
        lambda directions: values.T @ directions,
        values,
    )


@torch.no_grad()
def reduce_matrix_size(gradient: Tensor) -> tuple[Tensor, Rebuild[GradientSize]]:
    """What `GradientSize` is made from, of a gradient [out, in] that is there itself."""
    head, values = _alone(gradient)
    norm = torch.linalg.vector_norm(values, dtype=torch.float64)
    return torch.cat([head, norm.reshape(1)]), _unpack_size


def _alone(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(head, the gradient's values, scaled as it says)."""
    whole = _prepare(gradient.detach())
    values = whole.values
    silent_rows = 1 - (values != 0).any(dim=1).double().mean()
    zero_share = 1 - (1 - whole.silent_share) * (1 - silent_rows)
    one = torch.ones_like(whole.scale)
    return torch.stack([whole.nonfinite, whole.scale, one, zero_share, whole.silent_share, whole.norm]), values
