"""A model of one layer, and a noisy gradient step on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.layers import (
    Read,
    Step,
    catching,
    product,
    wide,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYER: Read = {"layer": lambda model: model.layer.weight}


class Net(nn.Module):
    """One layer and a loss on its output."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...] = (2, 5, 8), tokens: int | None = None) -> None:
        super().__init__()
        self.layer, self.shape, self.tokens = layer, shape, tokens

    def data(self) -> Tensor:
        if self.tokens is not None:
            return torch.randint(self.tokens, self.shape)
        return torch.randn(self.shape).to(next(p.dtype for p in self.parameters() if p.is_floating_point()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        logits = y.reshape(y.shape[0], -1)
        return {"logits": logits, "loss": (logits - 1).pow(2).mean()}


def descend(net: Any, *inner: str) -> Step:
    """A noisy gradient step on all parameters that are trained. inner: further layers whose output is told."""
    with catching(net, "layer", *inner) as caught:
        answer = net(net.data())
    x, y = caught["layer"]
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    *gradients, delta = torch.autograd.grad(answer["loss"], [*trained, y])
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            noise = gradient.abs().mean() * torch.randn(gradient.shape).to(gradient.dtype)
            parameter -= 3.0 * (gradient + noise)
    linear = x.is_floating_point() and x.shape[:-1] == delta.shape[:-1]
    factors = {"layer": product(delta, x)} if linear else {}
    return Step(net, answer["logits"].detach(), factors, {site: wide(y) for site, (_, y) in caught.items()})
