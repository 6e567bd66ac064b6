"""MEND's hypernetwork: what turns the factors of a raw gradient into those of an edit (arXiv 2110.11309, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-7
"""Added to the standard deviations, as in the authors' code. A unit that never fired has a deviation of zero."""


class LowRankLayer(nn.Module):
    """``x + s_l * (U V x + b) + o_l``, with a ReLU on what is added in a hidden layer; U is zero at first.

    The rectifier passes gradient at exactly zero (a clamp), or nothing would ever be learned from the start at identity.
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

    ``u_mean``, ``u_std`` [inputs] and ``v_mean``, ``v_std`` [outputs] are statistics of the raw factors over all tokens
    seen in training. `forward` never changes them.
    """

    u_mean: Tensor
    u_std: Tensor
    v_mean: Tensor
    v_std: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, layers: int) -> None:
        super().__init__()
        self.inputs = inputs
        for name, dim in (("u", inputs), ("v", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        dim = inputs + outputs
        self.hidden = LowRankLayer(dim, rank, layers, rectified=True)
        self.output = LowRankLayer(dim, rank, layers, rectified=False)
        self._count = 0
        self._moments = {"u": torch.zeros(2, inputs).double(), "v": torch.zeros(2, outputs).double()}

    @torch.no_grad()
    def observe(self, u: Tensor, v: Tensor) -> None:
        """Take more rows of raw factors u [tokens, inputs] and v [tokens, outputs] into the statistics.

        Means and sums of squares are merged in float64 by Chan, Golub and LeVeque's formula (1979); the deviations are
        those of a sample (n - 1). The hypernetwork learns nothing by it.
        """
        rows, before = len(u), self._count
        if rows == 0:
            return
        self._count = before + rows
        for name, values in (("u", u.double()), ("v", v.double())):
            mean, squares = self._moments[name]
            away = values.mean(0) - mean
            squares = squares + (values - values.mean(0)).square().sum(0) + away.square() * (before * rows / self._count)
            mean = mean + away * (rows / self._count)
            self._moments[name] = torch.stack([mean, squares])
            getattr(self, f"{name}_mean").copy_(mean)
            if self._count > 1:
                getattr(self, f"{name}_std").copy_((squares / (self._count - 1)).sqrt())

    def forward(self, u: Tensor, v: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Factors of the edit from RAW factors u [tokens, inputs], v [tokens, outputs] of edited layer `layer_index`.

        The index counts the edited layers of this shape. At the start of training what comes out is what went in,
        normalised.
        """
        u = (u - self.u_mean) / (self.u_std + EPSILON)
        v = (v - self.v_mean) / (self.v_std + EPSILON)
        x = torch.cat([u, v], dim=-1)
        x = self.output(self.hidden(x, layer_index), layer_index)
        return x[:, : self.inputs], x[:, self.inputs :]
