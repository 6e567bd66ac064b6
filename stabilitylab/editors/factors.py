"""The two factors of a linear layer's gradient: its inputs u and the loss's gradient δ at its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabilitylab.errors import SiteError, did_you_mean


def linear_layers(model: nn.Module, sites: Sequence[str]) -> list[nn.Linear]:
    """The modules named `sites`, found by name anew.

    Raises:
        SiteError: no module of that name, or it is not an `nn.Linear`.
    """
    modules = dict(model.named_modules())
    found = []
    for site in sites:
        if site not in modules:
            raise SiteError(f"the model has no layer {site!r}{did_you_mean(site, modules)}")
        layer = modules[site]
        if not isinstance(layer, nn.Linear):
            raise SiteError(f"the layer {site!r} is {type(layer).__name__}, expected Linear")
        found.append(layer)
    return found


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
    layers = linear_layers(model, sites)
    weights = [layer.weight for layer in layers]
    flags = [weight.requires_grad for weight in weights]
    inputs: list[Tensor | None] = [None] * len(layers)
    deltas: list[Tensor | None] = [None] * len(layers)
    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(layers):
            layer.weight.requires_grad_(True)
            handles.append(layer.register_forward_hook(_capture(inputs, deltas, handles, index)))
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
    def keep_delta(gradient: Tensor) -> None:
        deltas[index] = gradient.detach()

    def keep_input(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs[index] = args[0].detach()
        handles.append(output.register_hook(keep_delta))  # type: ignore[no-untyped-call]

    return keep_input


def used_tokens(u: Tensor, delta: Tensor) -> Tensor:
    """bool [tokens]: rows in which neither factor is all zero. The others (padding) add nothing to the gradient."""
    return (u != 0).any(-1) & (delta != 0).any(-1)
