"""What a canary makes of each layer of a live model: the largest activations, where they are, and dead units."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.record.scanned import FLOATS, LISTED, ActivationScan, Some, norm_limit
from stabilitylab.watching.answer import forward
from stabilitylab.watching.canary import Canary

_SAMPLED: Final = 65_536
"""Entries that a median is taken of."""
_ACTIVATIONS: Final = ("activation", "act", "relu", "gelu", "silu")
"""What modules are called that apply an activation function; torch's own are known by their class too."""
_SEQUENCE: Final = 3  # dimensions
_IDS: Final = 2


class _Watch:
    """The layers of one forward, in the order in which they answered."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], ActivationScan] = {}
        self.alive: dict[str, Tensor] = {}

    def saw(self, layer: str, what: str, value: Any) -> None:
        """A layer's tensor; of several forwards the one with the largest entry counts."""
        tensor = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(tensor, Tensor) or not tensor.numel() or tensor.is_meta or not tensor.dim():
            return
        if str(tensor.dtype).removeprefix("torch.") not in FLOATS:
            return
        found = _activation(layer, what, tensor.detach())
        known = self.seen.get((layer, what))
        if known is None or (found.largest or 0.0) > (known.largest or 0.0) or found.nonfinite > known.nonfinite:
            self.seen[layer, what] = found

    def answered(self, layer: str, tensor: Any) -> None:
        """An activation function's output: which units gave anything but 0 so far."""
        if isinstance(tensor, Tensor) and tensor.dim() > 1:
            fired = (tensor.detach() != 0).flatten(end_dim=-2).any(dim=0)
            known = self.alive.get(layer)
            self.alive[layer] = fired if known is None or known.shape != fired.shape else known | fired


def is_compiled(model: nn.Module) -> str:
    """That hooks on the layers, or another dtype, would have the model compiled anew; empty where they would not."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return f"{name or 'the model'} is compiled, and would be once more"
    return ""


def activations_of(model: nn.Module, canary: Canary) -> tuple[ActivationScan, ...]:
    """One silent forward of the canary, with every layer looked at; the model is left as it was.

    Raises whatever the model raises, and ValueError where its output holds no logits.
    """
    watch = _Watch()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and next(module.children(), None) is None:
                hooks.callback(module.register_forward_hook(_output_hook(watch, name, _activates(name, module))).remove)
            if name and _normalises(module):
                hooks.callback(module.register_forward_pre_hook(_input_hook(watch, name)).remove)
        answer = forward(model, canary, None)
    tokens = None if answer is None else answer.tokens
    return tuple(_told(found, watch.alive.get(found.layer), tokens) for found in watch.seen.values())


def _output_hook(watch: _Watch, name: str, activates: bool) -> Any:
    def after_forward(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.saw(name, "output", output)
        if activates:
            watch.answered(name, output)

    return after_forward


def _input_hook(watch: _Watch, name: str) -> Any:
    def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
        watch.saw(name, "input", args)

    return before_forward


def _normalises(module: nn.Module) -> bool:
    """As `watching.hooks` tells a normalisation: by its class's name."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _activates(name: str, module: nn.Module) -> bool:
    if next(module.parameters(recurse=False), None) is not None:
        return False
    own = type(module).__module__ == "torch.nn.modules.activation"
    leaf = name.rpartition(".")[2].lower()
    return own or any(leaf.startswith(word) for word in _ACTIVATIONS)


def _activation(layer: str, what: str, tensor: Tensor) -> ActivationScan:
    dtype = str(tensor.dtype).removeprefix("torch.")
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    sizes = wide.abs()
    bad = int((~torch.isfinite(sizes)).sum())
    if bad:
        sizes = sizes.masked_fill(~torch.isfinite(sizes), -1.0)
    place = int(sizes.argmax())
    row, position, unit = _at(place, tuple(tensor.shape))
    flat = sizes.flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLED)]
    largest = float(flat[place])
    return ActivationScan(
        layer=layer,
        what=what,
        dtype=dtype,
        limit=norm_limit(dtype) if what == "input" else FLOATS[dtype][0],
        largest=None if largest < 0 else largest,
        typical=float(sample[sample >= 0].median()) if bool((sample >= 0).any()) else math.nan,
        row=row,
        position=position,
        unit=unit,
        nonfinite=bad,
        units=tensor.shape[-1],
    )


def _at(place: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(row, position, unit) of an entry: the first dimension, all in between, and the last."""
    unit = place % shape[-1]
    before = place // shape[-1]
    positions = math.prod(shape[1:-1]) if len(shape) >= _SEQUENCE else 1
    return before // positions, before % positions, unit


def _told(found: ActivationScan, alive: Tensor | None, tokens: Tensor | None) -> ActivationScan:
    """With its token, and with what is dead."""
    if tokens is not None and tokens.dim() == _IDS and found.row < tokens.shape[0] and found.position < tokens.shape[1]:
        found = replace(found, token=int(tokens[found.row, found.position]))
    if alive is not None and alive.numel() == found.units:
        dead = (~alive).nonzero().flatten()
        some = Some(dead.numel(), tuple(dead[:LISTED].tolist()), (0.0,) * min(LISTED, dead.numel()))
        found = replace(found, dead=some)
    return found
