"""The largest singular value of an edited weight, followed from edit to edit by a few products with it.

A short Lanczos process on WᵀW (Golub and Van Loan, Matrix Computations, 4th ed., §10.1) from the sum of the leading
direction which the last edit left *and* the leading direction of the update. Power iteration from a warm start alone is
wrong by half right after a sudden spike, whose direction can be orthogonal to the old one, and it misses for good a
direction that grows edit by edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.probes.weight_pass import as_matrix, on_cpu, unit
from stabilitylab.record.readings import Metric

STEPS = 12
"""The most products with WᵀW; on an accelerator, where looking at the value would be a wait, as many always."""

_QUIET, _SETTLED = 2, 1e-3  # stop after so many products in a row that change σ₁² by less than this; one may mislead
_WIDE, _POWER_STEPS = 256, 4
_SCATTER = 12.9898  # its multiples' sines are spread as if at random, and made on the device
_SMALL = 16  # sides up to which a full decomposition is the simplest way to start
_TOLERANCE = 1e-4  # ‖WᵀWv − σ²v‖ against σ² at the very start: the error of σ goes with its square
_SQUARINGS = 7  # the 128th power: leaves of a second eigenvalue that is 5 % smaller a thousandth
_ROWS_BYTES = 1 << 19  # of W at once: both products with it are made while it is in the cache
_DEVICE_ROWS_BYTES = 1 << 24


@dataclass(frozen=True)
class TopSingular:
    """spectral_norm: σ₁(W). norm: ‖W‖_F. Both float64, NaN when W is not finite."""

    spectral_norm: float
    norm: float

    @classmethod
    def from_host(cls, values: Host) -> TopSingular:
        """From [σ₁, ‖W‖]."""
        return cls(float(values[0]), float(values[1]))


def _product(weight: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """WᵀW v / scale² in the dtype of v [columns]; the entries of W are thought divided by the scale."""
    rows = max(1, (_ROWS_BYTES if on_cpu(weight) else _DEVICE_ROWS_BYTES) // (weight.shape[1] * 4))
    out, v = torch.zeros_like(v), v / scale
    for live in torch.split(weight, rows):
        block = live.to(v.dtype)
        out.addmv_(block.T, block @ v)
    return out / scale


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(largest eigenvalue, its eigenvector) of a small symmetric positive matrix, by repeated squaring.

    A solver would make the host wait for an accelerator.
    """
    power = matrix
    for _ in range(_SQUARINGS):
        power = power / power.diagonal().sum().clamp_min(torch.finfo(power.dtype).tiny)
        power = power @ power
    # By `index_select`: to index with a scalar tensor is to ask for its value.
    vector = unit(power.index_select(1, power.diagonal().argmax().reshape(1))[:, 0])
    return vector @ matrix @ vector, vector


@torch.no_grad()
def start_direction(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(σ₁, its right singular vector) of a weight, once: float64 scalar and float32 [columns].

    By Lanczos (ARPACK through SciPy) on the host; waits for an accelerator. A zero or non-finite weight gives 0 or NaN
    and an even direction.
    """
    matrix = as_matrix(weight).to("cpu", torch.float64, copy=True).numpy()  # one copy of it, and no more
    columns = matrix.shape[1]
    found, direction = 0.0, np.full(columns, columns**-0.5)
    size = float(np.maximum(-matrix.min(), matrix.max()))
    if not np.isfinite(size):
        found = np.nan
    elif min(matrix.shape) <= _SMALL:
        _, values, rows = np.linalg.svd(matrix, full_matrices=False)
        found, direction = float(values[0]), rows[0]
    elif size > 0:
        scaled = np.divide(matrix, size, out=matrix)
        small = scaled if matrix.shape[0] < columns else scaled.T  # both ways through the shorter side
        operator = LinearOperator((small.shape[0],) * 2, matvec=lambda u: small @ (u @ small), dtype=np.float64)
        even = np.full(small.shape[0], small.shape[0] ** -0.5)
        squares, vectors = eigsh(operator, k=1, v0=even, tol=_TOLERANCE)
        found = float(np.sqrt(max(squares[0], 0.0))) * size
        direction = vectors[:, 0] @ scaled if matrix.shape[0] < columns else vectors[:, 0]
        direction = direction / np.linalg.norm(direction)
    return (
        torch.tensor(found, dtype=torch.float64, device=weight.device),
        torch.from_numpy(np.ascontiguousarray(direction)).to(weight.device, torch.float32),
    )


def any_direction(columns: int, device: torch.device) -> Tensor:
    """A direction to start from where none is known: float32 [columns], the same at each call."""
    return unit(torch.arange(1, columns + 1, device=device).mul(_SCATTER).sin())


@torch.no_grad()
def update_direction(change: Tensor) -> Tensor:
    """Nearly the leading right singular vector of an update: float32 [columns].

    change: the update [rows, columns], or the rows of it that moved most. A zero one gives no direction: zeros.
    """
    change = change.float() / change.abs().amax().clamp_min(torch.finfo(torch.float32).tiny).float()
    if min(change.shape) > _WIDE:  # a whole update, on an accelerator: a Gram matrix would cost more than the edit
        v = any_direction(change.shape[1], change.device)
        for _ in range(_POWER_STEPS):
            v = unit(change.T @ (change @ unit(v)))
        return v
    if change.shape[0] > change.shape[1]:
        return _leading((change.T @ change).double())[1].float()
    return unit(_leading((change @ change.T).double())[1].float() @ change)


@torch.no_grad()
def follow(weight: Tensor, directions: tuple[Tensor, Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
    """(σ₁ as a float64 scalar, its right singular vector [columns] in fp32), from two directions [columns] to start.

    size: a scale to divide by, so that squares of huge or tiny weights stay in range.
    """
    live, old = as_matrix(weight), unit(directions[0])
    new = unit(directions[1] - torch.dot(old, directions[1]) * old)
    basis = unit(old + new)[None]
    limit = min(STEPS, live.shape[1])
    small = torch.zeros(limit, limit, dtype=torch.float64, device=live.device)
    value, weights, quiet = small.new_zeros(()), small.new_ones(1), 0
    for step in range(1, limit + 1):
        image = _product(live, basis[-1], size)
        small[:step, step - 1] = small[step - 1, :step] = (basis @ image).double()
        before = value
        if on_cpu(live) or step == limit:
            value, weights = _leading(small[:step, :step])
        quiet = quiet + 1 if on_cpu(live) and bool((value - before).abs() <= _SETTLED * value) else 0
        if quiet == _QUIET or step == limit:
            break
        for _ in range(2):  # twice is enough: Parlett, The Symmetric Eigenvalue Problem, §6.9
            image = image - (basis @ image) @ basis
        basis = torch.cat([basis, unit(image)[None]])
    return value.clamp_min(0).sqrt() * size.double(), unit(weights.to(basis.dtype) @ basis)


class SpectralNorm(Probe[TopSingular]):
    """How much the weight can stretch one direction, and how many directions carry it."""

    dear = True
    needs = TopSingular
    metrics = (
        Metric(
            "weight.spectral_norm",
            "1",
            "log",
            "after",
            "The most that the weight can stretch an input, to 1 % (3 % for plain noise). A jump means that an edit "
            "added a strong direction.",
            "σ_1(W_t)",
            "spectral normalisation (arXiv 1802.05957)",
        ),
        Metric(
            "weight.stable_rank",
            "directions",
            "linear",
            "after",
            "How many directions carry the weight: falling towards 1 means that edits have taken it over. Absent for a "
            "zero weight.",
            "‖W_t‖_F² / σ_1²",
            "Rudelson and Vershynin (arXiv math/0503442)",
        ),
    )

    def compute(self, seen: TopSingular) -> Readings:
        """The stable rank is left out for a zero weight."""
        rank = {} if seen.spectral_norm == 0 else {"weight.stable_rank": (seen.norm / seen.spectral_norm) ** 2}
        return {"weight.spectral_norm": seen.spectral_norm, **rank}
