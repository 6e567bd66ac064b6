"""F Fᵀ, and the inner product of two such matrices, for half of the work that full products take, or nearly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabilitylab.probes.native_scan import scan_grams, scan_product
from stabilitylab.probes.weight_pass import number_here, on_cpu

_LEAST_ROWS = 64  # of a block: smaller ones cost more in calls than they save
_BLOCKS = 4


def lower_gram(wide: Tensor, blocks: int = _BLOCKS) -> Tensor:
    """The lower triangle of F Fᵀ, and undefined values in some of the upper, for F [rows, columns].

    In blocks of rows, each with those before it: five eighths of the work for four blocks. BLAS's own rank-k update is
    not offered by torch.
    """
    rows = wide.shape[0]
    gram = wide.new_empty(rows, rows)
    step = max(-(-rows // blocks), _LEAST_ROWS)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.mm(wide[start:stop], wide[:stop].T, out=gram[start:stop, :stop])
    return gram


_TRUSTED = {torch.float32: 1e-3, torch.float64: 1e-10}
"""Share of (Σ ‖a_i‖ ‖b_i‖)² that ⟨AAᵀ, BBᵀ⟩ must reach: what is lost by rounding is a few 1e-7, or 1e-16, of that."""
_SAFE_SQUARES = (1e-30, 1e36)
"""Squares of rows' norms in here: no product of two rows of fp32 over- or underflows that would count."""


def norm_of_product(a: Tensor, b: Tensor, lives: Tensor | None = None) -> Tensor:
    """‖AᵀB‖_F = ⟨AAᵀ, BBᵀ⟩^½ as a float64 scalar, for A and B [rows, ..] in fp32 or fp64. lives: bool [rows], those of
    A that are not all 0, where that is known.

    On a CPU from Gram matrices in fp32 where those are good for five digits or more, natively unless BLAS has threads
    enough to be sooner, else in float64; where even that cancels, of the product itself. Small ones natively, in
    float64 at once. On an accelerator, where looking would be a wait, in float64.
    """
    if not on_cpu(a):
        square, _ = _inner(a.double(), b.double())
        return square.clamp_min(0).sqrt()
    seen = scan_product(a, b)
    if seen is not None and seen.square > _TRUSTED[torch.float64] * seen.bound**2:
        return torch.tensor(math.sqrt(seen.square), dtype=torch.float64)
    grams = scan_grams(a, b, lives)
    if grams is not None:
        least, most = _SAFE_SQUARES
        safe = least < grams.least and grams.most < most
        if safe and grams.square > _TRUSTED[torch.float32] * grams.bound**2:
            return torch.tensor(math.sqrt(grams.square), dtype=torch.float64)
    dtypes = [torch.float64]
    if grams is None and a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        dtypes.insert(0, torch.float32)
    for dtype in dtypes:
        square, sizes = _inner(a.to(dtype), b.to(dtype))
        sizes = sizes if lives is None else sizes[:, lives]  # what is 0 can't underflow
        narrow = dtype == torch.float32
        least, most = _SAFE_SQUARES if narrow else (0.0, math.inf)
        if not sizes.numel():
            return torch.zeros_like(square)
        low, high = map(number_here, torch.aminmax(sizes))
        bound = number_here(sizes.double().prod(dim=0).sqrt().sum()) ** 2
        if (least < low or not narrow) and high < most and number_here(square) > _TRUSTED[dtype] * bound:
            return square.sqrt()
    whole: Tensor = torch.linalg.vector_norm(a.double().T @ b.double())
    return whole


def _inner(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(the inner product, the squares of the rows' norms [2, rows]), by blocks of rows, each with those before it."""
    step = max(-(-a.shape[0] // _BLOCKS), _LEAST_ROWS)
    if a.shape[0] <= step:
        first, second = a @ a.T, b @ b.T
        return (first.double() * second.double()).sum(), torch.stack([first.diagonal(), second.diagonal()])
    total, sizes = a.new_zeros((), dtype=torch.float64), []
    for start in range(0, a.shape[0], step):
        grams = [part[start : start + step] @ part[: start + step].T for part in (a, b)]
        products = grams[0].double() * grams[1].double()
        total = total + 2 * products[:, :start].sum() + products[:, start:].sum()
        sizes.append(torch.stack([gram[:, start:].diagonal() for gram in grams]))
    return total, torch.cat(sizes, dim=1)
