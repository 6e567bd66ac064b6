"""What the tracer takes for no fault: what was asked for, what came to nothing, and what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing
from tests.traced_edits import BOTH, line, named, small, traced

# -- what was asked for -----------------------------------------------------------------------------------------------


def attend(mask: Tensor) -> Tensor:
    scores = torch.randn(3, 3, requires_grad=True) + mask
    weights = functional.softmax(scores, dim=-1)
    return weights @ torch.ones(3, 2)


@BOTH
@pytest.mark.parametrize("way", ["added", "filled", "where", "fused"])
def test_a_mask_that_a_softmax_eats_is_no_fault(way: str, deferred: bool) -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        allowed = torch.ones(3, 3, dtype=torch.bool).tril()
        scores = model[2](model[1](model[0](torch.randn(3, 4))))
        if way == "added":
            scores = scores + torch.full((3, 3), -math.inf).triu(1)
        elif way == "filled":
            scores = scores.masked_fill(~allowed, -math.inf)
        elif way == "where":
            scores = torch.where(allowed, scores, -math.inf)
        else:
            functional.scaled_dot_product_attention(scores[None], scores[None], scores[None], allowed).sum().backward()
            return
        functional.softmax(scores, dim=-1).pow(2).sum().backward()

    assert traced(edit, model, deferred=deferred) is None


@BOTH
@pytest.mark.parametrize("way", ["eager", "log_softmax"])
def test_a_row_that_is_masked_whole_is_the_softmaxs(way: str, deferred: bool) -> None:
    def edit() -> None:
        scores = torch.randn(3, 3).masked_fill(torch.tensor([[False], [True], [False]]), -math.inf)
        attended = functional.softmax(scores, dim=-1) if way == "eager" else functional.log_softmax(scores, dim=-1)
        attended.sum()

    found = named(edit, deferred=deferred)
    assert found.operator == ("aten._softmax.default" if way == "eager" else "aten._log_softmax.default")
    assert (found.value, found.made) == ("NaN", "producer")
    if not deferred:
        assert found.index == (1, 0)


@BOTH
def test_an_infinity_that_was_asked_for_and_is_added_up(deferred: bool) -> None:
    def edit() -> None:
        scores = torch.randn(3, 3).masked_fill(torch.eye(3).bool(), -math.inf)
        loss = scores.mean()
        loss * 2

    found = named(edit, deferred=deferred)
    assert (found.operator, found.value, found.reach) == ("aten.mean.default", "−∞", "loss")
    line(found, edit, "scores.mean()")


def test_two_masks_are_a_mask() -> None:
    def edit() -> None:
        mask = torch.full((3, 3), -math.inf).triu(1)
        mask = mask + torch.full((3, 3), -math.inf).triu(2)
        functional.softmax(torch.randn(3, 3) + mask, dim=-1).sum()

    assert traced(edit) is None


def test_a_mask_that_the_model_keeps_is_no_fault() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return functional.softmax(x * self.scale + self.mask, dim=-1)

    assert traced(lambda model: model(torch.randn(3, 3)).pow(2).sum().backward(), Masked()) is None
    assert traced(lambda model: model(torch.randn(3, 3)).pow(2).sum().backward(), Masked(), deferred=True) is None


def test_the_best_so_far_begins_at_infinity() -> None:
    def edit() -> None:
        best = torch.tensor(math.inf)
        for loss in torch.rand(3):
            best = torch.minimum(best, loss)
        assert best.isfinite()

    assert traced(edit) is None


def test_gradients_that_a_scaler_skips_are_named_as_gradients() -> None:
    model = small()
    before = [each.clone() for each in model.state_dict().values()]

    def edit(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaled = model(torch.ones(2, 4)).sum() * 1e38 * 1e5
        scaled.backward()
        if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            optimizer.step()

    found = named(edit, model)
    assert found.reach == "gradient"
    assert (found.operator, found.value[-1]) == ("aten.mul.Tensor", "∞")
    line(found, edit, "* 1e38 * 1e5")
    assert all(map(torch.equal, before, model.state_dict().values()))


# -- no false hits ----------------------------------------------------------------------------------------------------


def garbage(*shape: int) -> Tensor:
    """Memory that is not written yet, with a NaN in every entry: written past torch, where no mode sees it."""
    found = torch.empty(*shape)
    np.asarray(memoryview(found.numpy()))[...] = math.nan  # type: ignore[call-overload]
    return found


FILLED: dict[str, Callable[[Tensor], Any]] = {
    "slices": lambda x: [x[:2].fill_(1.0), x[2:].copy_(torch.ones(2, 3))],
    "rows": lambda x: [x.__setitem__(row, torch.randn(3)) for row in range(4)],
    "index_put": lambda x: [x.index_put_((torch.tensor(row),), torch.randn(3)) for row in ([0, 1], [2, 3])],
    "index_copy": lambda x: x.index_copy_(0, torch.arange(4), torch.randn(4, 3)),
    "scatter": lambda x: x.scatter_(1, torch.arange(3).expand(4, 3), torch.randn(4, 3)),
    "copy": lambda x: x.copy_(torch.randn(4, 3)),
    "zero": lambda x: x.zero_(),
    "normal": nn.init.normal_,
    "out": lambda x: torch.randn(4, 3, out=x),
    "out of mm": lambda x: torch.mm(torch.randn(4, 2), torch.randn(2, 3), out=x),
    "views": lambda x: [part.copy_(torch.ones(3)) for part in x.unbind()],
}


@BOTH
@pytest.mark.parametrize("way", FILLED)
def test_memory_that_is_not_written_yet_is_nobodys_fault(way: str, deferred: bool) -> None:
    def edit() -> None:
        buffer = garbage(4, 3)
        FILLED[way](buffer)
        assert (buffer * 2).isfinite().all()
        (buffer.sum() + 1).item()

    assert traced(edit, deferred=deferred) is None


@BOTH
def test_a_buffer_that_is_written_anew_is_forgotten(deferred: bool) -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        buffer = torch.zeros(8) / torch.zeros(8)
        buffer.zero_()
        model[0].bias.data += buffer
        model(torch.ones(2, 4)).sum().backward()

    found = traced(edit, model, deferred=deferred)
    assert found is None or found.reach == "values"


def test_memory_that_is_used_again_does_not_bear_its_former_fault() -> None:
    """Where a tensor dies, the next gets its memory."""
    model = small()

    def edit(model: nn.Module) -> None:
        for _ in range(20):
            bad = torch.zeros(8) / torch.zeros(8)
            del bad
            good = torch.ones(8) * 2
            good[:2].log()
            del good
        model[0].bias.data += torch.zeros(8).log()

    found = named(edit, model)
    assert (found.operator, found.reach) == ("aten.log.default", "weight")


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_large_finite_values_are_no_hit(dtype: torch.dtype, deferred: bool) -> None:
    def edit() -> None:
        large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
        (large * 1.0).neg()
        torch.stack([large, -large])

    assert traced(edit, deferred=deferred) is None


@BOTH
def test_tensors_that_are_no_dense_floats(deferred: bool) -> None:
    def edit() -> None:
        indices = torch.tensor([[0, 1], [1, 0]])
        sparse = torch.sparse_coo_tensor(indices, torch.tensor([1.0, math.inf]), (2, 2), check_invariants=True)
        (sparse * 2).to_dense().sum()
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
        (nested * 2).cos()
        torch.ones(3, device="meta") / 0
        torch.randn(4).to(torch.float8_e4m3fn).view(torch.int8)
        (torch.complex(torch.ones(2), torch.zeros(2)) / 0).abs()
        torch.zeros(0, 3).log()
        torch.tensor(1.0).exp().item()
        torch.randint(0, 2, (4,)).bool().any()
        torch._efficientzerotensor(3)  # type: ignore[attr-defined]
        torch._foreach_exp([torch.zeros(2), torch.zeros(()), torch.zeros(0)])

    tracer = Tracer(1, deferred=deferred)
    with Tracing.entered(tracer):
        edit()
    tracer.seal([])
    tracer.finish()
    assert tracer.failure == ""


@BOTH
def test_several_tensors_of_one_call(deferred: bool) -> None:
    def edit() -> None:
        good, bad = torch.ones(2), torch.zeros(2)
        torch._foreach_log_([good, bad])

    found = named(lambda: (edit(), torch.zeros(1) / 0), deferred=deferred)  # −∞ alone comes to nothing
    assert found.operator == "aten.div.Tensor"

    def division() -> None:
        good, bad = torch.ones(2), torch.zeros(2)
        torch._foreach_div_([good, bad], [good * 2, bad * 2])

    found = named(division, deferred=deferred)
    assert found.operator.startswith("aten._foreach_div_")
    line(found, division, "torch._foreach_div_")


@BOTH
def test_an_infinity_that_was_in_a_weight_before_is_no_mask(deferred: bool) -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    found = named(lambda model: model(torch.ones(2, 4)).sum(), model, deferred=deferred, model=model)
    assert (found.made, found.operator, found.value, found.reached) == (
        "arrived",
        "aten.addmm.default",
        "∞",
        "0.weight",
    )


def test_memory_that_is_made_larger_holds_anything() -> None:
    def edit() -> None:
        grown = torch.ones(2)
        garbage(4096)
        grown.resize_(4096)
        grown.fill_(1.0)

    assert traced(edit) is None


def test_an_infinity_that_comes_to_nothing_is_not_named() -> None:
    def edit() -> None:
        torch.zeros(3).log().exp()
        torch.ones(3).div(0).reciprocal()

    assert traced(edit) is None


def test_a_failure_of_ours_ends_the_tracing_and_not_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, model = Tracer(1), small()

    def fail(*_: object) -> None:
        raise RuntimeError("ours")

    with Tracing.entered(tracer):
        model(torch.ones(2, 4))
        monkeypatch.setattr(tracer, "_is_sound", fail)
        y = model(torch.ones(2, 4))
        seen = tracer.operations
        y.sum().backward()
    assert tracer.failure == "RuntimeError: ours"
    assert tracer.operations == seen
    assert tracer.finish() is None


def test_no_tensor_outlives_the_edit() -> None:
    tracer = Tracer(1)
    with Tracing.entered(tracer):
        bad = torch.zeros(50) / 0
        later = bad * 2
    held = torch.multiprocessing.reductions.StorageWeakRef(later.untyped_storage())
    del bad, later
    assert held.expired()
    tracer.finish()
