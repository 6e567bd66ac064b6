"""The linear system that an editor solves (MEMIT, MALMEN, AlphaEdit): how well it is posed, and how well it was solved.

``torch.linalg.solve`` returns numbers for a matrix that is singular to working precision, without an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.probes.weight_pass import unit
from stabilitylab.record.readings import Metric

EXACT_WIDTH = 512
"""The widest matrix whose singular values are all computed, on a CPU; elsewhere the outer two are estimated."""

STEPS = 20
"""Steps of each iteration of an estimate. Fixed: to look at its progress would be to wait for an accelerator."""

_COLUMNS = 256  # of the solution at once
_CONDITION = "Golub and Van Loan, Matrix Computations, 4th ed., §2.6.2"

E = TypeVar("E", bound="Extremes")


@dataclass(frozen=True)
class Extremes:
    """top, least: the largest and the smallest singular value of a matrix, float64; NaN when it is not finite."""

    top: float
    least: float

    @classmethod
    def from_host(cls: type[E], values: Host) -> E:
        """From [σ_max, σ_min]."""
        return cls(float(values[0]), float(values[1]))

    @property
    def condition(self) -> float:
        """σ_max / σ_min; infinite where σ_min is 0, for a matrix of zeros too."""
        return float("inf") if self.least == 0 else self.top / self.least


@dataclass(frozen=True)
class CovarianceExtremes(Extremes):
    """Of the covariance of an edited layer's keys."""


@dataclass(frozen=True)
class SystemExtremes(Extremes):
    """Of the matrix A of a system A X = B that the editor solved."""


@dataclass(frozen=True)
class SolveResidual:
    """residual: ‖A X − B‖. right_side: ‖B‖. Frobenius norms, formed in float64."""

    residual: float
    right_side: float

    @classmethod
    def from_host(cls, values: Host) -> SolveResidual:
        """From [‖A X − B‖, ‖B‖]."""
        return cls(float(values[0]), float(values[1]))


def _square(matrix: Tensor) -> Tensor:
    """A square matrix with the same singular values: itself, or the R of a QR decomposition."""
    rows, columns = matrix.shape
    if rows == columns:
        return matrix
    triangle: Tensor = torch.linalg.qr(matrix if rows > columns else matrix.T, mode="r").R
    return triangle


def _estimated(matrix: Tensor) -> Tensor:
    """[σ_max, σ_min] of a square, finite matrix of entries up to 1, by power and inverse iteration on AᵀA."""
    # As good as random, made on the device, and without a draw from the user's generator.
    start = torch.cos(torch.arange(1, matrix.shape[0] + 1, device=matrix.device, dtype=matrix.dtype).square())
    factors, pivots, failed = torch.linalg.lu_factor_ex(matrix)
    high = low = unit(start)[:, None]
    top = grown = torch.zeros((), device=matrix.device, dtype=matrix.dtype)
    for _ in range(STEPS):
        image = matrix @ high
        top = torch.linalg.vector_norm(image)
        high = unit(matrix.T @ image)
        image = torch.linalg.lu_solve(factors, pivots, low, adjoint=True)
        grown = torch.linalg.vector_norm(image)
        low = unit(torch.linalg.lu_solve(factors, pivots, image / grown))
    singular = (failed != 0) | ~torch.isfinite(grown)
    return torch.stack([top, torch.where(singular, torch.zeros_like(grown), 1 / grown)])


@torch.no_grad()
def reduce_extremes(matrix: Tensor) -> Tensor:
    """[σ_max, σ_min] of a matrix, float64 on its device; NaN when it has a NaN or infinite entry.

    Exact, by all singular values in float64, on a CPU up to a shorter side of `EXACT_WIDTH`. Above that, and on an
    accelerator, an estimate by `STEPS` steps of power iteration for σ_max (never too large; in trials up to 4 % too
    small) and of inverse iteration through an LU factorisation for σ_min (never too small; up to 4 % too large): so κ
    is a lower bound, up to rounding. A σ_min below 10⁻¹⁶ σ_max is rounding in either. Raises ValueError for what is no
    matrix, or empty.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"a tensor of shape {list(matrix.shape)}; expected a matrix that is not empty")
    wide = matrix.detach().double()
    largest = wide.abs().amax()
    usable = torch.isfinite(largest)
    scale = torch.where(usable & (largest > 0), largest, torch.ones_like(largest))
    # LAPACK is kept from choking on what is not finite; where it is not, the answer is NaN.
    scaled = torch.where(usable, wide, torch.zeros_like(wide)) / scale
    if matrix.device.type == "cpu" and min(matrix.shape) <= EXACT_WIDTH:
        values = torch.linalg.svdvals(scaled)
        outer = torch.stack([values[0], values[-1]])
    else:
        outer = _estimated(_square(scaled))
    return torch.where(usable, outer * scale, torch.full_like(outer, torch.nan))


@torch.no_grad()
def reduce_residual(system: Tensor, solution: Tensor, right_side: Tensor) -> Tensor:
    """[‖A X − B‖, ‖B‖] in float64 on the system's device.

    system A: [n, k]. solution X, right_side B: [k, m] and [n, m], or [k] and [n]. Raises ValueError when they don't
    fit, or are empty.
    """
    width = solution.shape[1:]
    fit = (*system.shape[:1], *width) == tuple(right_side.shape) and system.shape[1:] == solution.shape[:1]
    if system.dim() != 2 or len(width) > 1 or not fit or 0 in (solution.numel(), right_side.numel()):
        raise ValueError(
            f"A {list(system.shape)}, X {list(solution.shape)}, B {list(right_side.shape)}; expected [n, k], [k, m] "
            "and [n, m], or vectors for the latter two, and not empty"
        )
    wide = system.detach().double()
    x = solution.detach().reshape(solution.shape[0], -1)
    b = right_side.detach().reshape(right_side.shape[0], -1)
    parts = []
    for sought, given in zip(torch.split(x, _COLUMNS, 1), torch.split(b, _COLUMNS, 1), strict=True):
        right = given.to(wide.device, torch.float64)
        left = torch.addmm(right, wide, sought.to(wide.device, torch.float64), beta=-1)
        parts.append(torch.stack([torch.linalg.vector_norm(left), torch.linalg.vector_norm(right)]))
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms


class CovarianceCondition(Probe[CovarianceExtremes]):
    """How well the covariance of an edited layer's keys can be inverted."""

    tier = "deep"
    needs = CovarianceExtremes
    metrics = (
        Metric(
            "editor.covariance_condition",
            "1",
            "log",
            "before",
            "How much an inversion of the keys' covariance magnifies errors. From 10⁷ on an inverse in fp32 is noise; "
            "huge or infinite with fewer keys than the layer has inputs. Above 512 wide a lower bound.",
            "σ_max(C) / σ_min(C)",
            _CONDITION,
        ),
    )

    def compute(self, seen: CovarianceExtremes) -> Readings:
        """Infinite for a singular matrix."""
        return {"editor.covariance_condition": seen.condition}


class SystemCondition(Probe[SystemExtremes]):
    """How well the editor's linear system is posed."""

    tier = "deep"
    needs = SystemExtremes
    metrics = (
        Metric(
            "editor.system_condition",
            "1",
            "log",
            "during",
            "How much the solve magnifies errors in its right side. From 10⁷ on a solve in fp32 is noise; huge or "
            "infinite for a singular matrix, which no exception tells of. Above 512 wide a lower bound.",
            "σ_max(A) / σ_min(A)",
            _CONDITION,
        ),
    )

    def compute(self, seen: SystemExtremes) -> Readings:
        """Infinite for a singular matrix."""
        return {"editor.system_condition": seen.condition}


class SystemResidual(Probe[SolveResidual]):
    """How well the editor's linear system was solved."""

    tier = "deep"
    needs = SolveResidual
    metrics = (
        Metric(
            "editor.solve_residual",
            "1",
            "log",
            "during",
            "What the solution leaves of the right side: about 10⁻⁷ for a sound solve in fp32, 1 for none at all. "
            "Absent when the right side is zero.",
            "‖A X − B‖_F / ‖B‖_F",
            "Golub and Van Loan, Matrix Computations, 4th ed., §3.5",
        ),
    )

    def compute(self, seen: SolveResidual) -> Readings:
        """Left out where B is zero."""
        return {} if seen.right_side == 0 else {"editor.solve_residual": seen.residual / seen.right_side}
