"""What the hooks catch in the loops that break plain hooks, and that none is left behind."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from stabilitylab.probes.gradient_factors import GradientSpectrum, reduce_factors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from stabilitylab.hooks import Capture, run_silently, sweep
from tests.loops import hooks_on


def capture() -> Capture:
    return Capture(lambda site, output: None, lambda kwargs, output: None)


def spectrum(seen: Capture, site: str = "layer") -> np.ndarray:
    forward = seen.layers[site].complete
    assert forward is not None, "no δ was caught"
    assert forward.delta is not None
    packed, shapes = reduce_factors(forward.x, forward.delta)
    return GradientSpectrum.from_host(packed.numpy(), shapes).singular_values


def assert_spectrum(found: np.ndarray, gradient: Tensor) -> None:
    exact = np.linalg.svd(gradient.double().numpy(), compute_uv=False)[: found.size]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6 * exact[0])


class AddInPlace(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y.add_(1.0)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), Conv1D(5, 6)], ids=repr)
@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), AddInPlace(), nn.Identity(), nn.GELU()], ids=repr)
@pytest.mark.parametrize("shape", [(7, 6), (2, 4, 6)], ids=str)
def test_factors_of_each_layer_before_each_activation(layer: nn.Module, after: nn.Module, shape: tuple) -> None:
    model = nn.Sequential(copy.deepcopy(layer), after)
    with capture() as seen:
        seen.watch_layer("layer", model[0], factors=True)
        model(torch.randn(shape)).pow(2).sum().backward()
    assert_spectrum(spectrum(seen), model[0].weight.grad)
    assert hooks_on(model) == 0


def test_autograd_grad() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        (gradient,) = torch.autograd.grad(layer(torch.randn(3, 4, 6)).pow(2).sum(), layer.weight)
    assert_spectrum(spectrum(seen), gradient)


def test_functional_call() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    with capture() as seen:
        seen.watch_layer("layer", model[0], factors=True)
        torch.func.functional_call(model, weights, torch.randn(3, 4, 6)).sum().backward()
    assert_spectrum(spectrum(seen), weights["0.weight"].grad)


def test_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 6, requires_grad=True)
    with capture() as seen:
        seen.watch_layer("layer", model[0], factors=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert_spectrum(spectrum(seen), model[0].weight.grad)


def test_a_later_weight_alone_requires_a_gradient() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 5)
    first.requires_grad_(False)
    with capture() as seen:
        seen.watch_layer("frozen", first, factors=True)
        seen.watch_layer("layer", second, factors=True)
        second(first(torch.randn(3, 6))).sum().backward()
    assert seen.layers["frozen"].complete is None
    assert_spectrum(spectrum(seen), second.weight.grad)


def test_two_backwards_through_one_forward_are_not_added_up() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        y = layer(torch.randn(3, 6))
        y.pow(2).sum().backward(retain_graph=True)
        first = layer.weight.grad.clone()
        y.pow(3).sum().backward()
    assert seen.layers["layer"].backwards == 2
    assert_spectrum(spectrum(seen), first)


def test_two_forwards_before_one_backward_are_kept_apart() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        layer(torch.randn(3, 6))  # its backward never comes
        x = torch.randn(4, 6)
        layer(x).pow(2).sum().backward()
    assert seen.layers["layer"].forwards == 2
    assert torch.equal(seen.layers["layer"].complete.x, x)
    assert_spectrum(spectrum(seen), layer.weight.grad)


def test_memory_stays_bounded_over_hundreds_of_forwards() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        for _ in range(430):
            layer(torch.randn(3, 6))
    buffer = seen.layers["layer"]
    assert buffer.forwards == 430
    assert len(buffer.pending) == 8


def test_an_input_that_is_overwritten_later_is_noticed() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer.weight.requires_grad_(False)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        layer(x).sum().backward()
        assert not seen.layers["layer"].complete.overwritten
        x.zero_()
    assert seen.layers["layer"].complete.overwritten


def test_hooks_are_gone_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    with pytest.raises(RuntimeError, match="mine"), capture() as seen:
        seen.watch_layer("layer", model[0], factors=True)
        seen.watch_model(model)
        seen.watch_editor("editor", model[1])
        assert hooks_on(model) == 4  # the whole model has two: before and after its forward
        raise RuntimeError("mine")
    assert hooks_on(model) == 0


def test_run_silently_puts_rng_and_modes_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[0].eval()
    state = torch.get_rng_state()
    run_silently(model, lambda: (model(torch.randn(2, 4)), torch.rand(3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    with pytest.raises(ZeroDivisionError):
        run_silently(model, lambda: 1 / 0)
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_copied_inside_the_edit_is_kept_apart_and_left_clean() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    with capture() as seen:
        seen.watch_layer("layer", model[0], factors=True)
        model(torch.randn(3, 6))  # no backward
        clone = copy.deepcopy(model)
        clone(torch.randn(3, 6)).pow(2).sum().backward()
        saved = pickle.loads(pickle.dumps(model))
    assert_spectrum(spectrum(seen), clone[0].weight.grad)
    forwards = seen.layers["layer"].forwards
    clone(torch.randn(3, 6))  # the copied hook is silent now …
    assert seen.layers["layer"].forwards == forwards
    sweep(clone)  # … and is taken off
    assert hooks_on(model) == hooks_on(clone) == 0
    saved(torch.randn(3, 6))


def test_an_output_with_flat_tokens_is_seen_as_a_sequence() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(nn.functional.one_hot(input_ids, 6).float().flatten(0, 1))

    shapes = []
    model = Flat()
    with Capture(lambda site, output: shapes.append(output.shape), lambda kwargs, output: None) as seen:
        seen.watch_layer("layer", model.layer, factors=True)
        seen.watch_model(model)
        model(input_ids=torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert shapes == [(2, 3, 5)]


def test_a_hook_that_fails_ends_itself_and_not_the_users_forward() -> None:
    def broken(site: str, output: Tensor) -> None:
        raise ArithmeticError("bug of ours")

    layer = nn.Linear(6, 5)
    with Capture(broken, lambda kwargs, output: None) as seen:
        seen.watch_layer("layer", layer, factors=True)
        assert layer(torch.randn(2, 6)).shape == (2, 5)
        assert layer(torch.randn(2, 6)).shape == (2, 5)
