"""Small edit loops as users write them, each a few lines: what the scenarios put their bug into."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo import words
from benchmarks.zoo.scenario import Step
from stabilitylab.editors.base import Batch
from stabilitylab.editors.layers import edited_layers, last_mlp_layers, mlp_layers
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.mend import Mend
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.mend_data import shipped
from stabilitylab.testbed.records import EditRecord

T = TypeVar("T")
Loss = Callable[[nn.Module, Batch], Tensor]
LONG = 120
"""Edits of a loop that nothing stops."""


def draw(seed: int, scenario: str) -> np.random.Generator:
    """What a scenario draws from its seed, such as the edit at which something comes along."""
    return np.random.default_rng([seed, zlib.crc32(scenario.encode())])


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own."""
    found: Tensor = model(**batch).loss
    return found


def gradients(model: nn.Module, sites: Sequence[str], batch: Batch, loss: Loss = model_loss) -> list[Tensor]:
    """Of the loss, at the weights of `sites`; their flags are as before."""
    weights = [layer.parameter for layer in edited_layers(model, sites)]
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            return list(torch.autograd.grad(loss(model, batch), weights))
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


@torch.no_grad()
def add(model: nn.Module, sites: Sequence[str], updates: Iterable[Tensor]) -> None:
    """Add to the weights of `sites`, in their own dtype, in place."""
    for layer, update in zip(edited_layers(model, sites), updates, strict=True):
        layer.parameter.add_(update.to(layer.parameter.dtype))


def descend(
    model: nn.Module, sites: Sequence[str], batch: Batch, rate: float, steps: int = 1, loss: Loss = model_loss
) -> nn.Module:
    """Plain gradient steps, in place."""
    for _ in range(steps):
        add(model, sites, [-rate * gradient.float() for gradient in gradients(model, sites, batch, loss)])
    return model


def undo(model: nn.Module, sites: Sequence[str]) -> Callable[[nn.Module], None]:
    """What puts the weights of `sites` back to what they are now."""
    kept = [layer.parameter.detach().clone() for layer in edited_layers(model, sites)]

    @torch.no_grad()
    def restore(edited: nn.Module) -> None:
        for layer, weight in zip(edited_layers(edited, sites), kept, strict=True):
            layer.parameter.copy_(weight)

    return restore


@lru_cache(maxsize=1)
def _digit_canary() -> Batch:
    return blip2_digits.canary(blip2_digits.tokenizer())


def digit_canary() -> Batch:
    """The digit model's."""
    return _digit_canary()


def digit_model(precision: str) -> nn.Module:
    """The digit model, unedited."""
    return blip2_digits.load(precision)[0].requires_grad_(False)


def _apply(edit: Callable[[nn.Module, T], nn.Module], request: T, model: nn.Module) -> nn.Module:
    return edit(model, request)


def digit_steps(
    edit: Callable[[nn.Module, EditRecord], nn.Module],
    seed: int,
    n: int = LONG,
    between: Callable[[nn.Module], None] | None = None,
) -> Iterator[Step]:
    """Edits about digits."""
    for record in digits.edit_stream(seed, n):
        yield Step(f"{record.src} → {record.alt}", partial(_apply, edit, record), between)


def word_steps(
    edit: Callable[[nn.Module, words.Fact], nn.Module],
    seed: int,
    n: int = LONG,
    between: Callable[[nn.Module], None] | None = None,
) -> Iterator[Step]:
    """Edits of facts of the small language."""
    for fact in words.stream(seed, n):
        yield Step(fact.label, partial(_apply, edit, fact), between)


def word_model(seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A language model of the family that the seed gives, and both MLP matrices of its last two layers."""
    model: nn.Module = words.model_of(words.FAMILIES[seed % 2], words.number_of(seed, seed // 2))
    return model, last_mlp_layers(model, 2)


def down_matrix(model: nn.Module, number: int = 1) -> tuple[str, ...]:
    """The matrix that writes an MLP's output, of one layer."""
    return (mlp_layers(model, "down")[number],)


def mend_of(model: nn.Module, *, floor: bool) -> Mend:
    """The shipped MEND. floor: no unit's std is below 1% of the median, so that none is divided by next to nothing."""
    mend = shipped(Mend, model)
    if floor:
        for transform in transforms_of(mend):
            for std in (transform.u_std, transform.v_std):
                std.clamp_(min=float(std.median()) / 100)
    return mend


def part_of(editor: Mend | Malmen, site: str) -> str:
    """The name under which probes know the hypernetwork that serves `site`, whose statistics are its own."""
    return f"editor.transforms.{editor._place[site][0]}"


def transforms_of(editor: Mend | Malmen) -> list[Any]:
    """Its hypernetworks, one for each shape of layers."""
    return list(editor.transforms.values())
