"""How much of the weight's leading singular subspace is still the original one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.probes.weight_pass import as_matrix
from torch import Tensor

from stabilitylab.readings import Metric

LEADING = 8
"""Dimensions of the subspace."""

_TOLERANCE = 1e-6  # ‖WWᵀu − σ²u‖ against σ²
_SMALL = 4 * LEADING  # sides up to which a full decomposition is the simplest way


@dataclass(frozen=True)
class LeadingSubspace:
    """cosines: of the principal angles between the leading left singular subspaces of W₀ and W, float64 [k ≤ 8]."""

    cosines: Host


@torch.no_grad()
def leading_subspace(weight: Tensor) -> Tensor:
    """An orthonormal basis of the leading left singular subspace of a weight: float64 [rows, k], k ≤ 8, on the host.

    By ARPACK through SciPy; waits for an accelerator. Right singular vectors take their place where the weight has more
    rows than columns. NaN when the weight is not finite.
    """
    wide = as_matrix(weight).to("cpu", torch.float64)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    count, size = min(LEADING, wide.shape[0]), wide.abs().max()
    if not torch.isfinite(size):
        return torch.full((wide.shape[0], count), torch.nan, dtype=torch.float64)
    wide = wide / size if size > 0 else wide
    if wide.shape[0] <= _SMALL:
        left: Tensor = torch.linalg.svd(wide, full_matrices=False).U
        return left[:, :count]

    def product(u: Host) -> Host:
        image: Host = (wide @ (torch.from_numpy(u).reshape(-1) @ wide)).numpy()
        return image

    operator = LinearOperator((wide.shape[0],) * 2, matvec=product, dtype=np.float64)
    even = np.full(wide.shape[0], wide.shape[0] ** -0.5)
    _, vectors = eigsh(operator, k=count, v0=even, tol=_TOLERANCE)
    return torch.from_numpy(np.ascontiguousarray(vectors))


def compare_subspaces(original: Tensor, now: Tensor) -> Tensor:
    """The cosines of the principal angles between two orthonormal bases [rows, k] (Björck and Golub, 1973)."""
    product = original.T @ now
    if not torch.isfinite(product).all():
        return torch.full((product.shape[1],), torch.nan, dtype=torch.float64)
    cosines: Tensor = torch.linalg.svdvals(product).clamp(0, 1)
    return cosines


class SubspaceOverlap(Probe[LeadingSubspace]):
    """How much of the leading subspace is still there."""

    tier = "deep"
    needs = LeadingSubspace
    metrics = (
        Metric(
            "weight.subspace_overlap",
            "share",
            "linear",
            "after",
            "How much of what the weight's 8 strongest directions were is still among them: 1 is untouched; near 0, "
            "edits have put their own in place of what the model was trained to.",
            "‖U_0ᵀ U_t‖_F² / 8",
            "REVIVE; principal angles: Björck and Golub (1973)",
        ),
    )

    def compute(self, seen: LeadingSubspace) -> Readings:
        """The mean of the squared cosines."""
        return {"weight.subspace_overlap": float(np.mean(seen.cosines**2))}
