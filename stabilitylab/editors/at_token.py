"""Looking at a model at one token of each row, as ROME, MEMIT and AlphaEdit do: what enters and leaves its modules."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabilitylab.editors.base import Batch
from stabilitylab.editors.layers import mlp_layers
from stabilitylab.errors import SiteError, UsageError

_BLOCK = re.compile(r"(?P<block>.*\.\d+)\..+")


class _Seen(Exception):
    """All that was asked for has been seen: the rest of the forward is not needed."""


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without a weight that requires a gradient; each flag is put back on leaving.

    So nothing is drawn at random, and a backward ends at what is optimised instead of at the first layer.
    """
    training = {module: module.training for module in model.modules()}
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter in asking:
            parameter.requires_grad_(True)


def used_tokens(batch: Batch) -> Tensor:
    """bool [rows, tokens]: what is no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def last_used(batch: Batch) -> Tensor:
    """long [rows]: the position of each row's last token, wherever its padding is."""
    used = used_tokens(batch)
    return used.shape[1] - 1 - used.flip(1).long().argmax(dim=1)


@torch.no_grad()
def passing(
    model: nn.Module, batch: Batch, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """One forward, as far as needed: what enters the modules named `inputs` and leaves those named `outputs`.

    Returns:
        For each name a tensor [rows, tokens, units] in the model's dtype.

    Raises:
        SiteError: no module of that name, or it took no part.
    """
    rows = used_tokens(batch).shape[0]
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    def take(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        # OPT's MLPs see all tokens of all rows as one list.
        found.setdefault(name, tensor.detach().reshape(rows, -1, tensor.shape[-1]))
        if len(entered) == len(inputs) and len(left) == len(outputs):
            raise _Seen

    def enters(name: str) -> Callable[..., None]:
        return lambda module, args: take(entered, name, args[0])

    def leaves(name: str) -> Callable[..., None]:
        return lambda module, args, output: take(left, name, first_of(output))

    handles: list[RemovableHandle] = []
    try:
        handles += [_module(model, name).register_forward_pre_hook(enters(name)) for name in inputs]
        handles += [_module(model, name).register_forward_hook(leaves(name)) for name in outputs]
        with contextlib.suppress(_Seen):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in (*inputs, *outputs):
        if name not in entered and name not in left:
            raise SiteError(f"the module {name!r} took no part in the forward")
    return [entered[name] for name in inputs], [left[name] for name in outputs]


def mean_at(values: Tensor, position: Tensor) -> Tensor:
    """float64 [units]: the mean of `values` [rows, tokens, units] over rows, each taken at its own position.

    The first row, the bare prompt, counts as much as all the others together. Where a text begins with its subject, the
    key there has little to do with the keys behind prefixes, which are all alike: with an even mean over four rows, two
    facts that ROME missed on SmolLM2-135M got 0.45 of the shift at the bare prompt, and 1.2 of it elsewhere.
    """
    taken = values[torch.arange(values.shape[0]), position.to(values.device)].double()
    return taken[0] if len(taken) == 1 else (taken[0] + taken[1:].mean(dim=0)) / 2


@contextlib.contextmanager
def shifted(model: nn.Module, name: str, position: Tensor, shift: Tensor) -> Iterator[list[Tensor]]:
    """Inside, `shift` [units] is added to the output of the module `name` in each row at its position.

    Yields:
        A list that holds, after each forward, the module's last output before the shift, [rows, tokens, units].
    """
    seen: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_of(output)
        rows = hidden.reshape(position.numel(), -1, hidden.shape[-1])
        seen[:] = [rows.detach()]
        place = (torch.arange(position.numel(), device=hidden.device), position.to(hidden.device))
        moved = rows.index_put(place, shift.to(hidden.dtype).expand(position.numel(), -1), accumulate=True)
        moved = moved.reshape(hidden.shape)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = _module(model, name).register_forward_hook(add)
    try:
        yield seen
    finally:
        handle.remove()


def first_of(output: Any) -> Tensor:
    """The hidden states that a module returns, alone or as the first of a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def block_of(site: str) -> str:
    """The decoder layer that holds the matrix `site`: what its output adds to leaves that layer.

    Raises:
        SiteError: its name has no layer number.
    """
    match = _BLOCK.fullmatch(site)
    if match is None:
        raise SiteError(f"the layer {site!r} is in no numbered decoder layer, such as 'model.layers.5.mlp.down_proj'")
    return match["block"]


def down_sites(
    model: nn.Module, layers: Sequence[int] | None, share: tuple[float, float], least: int = 1
) -> tuple[str, ...]:
    """The matrices that write the MLPs' outputs, of the decoder layers `layers`, in order.

    Args:
        model: holds them.
        layers: their numbers; by default those at a depth of between `share` of the decoder, both rounded
            up, but for the last layer.
        share: from 0, the first layer, to 1, the last.
        least: how many layers there are by default in a decoder that is short.

    Raises:
        SiteError: a layer that the model lacks.
        UsageError: `layers` is empty.
    """
    down = mlp_layers(model, "down")
    numbers = sorted(down)
    if layers is None:
        # What is written in the last layer at a subject no later token reads.
        first, last = (min(math.ceil(part * (len(numbers) - 1)), max(len(numbers) - 2, 0)) for part in share)
        layers = numbers[max(min(first, last + 1 - least), 0) : last + 1]
    if not layers:
        raise UsageError(f"no layer to edit; expected some of the decoder layers {numbers[0]} to {numbers[-1]}")
    for number in layers:
        if number not in down:
            raise SiteError(f"the model has no decoder layer {number}; expected {numbers[0]} to {numbers[-1]}")
    return tuple(down[number] for number in sorted(set(layers)))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SiteError(f"the model has no module {name!r}") from None
