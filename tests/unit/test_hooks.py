"""What the hooks catch in the loops that break plain hooks, and that none is left behind."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from stabilitylab.probes.gradient_factors import reduce_factors
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.one_hook import run_silently
from stabilitylab.watching.walking import named_modules_of
from tests.loops import hooks_on


class Heard:
    """A watcher that writes down what it hears."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, torch.Size]] = []
        self.passes: list[tuple[str, int, Tensor, Tensor]] = []
        self.products: list[Tensor | None] = []
        self.lost: list[str] = []
        self.norms: list[Tensor] = []
        self.adopted: set[int] = set()
        self.accumulations: list[str] = []
        self.ended = 0
        self.steps = 0

    def adopts(self, site: str, weight: Tensor) -> bool:
        fresh = weight.requires_grad and weight.is_leaf and id(weight) not in self.adopted
        self.adopted |= {id(weight)} if fresh else set()
        return fresh

    def accumulated(self, site: str, weight: Tensor) -> None:
        self.accumulations.append(site)

    def backward_ended(self) -> None:
        self.ended += 1

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1

    def layer_output(self, site: str, fired: int, output: Tensor) -> None:
        self.outputs.append((site, output.shape))

    def layer_pass(self, site: str, fired: int, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
        self.passes.append((site, fired, x.clone(), delta.clone()))
        self.products.append(None if product is None else product.clone())

    def overwritten(self, site: str) -> None:
        self.lost.append(site)

    awaits_norm = True

    def norm_input(self, entering: Tensor) -> None:
        self.norms.append(entering)

    def model_called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        pass

    def model_output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        pass

    def loss_answered(self, weight: Tensor) -> None:
        pass


def capture() -> Capture:
    return Capture(Heard())


def heard(seen: Capture) -> Heard:
    watcher = seen._watcher
    assert isinstance(watcher, Heard)
    return watcher


def spectrum(seen: Capture, at: int = 0) -> np.ndarray:
    _, _, x, delta = heard(seen).passes[at]
    packed, rebuild = reduce_factors(x, delta)
    return rebuild(packed.numpy()).singular_values


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


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), Conv1D(5, 6)], ids=repr)
@pytest.mark.parametrize("shape", [(7, 6), (2, 4, 6), (2, 3, 4, 6)], ids=str)
def test_the_product_that_a_backward_forms_is_that_of_its_own_pass(layer: nn.Module, shape: tuple) -> None:
    """Whatever else is added to the weight's gradient: another pass, another use, what was there before."""
    layer = copy.deepcopy(layer)
    layer.weight.grad = torch.randn_like(layer.weight)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        both = layer(torch.randn(shape)).pow(2).sum() + layer(torch.randn(shape)).pow(3).sum()
        (both + layer.weight.pow(2).sum()).backward()
        checkpoint(layer, torch.randn(shape, requires_grad=True), use_reentrant=False).pow(2).sum().backward()
    assert len(heard(seen).passes) == len(heard(seen).products) == 3
    for (_, _, x, delta), product in zip(heard(seen).passes, heard(seen).products, strict=True):
        torch.testing.assert_close(product, x.reshape(-1, 6).T @ delta.reshape(-1, 5))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), Conv1D(5, 6)], ids=repr)
def test_the_product_is_handed_on_without_a_copy(layer: nn.Module) -> None:
    """Autograd copies a gradient that anyone else holds."""
    layer, places = copy.deepcopy(layer), []

    class Looking(Heard):
        def layer_pass(self, site: str, fired: int, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
            assert product is not None
            places.append(product.data_ptr())

    with Capture(Looking()) as seen:
        seen.watch_layer("layer", layer, factors=True)
        layer(torch.randn(2, 4, 6)).pow(2).sum().backward()
    assert places == [layer.weight.grad.data_ptr()]


def test_there_is_no_product_where_the_backward_forms_none() -> None:
    frozen, x = nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    frozen.weight.requires_grad_(False)
    asked_for_x = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("frozen", frozen, factors=True)
        frozen(x).pow(2).sum().backward()
        seen.watch_layer("asked for x", asked_for_x, factors=True)
        torch.autograd.grad(asked_for_x(x).pow(2).sum(), x)
    assert [found[0] for found in heard(seen).passes] == ["frozen", "asked for x"]
    assert heard(seen).products == [None, None]


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
    assert [site for site, *_ in heard(seen).passes] == ["layer"]
    assert_spectrum(spectrum(seen), second.weight.grad)


def test_two_backwards_through_one_forward_are_not_added_up() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        y = layer(torch.randn(3, 6))
        y.pow(2).sum().backward(retain_graph=True)
        first = layer.weight.grad.clone()
        y.pow(3).sum().backward()
    assert len(heard(seen).passes) == 2
    assert_spectrum(spectrum(seen, 0), first)
    assert_spectrum(spectrum(seen, 1), layer.weight.grad - first)


def test_two_forwards_before_one_backward_are_kept_apart() -> None:
    layer = nn.Linear(6, 5)
    first, second = torch.randn(3, 6), torch.randn(3, 6)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        layer(torch.randn(3, 6))  # its backward never comes
        (layer(first).pow(2).sum() + layer(second).pow(3).sum()).backward()
    assert len(heard(seen).outputs) == 3
    caught = [x for _, _, x, _ in heard(seen).passes]
    assert {tuple(x.flatten().tolist()) for x in caught} == {tuple(x.flatten().tolist()) for x in (first, second)}
    for at, x in enumerate(caught):
        layer.weight.grad = None
        layer(x).pow(2 if torch.equal(x, first) else 3).sum().backward()
        assert_spectrum(spectrum(seen, at), layer.weight.grad)


def test_autograd_grad_twice_and_functional_transforms() -> None:
    layer = nn.Linear(6, 5)
    parameters = dict(layer.named_parameters())
    x = torch.randn(3, 4, 6)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, x).pow(2).sum()

    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        gradients = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    ((_, _, caught, delta),) = heard(seen).passes
    assert not torch._C._functorch.is_functorch_wrapped_tensor(delta)  # a wrapper is dead outside of its transform
    assert torch.equal(caught, x)
    assert_spectrum(spectrum(seen), gradients["weight"])


def test_inside_vmap_nothing_is_caught_and_nothing_breaks() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 3, 6)
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, x).pow(2).sum()

    plain = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        watched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    assert torch.equal(plain["weight"], watched["weight"])
    assert not heard(seen).passes


def test_an_input_is_held_no_longer_than_its_graph() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        for _ in range(430):
            layer(torch.randn(3, 6))  # no backward, and the graph is gone at once
        held = [found for found in gc.get_objects() if type(found) is Tensor and found.shape == (3, 6)]
        assert len(held) <= 1
    assert len(heard(seen).outputs) == 430


def test_an_input_that_is_overwritten_before_the_backward_is_left_out_and_said() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer.weight.requires_grad_(False)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        y = layer(x).sum()
        x.zero_()
        y.backward()
    assert not heard(seen).passes
    assert heard(seen).lost == ["layer"]


def test_a_backward_after_the_edit_is_not_heard() -> None:
    layer = nn.Linear(6, 5)
    with capture() as seen:
        seen.watch_layer("layer", layer, factors=True)
        y = layer(torch.randn(3, 6)).sum()
    y.backward()
    assert not heard(seen).passes


def test_what_enters_a_normalisation_is_heard() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.RMSNorm(5), nn.BatchNorm1d(5).eval())
    with capture() as seen:
        seen.watch_norms(named_modules_of(model))
        x = torch.randn(2, 6)
        model(x)
    assert [tuple(entering.shape) for entering in heard(seen).norms] == [(2, 5), (2, 5)]
    assert torch.equal(heard(seen).norms[0], model[0](x))
    assert hooks_on(model) == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    with pytest.raises(RuntimeError, match="mine"), capture() as seen:
        seen.watch_layer("layer", model[0], factors=True)
        seen.watch_model(model)
        seen.watch_editor("editor", model[1])
        assert hooks_on(model) == 5  # the whole model has two, before and after its forward; the weight has one
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
        grandchild = copy.deepcopy(clone)
        saved = pickle.dumps(model)
    ((_, fired, _, _),) = heard(seen).passes
    assert fired == id(clone[0])
    assert_spectrum(spectrum(seen), clone[0].weight.grad)
    forwards = len(heard(seen).outputs)
    clone(torch.randn(3, 6))
    assert len(heard(seen).outputs) == forwards
    for left in (model, clone, grandchild):
        assert hooks_on(left) == 0
        assert not left[0]._forward_hooks_with_kwargs
        assert not left[0]._forward_pre_hooks_with_kwargs
    assert b"stabilitylab" not in saved
    assert torch.equal(pickle.loads(saved)(torch.ones(3, 6)), model(torch.ones(3, 6)))


def test_an_output_with_flat_tokens_is_seen_as_a_sequence() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(nn.functional.one_hot(input_ids, 6).float().flatten(0, 1))

    model = Flat()
    with capture() as seen:
        seen.watch_layer("layer", model.layer, factors=True)
        seen.watch_model(model)
        model(input_ids=torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert heard(seen).outputs == [("layer", (2, 3, 5))]


def test_a_hook_that_fails_ends_itself_and_not_the_users_forward() -> None:
    class Broken(Heard):
        def layer_output(self, site: str, fired: int, output: Tensor) -> None:
            raise ArithmeticError("bug of ours")

        def layer_pass(self, site: str, fired: int, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
            raise ArithmeticError("bug of ours")

    layer = nn.Linear(6, 5)
    with Capture(Broken()) as seen:
        seen.watch_layer("layer", layer, factors=True)
        assert layer(torch.randn(2, 6)).shape == (2, 5)
        assert layer(torch.randn(2, 6)).shape == (2, 5)
