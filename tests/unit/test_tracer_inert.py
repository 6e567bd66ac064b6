"""Tracing changes nothing: the same bits and the same random numbers, whatever an edit does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from tests.traced_loops import (
    Way,
    closed_form,
    compare,
    descend,
    keys,
    step,
    with_checkpoint,
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- ways to edit -----------------------------------------------------------------------------------------------------


def _adam(foreach: bool) -> Way:
    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x).flatten(0, 1), torch.arange(15) % 5)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return [loss, *(value for state in optimizer.state.values() for value in state.values())]

    return run


def _autocast(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = y.float().pow(2).mean()
    loss.backward()
    step(model, model(x).pow(2).mean())
    return [y]


def _half(model: nn.Module, x: Tensor) -> list[Tensor]:
    twin = copy.deepcopy(model).to(torch.bfloat16)
    y = twin(x.to(torch.bfloat16))
    y.sum().backward()
    return [y, *(each.grad for each in twin.parameters() if each.grad is not None)]


def _selective_checkpoint(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    saved = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    choices = checkpoints.CheckpointPolicy

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return choices.MUST_SAVE if op in saved else choices.PREFER_RECOMPUTE

    x = x.clone().requires_grad_()
    contexts = lambda: checkpoints.create_selective_checkpoint_contexts(policy)  # noqa: E731
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    y.pow(2).sum().backward()
    return [y, x.grad]


def _functional_call(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    weights = {name: (p * 2).detach().requires_grad_() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, weights, (x,))
    y.sum().backward()
    return [y, *(weight.grad for weight in weights.values())]


def _func_grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).pow(2).sum())(weights)
    return list(found.values())


def _vmap(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [torch.func.vmap(model, randomness="different")(x[:, None])]


def _per_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], each: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (each[None],)).pow(2).sum()

    model.eval()
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    return list(found.values())


def _hessian(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    return [
        torch.func.hessian(lambda bias: torch.func.functional_call(model, {"head.bias": bias}, (x,)).pow(3).sum())(
            torch.zeros(5)
        ),
        torch.func.jvp(lambda z: functional.linear(z, model.head.weight.detach()).sin(), (x,), (x,))[1],
    ]


def _inner_loop(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As `higher` does: a clone whose weights are computed from the original's, differentiated through."""
    rate = torch.full((), 0.1, requires_grad=True)
    weights = dict(model.named_parameters())
    for _ in range(2):
        loss = torch.func.functional_call(model, weights, (x,)).pow(2).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        weights = {
            name: weight if gradient is None else weight - rate * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    outer = torch.func.functional_call(model, weights, (x,)).pow(2).mean()
    outer.backward()
    assert rate.grad is not None
    return [outer, rate.grad]


class LowRank(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def _lora(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    layer = model.get_submodule("head")
    low = LowRank(layer.weight)  # type: ignore[arg-type]
    parametrize.register_parametrization(layer, "weight", low)
    optimizer = torch.optim.SGD(low.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    parametrize.remove_parametrizations(layer, "weight")
    return [low.up, low.up.grad, low.down.grad]


def _inference(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [model(x).clone()]


def _no_grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
        model.get_parameter("head.weight").add_(0.1)
    return [y]


def _tensor_hooks(model: nn.Module, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    x = x.clone().requires_grad_()
    x.register_hook(lambda gradient: seen.append(gradient.clone()))
    y = model(x)
    y.register_hook(lambda gradient: gradient * 2)
    y.grad_fn.register_prehook(lambda gradients: tuple(g.clamp(-1, 1) for g in gradients))
    handle = model.get_parameter("head.weight").register_post_accumulate_grad_hook(
        lambda p: seen.append(p.grad.clone())
    )
    y.pow(2).sum().backward()
    handle.remove()
    return seen


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.exp()


def _custom_function(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = Doubled.apply(model(x)).sum()
    step(model, y)
    return [y]


def _saved_tensors(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half().float(), lambda t: t * 1):
        model(x).sum().backward()
    return [x.grad]


def _uncommon(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Tensors that are no dense floats."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.randn(2), (2, 2), check_invariants=True)
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    meta = torch.ones(3, device="meta") * 2
    small = torch.randn(4).to(torch.float8_e4m3fn)
    whole = torch.fft.fft(x).abs()
    assert meta.is_meta
    return [
        (sparse @ torch.randn(2, 2)) * 2,
        (nested * 2).values(),
        small.float(),
        whole,
        torch.view_as_complex(torch.randn(3, 2)).conj().imag * 2,
        torch.randn(0, 3).sum(0),
        torch.randint(0, 9, (5,)),
        torch.multinomial(torch.ones(5), 2),
    ]


def _autograd_grad_with_zeros(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients that are none are tensors without any memory below autograd."""
    x = x.clone().requires_grad_()
    left, right = torch.linalg.eigh(x.mT @ x)
    dual = torch.autograd.forward_ad
    with dual.dual_level():
        made = dual.unpack_dual(model(dual.make_dual(x.detach(), torch.ones_like(x))))
    return [*torch.autograd.grad(left.sum(), x), right, made.tangent]


WAYS: dict[str, Way] = {
    "adam": _adam(foreach=False),
    "foreach": _adam(foreach=True),
    "autocast": _autocast,
    "bfloat16": _half,
    "checkpoint": with_checkpoint(False),
    "reentrant checkpoint": with_checkpoint(True),
    "selective checkpoint": _selective_checkpoint,
    "functional_call": _functional_call,
    "func.grad": _func_grad,
    "vmap": _vmap,
    "gradients of samples": _per_sample,
    "hessian": _hessian,
    "inner loop": _inner_loop,
    "lora": _lora,
    "inference_mode": _inference,
    "no_grad": _no_grad,
    "closed form": closed_form,
    "hooks of tensors": _tensor_hooks,
    "autograd.Function": _custom_function,
    "saved tensors": _saved_tensors,
    "uncommon tensors": _uncommon,
    "forward mode": _autograd_grad_with_zeros,
}
if not hasattr(checkpoints, "CheckpointPolicy"):  # torch 2.4
    del WAYS["selective checkpoint"]


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_leaves_the_same_bits(way: str, tmp_path: Path) -> None:
    traced = compare(WAYS[way], tmp_path)
    assert traced.said == []
    assert traced.traced > 0.0


LEAVES: dict[str, Way] = {
    "masked_fill": lambda model, x: descend(
        model, model(x).masked_fill(x[..., :5] > 0, model.get_parameter("head.bias")[0] * 1)
    ),
    "prod": lambda model, x: descend(model, model(x).prod(-1)),
}


def test_inside_of_a_transform_it_leaves_later(tmp_path: Path) -> None:
    """Transforms put back the dispatch keys that they found."""
    before = keys()

    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        found = torch.func.grad(lambda z: torch.func.grad(lambda y: y.prod(-1).sum())(z).sin().sum())(x)
        batched = torch.func.vmap(torch.func.grad(lambda z: z.prod(-1).sum()))(x)
        descend(model, model(x) + found.sum())
        return [found, batched, torch.linalg.svdvals(x)]

    traced = compare(way, tmp_path)
    assert any("prod" in says for says in traced.said)
    assert keys() == before


@pytest.mark.parametrize("name", LEAVES)
def test_where_a_backward_would_be_computed_in_another_way_the_rest_of_the_edit_is_not_traced(
    name: str, tmp_path: Path
) -> None:
    traced = compare(LEAVES[name], tmp_path)
    assert any(name in says for says in traced.said)
