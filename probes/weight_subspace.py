"""How much of the weight's leading singular subspace is still the original one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

LEADING = 8
"""Dimensions of the subspace."""

_TOLERANCE = 1e-6  # ‖WWᵀu − σ²u‖ against σ²
_SMALL = 4 * LEADING  # sides up to which a full decomposition is the simplest way


@dataclass(frozen=True)
class LeadingSubspace:
    """cosines: of the principal angles between the leading left singular subspaces of W₀ and W, float64 [k ≤ 8]."""

    cosines: Host


@torch.no_grad()
def leading_subspace(gram: Tensor) -> Tensor:
    """An orthonormal basis of a weight's leading left singular subspace: float64 [rows, k], k ≤ 8, on the host.

    gram: W Wᵀ up to scale, as `gram_of` forms it; of a weight with more rows than columns it gives right singular
    vectors. By ARPACK through SciPy. NaN when the weight is not finite. Waits for an accelerator.
    """
    matrix = gram.cpu()
    count = min(LEADING, matrix.shape[0])
    if not torch.isfinite(matrix).all():
        return torch.full((matrix.shape[0], count), torch.nan, dtype=torch.float64)
    if matrix.shape[0] <= _SMALL:
        all_of_them: Tensor = torch.linalg.eigh(matrix).eigenvectors
        return all_of_them[:, -count:]

    def product(u: Host) -> Host:  # by torch: NumPy's BLAS has a thread pool of its own
        image: Host = (matrix @ torch.from_numpy(u).reshape(-1)).numpy()
        return image

    operator = LinearOperator((matrix.shape[0],) * 2, matvec=product, dtype=np.float64)
    even = np.full(matrix.shape[0], matrix.shape[0] ** -0.5)
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
            "principal angles: Björck and Golub, Math. Comp. 27 (1973)",
        ),
    )

    def compute(self, seen: LeadingSubspace) -> Readings:
        """The mean of the squared cosines."""
        return {"weight.subspace_overlap": float(np.mean(seen.cosines**2))}
