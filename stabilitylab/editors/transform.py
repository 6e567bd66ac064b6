"""MEND's hypernetwork: what turns the factors of a raw gradient into those of an edit (arXiv 2110.11309, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-7
"""Added to the standard deviations, as in the authors' code. A unit that never fired has a deviation of zero."""


class LowRankLayer(nn.Module):
    """``x + s_l * (U V x + b) + o_l``, with a ReLU on what is added in a hidden layer; U is zero at first.

    The rectifier is a clamp, which passes gradient at exactly zero; else nothing would be learned from the identity.
    """

    def __init__(self, dim: int, rank: int, layers: int, *, rectified: bool) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(dim, rank))
        self.v = nn.Parameter(torch.randn(rank, dim) / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.ones(layers, dim))
        self.shift = nn.Parameter(torch.zeros(layers, dim))
        self.rectified = rectified

    def forward(self, x: Tensor, layer_index: int) -> Tensor:
        """[tokens, dim] to [tokens, dim], with the scale and shift of edited layer `layer_index`."""
        added = (x @ self.v.T) @ self.u.T + self.bias
        added = self.scale[layer_index] * added + self.shift[layer_index]
        return x + (added.clamp(min=0) if self.rectified else added)


class GradientTransform(nn.Module):
    """The hypernetwork of all edited layers of one shape: normalise both factors, concatenate, a residual low-rank MLP.

    ``u_mean``, ``u_std`` [inputs] and ``v_mean``, ``v_std`` [outputs] are statistics, in float64, of the raw factors
    over the ``rows`` tokens seen in training. `forward` never changes them. All are saved with the weights, so that
    training which is taken up again goes on from them instead of starting anew.
    """

    rows: Tensor
    u_mean: Tensor
    u_std: Tensor
    v_mean: Tensor
    v_std: Tensor
    clamp: float | None = None
    """How many standard deviations a normalised input may be away from its mean; None: any number, as in the paper."""

    def __init__(self, inputs: int, outputs: int, rank: int, layers: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        for name, dim in (("u", inputs), ("v", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim, dtype=torch.double))
            self.register_buffer(f"{name}_std", torch.ones(dim, dtype=torch.double))
        dim = inputs + outputs
        self.hidden = LowRankLayer(dim, rank, layers, rectified=True)
        self.output = LowRankLayer(dim, rank, layers, rectified=False)

    @torch.no_grad()
    def observe(self, u: Tensor, v: Tensor) -> None:
        """Take more rows of raw factors u [tokens, inputs] and v [tokens, outputs] into the statistics.

        Means and sums of squares are merged in float64 by Chan, Golub and LeVeque's formula (1979); the deviations are
        those of a sample (n - 1). The hypernetwork learns nothing by it.
        """
        more, before = len(u), int(self.rows)
        if more == 0:
            return
        after = before + more
        for mean, std, values in ((self.u_mean, self.u_std, u.double()), (self.v_mean, self.v_std, v.double())):
            away = values.mean(0) - mean
            # One row has no deviation: until there are two, the buffer holds the 1 it began with.
            squares = std.square() * (before - 1) if before > 1 else torch.zeros_like(std)
            squares += (values - values.mean(0)).square().sum(0) + away.square() * (before * more / after)
            mean.add_(away * (more / after))
            if after > 1:
                std.copy_((squares / (after - 1)).sqrt())
        self.rows.fill_(after)

    def forward(self, u: Tensor, v: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Factors of the edit from RAW factors u [tokens, inputs], v [tokens, outputs] of edited layer `layer_index`.

        The index counts the edited layers of this shape. At the start of training what comes out is what went in,
        normalised.
        """
        u = (u - self.u_mean.to(u.dtype)) / (self.u_std.to(u.dtype) + EPSILON)
        v = (v - self.v_mean.to(v.dtype)) / (self.v_std.to(v.dtype) + EPSILON)
        if self.clamp is not None:
            u, v = u.clamp(-self.clamp, self.clamp), v.clamp(-self.clamp, self.clamp)
        x = torch.cat([u, v], dim=-1)
        x = self.output(self.hidden(x, layer_index), layer_index)
        return x[:, : self.inputs], x[:, self.inputs :]
