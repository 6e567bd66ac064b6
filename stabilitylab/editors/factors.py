"""The two factors of a linear layer's gradient: its inputs u and the loss's gradient δ at its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabilitylab.editors.layers import edited_layers
from stabilitylab.errors import SiteError

Factors = Sequence[tuple[Tensor, Tensor]]
"""For each site the factors (u [tokens, inputs], δ [tokens, outputs]) of a gradient, of one edit or of several."""


def gradient_factors(
    model: nn.Module, sites: Sequence[str], batch: Mapping[str, Any]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Factors of the gradient of ``model(**batch).loss`` by one forward and one backward.

    A layer's weight gradient is ``δ.T @ u``, summed over tokens (Mitchell et al., arXiv 2110.11309, section 3).
    The backward goes as far as ``loss.backward()`` would, so that a stranger's backward hooks on the model fire as they
    would there, but no ``.grad`` is filled. Hooks come off and ``requires_grad`` flags go back even when something
    raises.

    Returns:
        For each site (u [tokens, inputs], δ [tokens, outputs]) in the layer's own dtype, and the loss, detached.
    """
    layers = edited_layers(model, sites)
    weights = [layer.parameter for layer in layers]
    flags = [weight.requires_grad for weight in weights]
    inputs: list[Tensor | None] = [None] * len(layers)
    deltas: list[Tensor | None] = [None] * len(layers)
    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(layers):
            weights[index].requires_grad_(True)
            handles.append(layer.module.register_forward_hook(_capture(inputs, deltas, handles, index)))
        with torch.enable_grad():
            loss = model(**batch).loss
            # For the edited weights alone autograd stops short of the first layer's full backward hook.
            reached = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, reached, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    factors = []
    for site, u, delta in zip(sites, inputs, deltas, strict=True):
        if u is None or delta is None:
            raise SiteError(f"the layer {site!r} took no part in the loss")
        factors.append((u.reshape(-1, u.shape[-1]), delta.reshape(-1, delta.shape[-1])))
    return factors, loss.detach()


def _capture(
    inputs: list[Tensor | None], deltas: list[Tensor | None], handles: list[RemovableHandle], index: int
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def keep_delta(gradients: tuple[Tensor, ...]) -> None:
        deltas[index] = gradients[0].detach()

    def keep_input(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs[index] = args[0].detach()
        # A hook on a view (Conv1D, a biased Linear of 3-D input) is lost when something is written into it in place.
        made = output if output._base is None else output._base
        if made.grad_fn is None:
            raise SiteError(f"{type(module).__name__} made an output without a gradient; expected a layer that learns")
        handles.append(made.grad_fn.register_prehook(keep_delta))

    return keep_input


def used_tokens(u: Tensor, delta: Tensor) -> Tensor:
    """bool [tokens]: rows in which neither factor is all zero. The others (padding) add nothing to the gradient."""
    return (u != 0).any(-1) & (delta != 0).any(-1)


def joined(several: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
    """The factors of several edits as those of one: the tokens of all, one after the other."""
    return [(torch.cat([u for u, _ in site]), torch.cat([v for _, v in site])) for site in zip(*several, strict=True)]
