"""What the loops edit a decoder with: steps down a gradient, and the key and the value of a closed-form edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.wild.case import Edit
from benchmarks.wild.decoder import SUBJECT_PLACE, Decoder, Fact, Layer, answered, loss_of, object_word, questions

Loss = Callable[[nn.Module], Tensor]
Weights = Mapping[str, nn.Parameter]


def each(facts: Sequence[Fact], edit: Callable[[Fact], nn.Module]) -> Iterator[Edit]:
    """An edit for each of the facts."""
    for fact in facts:
        yield Edit(fact.label, partial(edit, fact))


def weights_of(model: nn.Module, sites: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weight of each layer of `sites`."""
    found = {}
    for site in sites:
        weight = model.get_submodule(site).weight
        assert isinstance(weight, nn.Parameter)
        found[site] = weight
    return found


def on(facts: Sequence[Fact]) -> Loss:
    """The model's own loss on the sentences."""
    batch = answered(facts)
    return lambda model: loss_of(model, batch)


def backward(model: nn.Module, loss: Loss) -> Tensor:
    """Clear all gradients and leave those of `loss`. Returns the loss."""
    model.zero_grad()
    value = loss(model)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


@torch.no_grad()
def step(weights: Weights, rate: float) -> None:
    """One step down the gradients that are there."""
    for weight in weights.values():
        if weight.grad is not None:
            weight.sub_(rate * weight.grad)


def descend(model: nn.Module, weights: Weights, loss: Loss, rate: float) -> nn.Module:
    """One step of plain gradient descent. Returns the model."""
    backward(model, loss)
    step(weights, rate)
    return model


class Masters:
    """float32 copies of weights of a smaller dtype: steps are taken on the copies, the weights follow."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._copies = {site: weight.detach().float().clone() for site, weight in weights.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step down the gradients that are there."""
        for site, weight in self._weights.items():
            assert weight.grad is not None
            self._copies[site] -= rate * weight.grad.float()
            weight.copy_(self._copies[site])


def keys_of(model: Decoder, layer: Layer, ids: Tensor, place: int = SUBJECT_PLACE) -> Tensor:
    """What enters the layer's second matrix at a token of each row: [rows, hidden]."""
    return _passed(model, layer, ids, place)[0]


def moments(model: Decoder, layer: Layer, facts: Sequence[Fact]) -> Tensor:
    """Second moments of the layer's keys over the facts' questions: [hidden, hidden]."""
    keys = keys_of(model, layer, questions(facts))
    return keys.T @ keys / len(keys)


def wanted_change(model: Decoder, layer: Layer, fact: Fact, *, clamp: float = 3.0) -> Tensor:
    """What has to be added to the layer's output at the subject for the fact to become likely: [1, width].

    clamp: its largest norm, over that of the output.
    """
    ids, target = questions([fact]), torch.tensor([object_word(fact.object)])
    value = _passed(model, layer, ids, SUBJECT_PLACE)[1]
    change = torch.zeros_like(value, requires_grad=True)
    adam = torch.optim.Adam([change], lr=0.3)
    largest = clamp * value.norm()
    for _ in range(12):
        with _added(layer, change):
            loss = functional.cross_entropy(model(ids).logits[:, -1], target) + 0.05 * change.square().mean()
        (change.grad,) = torch.autograd.grad(loss, [change])
        adam.step()
        with torch.no_grad():
            change.mul_((largest / change.norm()).clamp(max=1.0))
    return change.detach()


@torch.no_grad()
def _passed(model: Decoder, layer: Layer, ids: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """The second matrix's input and output at a token of each row."""
    passed: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        passed.append((args[0][:, place], output[:, place]))

    handle = layer.mlp.fc2.register_forward_hook(note)
    model(ids)
    handle.remove()
    return passed[0]


@contextmanager
def _added(layer: Layer, change: Tensor) -> Iterator[None]:
    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, SUBJECT_PLACE] += change
        return output

    handle = layer.mlp.fc2.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
