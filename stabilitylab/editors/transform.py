"""MEND's hypernetwork: what turns the factors of a raw gradient into those of an edit (arXiv 2110.11309, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-7
"""Added to the standard deviations, as in the authors' code. A unit that never fired has a deviation of zero."""


def take_in(values: Tensor, seen: int, mean: Tensor, variance: Tensor) -> None:
    """Take rows [more, units] into the mean and variance, float64 [units], of the `seen` rows before; in place.

    Sums of squares are merged by Chan, Golub and LeVeque's formula (1979). The variance is that of a sample (n - 1):
    one row has none, and until there are two the variance is left at what it began with.
    """
    values, more = values.double(), len(values)
    after = seen + more
    away = values.mean(0) - mean
    squares = variance * max(seen - 1, 0)
    squares += (values - values.mean(0)).square().sum(0) + away.square() * (seen * more / after)
    mean.add_(away * (more / after))
    if after > 1:
        variance.copy_(squares / (after - 1))


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

        See `take_in`. The hypernetwork learns nothing by it.
        """
        seen = int(self.rows)
        if len(u) == 0:
            return
        for mean, std, values in ((self.u_mean, self.u_std, u), (self.v_mean, self.v_std, v)):
            variance = std.square()
            take_in(values, seen, mean, variance)
            std.copy_(variance.sqrt())
        self.rows.fill_(seen + len(u))

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
