"""The gradient of a linear layer from its two factors, without forming it.

For T tokens the gradient is δᵀX, so its rank is at most T. With Xᵀ = Q₁R₁ and δᵀ = Q₂R₂ its singular values are those
of the small R₂R₁ᵀ (Golub and Van Loan, Matrix Computations, 4th ed., §5.2; the MEND paper, arXiv 2110.11309, §3, uses
the same rank-T form). An fp32 Gram matrix would lose half of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from stabilitylab.probes.base import Host
from stabilitylab.probes.weight_pass import count_nonfinite
from torch import Tensor


@dataclass(frozen=True)
class GradientSpectrum:
    """singular_values: all of them, float64, descending, shape [min(T, in, out)]; NaN when a factor is not finite.

    nonfinite: NaN or infinite entries of the two factors together.
    """

    singular_values: Host
    nonfinite: float

    @classmethod
    def from_host(cls, values: Host, shapes: tuple[tuple[int, int], tuple[int, int]]) -> GradientSpectrum:
        """From the packed triangles of `reduce_factors`; `shapes` are theirs."""
        scale_x, scale_delta, nonfinite = float(values[0]), float(values[1]), float(values[2])
        split = 3 + shapes[0][0] * shapes[0][1]
        r_x, r_delta = values[3:split].reshape(shapes[0]), values[split:].reshape(shapes[1])
        rank = min(len(r_x), len(r_delta))
        if nonfinite or not (np.isfinite(r_x).all() and np.isfinite(r_delta).all()):
            return cls(np.full(rank, np.nan), nonfinite)
        # torch, not NumPy: it keeps to the thread count that the user set, and a second pool would fight with theirs.
        core: Host = torch.linalg.svdvals(torch.from_numpy(r_delta) @ torch.from_numpy(r_x).T).numpy()
        # The scales are applied one after the other: their product alone may overflow where the result does not.
        return cls((core * scale_x) * scale_delta, nonfinite)


def _triangle(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R of the QR of factorᵀ after scaling to largest entry 1, the scale, the count of non-finite entries)."""
    wide = factor.to(torch.float64 if factor.dtype == torch.float64 else torch.float32)
    low, high = torch.aminmax(wide)
    scale = torch.maximum(low.abs(), high.abs())
    nonfinite = count_nonfinite(wide, low, high)
    usable = (scale > 0) & torch.isfinite(scale)
    scaled = wide / torch.where(usable, scale, torch.ones_like(scale))
    # The values of a factor that is not finite are never used; LAPACK is only kept from choking on them.
    scaled = torch.where(usable, scaled, torch.zeros_like(scaled))
    return torch.linalg.qr(scaled.T, mode="r").R, scale.double(), nonfinite


@torch.no_grad()
def reduce_factors(x: Tensor, delta: Tensor) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int]]]:
    """The triangles of both factors as one float64 tensor on their device, with the triangles' shapes.

    x: [..., in], the layer's input. delta: [..., out], the loss's gradient at its output. All leading dimensions are
    tokens and agree in number. Raises ValueError when they do not.
    """
    x, delta = x.detach().reshape(-1, x.shape[-1]), delta.detach().reshape(-1, delta.shape[-1])
    if x.shape[0] != delta.shape[0]:
        raise ValueError(f"the factors have {x.shape[0]} and {delta.shape[0]} tokens; expected as many in both")
    r_x, scale_x, bad_x = _triangle(x)
    r_delta, scale_delta, bad_delta = _triangle(delta)
    head = torch.stack([scale_x, scale_delta, bad_x + bad_delta])
    packed = torch.cat([head, r_x.double().reshape(-1), r_delta.double().reshape(-1)])
    shape_x, shape_delta = (r_x.shape[0], r_x.shape[1]), (r_delta.shape[0], r_delta.shape[1])
    return packed, (shape_x, shape_delta)
