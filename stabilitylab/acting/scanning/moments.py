"""Square matrices that an editor inverts or projects with: second moments of keys, projections, sums of edited keys."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from stabilitylab.acting.scanning.statistics import units_where
from stabilitylab.record.scanned import MomentScan, Some

WIDEST: Final = 8192
"""The widest matrix whose eigenvalues, or whose square, are formed: minutes on a CPU, growing with the cube."""
PROBES: Final = 64
"""Random vectors that stand for the square of a wider one: ‖P² − P‖ within about a tenth."""


def measure_moments(name: str, matrix: Tensor, tokens: float | None, layer: str = "") -> MomentScan:
    """Of second moments C [inputs, inputs], the mean over so many tokens."""
    wide, bad, zero, apart = _symmetrised(matrix)
    size = wide.shape[0]
    rank = condition = least = greatest = None
    if not bad and size <= WIDEST:
        values = torch.linalg.eigvalsh(wide)
        least, greatest = float(values[0]), float(values[-1])
        eps = torch.finfo(matrix.dtype if matrix.is_floating_point() else torch.float64).eps
        rank = int((values > greatest * size * eps).sum()) if greatest > 0 else 0
        condition = greatest / least if least > 0 else math.inf
    return MomentScan(
        "moments", name, size, _dtype(matrix), tokens, rank, condition, least, greatest, bad, zero, apart, layer=layer
    )


def measure_projection(name: str, matrix: Tensor) -> MomentScan:
    """Of AlphaEdit's P [inputs, inputs]. rank: its trace, the directions that it leaves free."""
    wide, bad, zero, apart = _symmetrised(matrix)
    return MomentScan(
        "projection",
        name,
        wide.shape[0],
        _dtype(matrix),
        rank=None if bad else round(float(wide.diagonal().sum())),
        nonfinite=bad,
        zero_rows=zero,
        asymmetry=apart,
        idempotence=None if bad else idempotence(wide),
    )


def measure_cache(name: str, matrix: Tensor) -> MomentScan:
    """Of AlphaEdit's ``cache_c``, Σ k kᵀ [inputs, inputs] over the keys that were edited. It is empty where all rows
    are zero.
    """
    wide, bad, zero, apart = _symmetrised(matrix)
    return MomentScan("cache", name, wide.shape[0], _dtype(matrix), nonfinite=bad, zero_rows=zero, asymmetry=apart)


def idempotence(matrix: Tensor) -> float:
    """‖P² − P‖ / ‖P‖ in the Frobenius norm; 0 of zeros. Beyond `WIDEST` an estimate: E‖A x‖² is ‖A‖² for Gaussian x."""
    wide = matrix.double()
    norm = float(torch.linalg.matrix_norm(wide))
    if norm == 0.0:
        return 0.0
    if wide.shape[0] <= WIDEST:
        return float(torch.linalg.matrix_norm(wide @ wide - wide)) / norm
    drawn = torch.randn(wide.shape[0], PROBES, dtype=wide.dtype, generator=torch.Generator().manual_seed(0))
    once = wide @ drawn
    return float(torch.linalg.matrix_norm(wide @ once - once)) / math.sqrt(PROBES) / norm


def _dtype(matrix: Tensor) -> str:
    return str(matrix.dtype).removeprefix("torch.")


def _symmetrised(matrix: Tensor) -> tuple[Tensor, int, Some, float | None]:
    """(float64, (C + Cᵀ) / 2; entries that are not finite; rows of zeros; ‖C − Cᵀ‖ / ‖C‖)."""
    wide = matrix.detach().double().cpu()
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        return wide, bad, Some(), None
    zero = (wide == 0).all(dim=1)
    norm = float(torch.linalg.matrix_norm(wide))
    apart = float(torch.linalg.matrix_norm(wide - wide.T)) / norm if norm > 0 else 0.0
    return (wide + wide.T) / 2, 0, units_where(zero, wide.diagonal()), apart
