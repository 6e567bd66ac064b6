"""The tracer names the first operation whose result is not finite, with its line; and nothing where there is none."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import stabilitylab as sl
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing
from stabilitylab.record.operations import Operation

IMMEDIATE = {"deferred": False}
BOTH = pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])


def traced(act: Callable[..., Any], *models: nn.Module, **options: Any) -> Operation | None:
    """What is named of one edit. `act` is told the tracer's models."""
    tracer = Tracer(7, **options)
    for model in models:
        model.register_forward_hook(lambda _, __, output: tracer.gave(output))
    with Tracing.entered(tracer):
        act(*models)
    tracer.seal(models)
    operation = tracer.finish()
    assert (tracer.failure, tracer.stopped) == ("", "")
    assert tracer.operations > 0
    return operation


def named(act: Callable[..., Any], *models: nn.Module, **options: Any) -> Operation:
    operation = traced(act, *models, **options)
    assert operation is not None
    return operation


def line(operation: Operation, act: Callable[..., Any], source: str) -> None:
    """The place is the line of `act` that reads so."""
    lines, first = inspect.getsourcelines(act)
    (offset,) = [number for number, text in enumerate(lines) if source in text]
    place = operation.place
    assert (Path(place.file), place.line, place.function) == (Path(__file__), first + offset, act.__name__)
    assert source in place.source


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


# -- what is named ----------------------------------------------------------------------------------------------------


@BOTH
def test_an_overflow_in_a_layers_forward(deferred: bool) -> None:
    model = small().half()
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[0].bias.zero_()

    def edit(model: nn.Module) -> None:
        x = torch.ones(2, 4, dtype=torch.float16) * 100
        model(x).sum()

    found = named(edit, model, deferred=deferred)
    assert (found.operator, found.direction, found.module, found.made) == (
        "aten.addmm.default",
        "forward",
        "0",
        "producer",
    )
    assert (found.edit, found.phase, found.reach, found.value) == (7, "edit", "output", "∞")
    line(found, edit, "model(x).sum()")
    weight = next(each for each in found.operands if each.name == "mat2 (0.weight)")
    assert (weight.shape, weight.dtype) == ((4, 8), "float16")
    if deferred:
        assert found.result is found.index is weight.least is None
    else:
        assert (weight.least, weight.greatest, weight.nonfinite) == (300.0, 300.0, 0)
        assert found.result is not None
        assert (found.index, found.result.nonfinite, found.result.shape) == ((0, 0), 16, (2, 8))
    assert [step.operator for step in found.chain][:2] == ["aten.relu.default", "aten.addmm.default"]
    assert [step.module for step in found.chain][:2] == ["1", "2"]


@BOTH
def test_an_overflow_in_a_cast(deferred: bool) -> None:
    def edit() -> None:
        big = torch.full((3,), 1e5)
        low = big.half()
        low.sum()

    found = named(edit, deferred=deferred)
    assert (found.operator, found.value, found.reach) == ("aten._to_copy.default", "∞", "loss")
    line(found, edit, "big.half()")


@BOTH
def test_nothing_by_nothing_in_an_editors_algebra(deferred: bool) -> None:
    model = small()

    def rank_one(model: nn.Module) -> None:
        left, right = torch.zeros(8), torch.ones(4)
        scale = left @ left
        update = torch.outer(left / scale, right)
        model.get_parameter("0.weight").data += update

    found = named(rank_one, model, deferred=deferred)
    assert (found.operator, found.value, found.made) == ("aten.div.Tensor", "NaN", "producer")
    assert (found.reach, found.reached, found.module) == ("weight", "0.weight", "")
    line(found, rank_one, "left / scale")
    assert [operand.name for operand in found.operands] == ["self", "other"]
    if not deferred:
        assert found.index == (0,)
        assert [(each.least, each.greatest) for each in found.operands] == [(0.0, 0.0), (0.0, 0.0)]
    assert [step.operator for step in found.chain][-1] == "aten.add_.Tensor"


@BOTH
def test_a_backward_has_the_line_of_its_forward(deferred: bool) -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        distance = (model[0].weight - model[0].weight.detach()).pow(2).sum()
        root = distance.sqrt()
        loss = root * 0.0 + model(torch.ones(1, 4)).sum()
        loss.backward()

    found = named(edit, model, deferred=deferred)
    assert (found.direction, found.node, found.operator) == ("backward", "SqrtBackward0", "aten.div.Tensor")
    assert (found.reach, found.reached) == ("gradient", "0.weight")
    line(found, edit, "distance.sqrt()")


@BOTH
def test_a_backward_in_a_layer_has_the_layer_of_its_forward(deferred: bool) -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Root())
    nn.init.zeros_(model[0].weight)
    found = named(lambda model: model(torch.ones(2, 4)).sum().backward(), model, deferred=deferred)
    assert (found.module, found.direction, found.place.function) == ("1", "backward", "forward")
    line(found, Root.forward, "sqrt()")


class Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x


@BOTH
def test_a_backward_in_python_has_a_line_of_its_own(deferred: bool) -> None:
    def edit(model: nn.Module) -> None:
        Inverse.apply(model[0].bias).sum().backward()

    model = small()
    nn.init.zeros_(model[0].bias)
    found = named(edit, model, deferred=deferred)
    assert (found.direction, found.node, found.operator) == ("backward", "InverseBackward", "aten.div.Tensor")
    line(found, Inverse.backward, "gradient / x")
    assert (found.reach, found.reached) == ("gradient", "0.bias")


@BOTH
@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizers_step_has_the_line_that_asked_for_it(foreach: bool, deferred: bool) -> None:
    def edit(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=0.0, foreach=foreach)
        (model(torch.ones(2, 4)).sum() * 0).backward()
        optimizer.step()

    found = named(edit, small(), deferred=deferred)
    assert found.operator in (
        "aten.addcdiv_.default",
        "aten._foreach_addcdiv_.Scalar",
        "aten._foreach_addcdiv_.ScalarList",
    )
    assert (found.reach, found.value, found.direction) == ("weight", "NaN", "forward")
    line(found, edit, "optimizer.step()")


@BOTH
def test_operations_in_place(deferred: bool) -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        rows = model[0].weight.data
        rows.div_(rows.new_zeros(()))
        rows.mul_(2.0)

    found = named(edit, model, deferred=deferred)
    assert (found.operator, found.reach, found.reached) == ("aten.div_.Tensor", "weight", "0.weight")
    line(found, edit, "rows.div_")
    assert [step.operator for step in found.chain] == ["aten.mul_.Tensor"]


def test_a_part_of_a_weight_that_is_written() -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        weight = model[0].weight.data
        weight[1, 2:] = torch.zeros(2).log()

    found = named(edit, model)
    assert (found.operator, found.reach, found.reached, found.value) == ("aten.log.default", "weight", "0.weight", "−∞")
    line(found, edit, "log()")


@BOTH
def test_a_value_that_was_in_a_weight_before(deferred: bool) -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    found = named(lambda model: model(torch.ones(2, 4)).sum().backward(), model, deferred=deferred)
    assert (found.made, found.operator, found.value) == ("arrived", "aten.addmm.default", "NaN")
    assert (found.reach, found.reached) == ("weight", "0.weight")
    if not deferred:
        assert [(each.name, each.nonfinite) for each in found.operands] == [("mat2 (0.weight)", 1)]


@BOTH
def test_a_logarithm_of_nothing_that_reaches_a_weight(deferred: bool) -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        probability = torch.zeros(3)
        shift = probability.log()
        model[2].bias.data.add_(shift)

    found = named(edit, model, deferred=deferred)
    assert (found.operator, found.value, found.reach, found.reached) == ("aten.log.default", "−∞", "weight", "2.bias")
    line(found, edit, "probability.log()")


@BOTH
def test_a_gradient_where_only_the_result_is_masked(deferred: bool) -> None:
    def edit(model: nn.Module) -> None:
        scale = model[2].bias
        safe = torch.where(scale > 0, 1 / scale, torch.zeros(3))
        safe.sum().backward()

    model = small()
    nn.init.zeros_(model[2].bias)
    found = named(edit, model, deferred=deferred)
    assert (found.reach, found.reached) == ("gradient", "2.bias")
    line(found, edit, "1 / scale")


@BOTH
def test_the_forward_that_a_checkpoint_makes_again_has_its_own_line(deferred: bool) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    for reentrant in (False, True):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), Root())
        nn.init.zeros_(model[0].weight)
        found = named(
            lambda model, reentrant=reentrant: (
                checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()
            ),
            model,
            deferred=deferred,
        )
        assert (found.direction, found.module) == ("backward", "1")
        line(found, Root.forward, "sqrt()")


def test_modules_of_a_copy_that_is_made_inside_of_the_edit() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    made: list[nn.Module] = []

    def edit() -> None:
        made.append(copy.deepcopy(model))
        made[0](torch.ones(2, 4) * 100)

    tracer = Tracer(1)
    with Tracing.entered(tracer):
        edit()
    tracer.seal([made[0], model])
    found = tracer.finish()
    assert found is not None
    assert (found.module, found.operator) == ("0", "aten.addmm.default")


def test_modules_of_a_copy_that_is_thrown_away_are_named_through_a_monitor(tmp_path: Path) -> None:
    model = small()
    with sl.attach(model, "0", tmp_path / "run", trace=True, announce=False) as monitor, monitor.edit() as edit:
        twin = edit.returns(copy.deepcopy(model))
        with torch.no_grad():
            twin[0].weight.fill_(3e38)
        twin(torch.ones(2, 4) * 100)
    (found,) = sl.load(tmp_path / "run").operations
    assert (found.module, found.edit, found.reach) == ("0", 1, "output")


def test_one_of_two_that_came_as_far_is_the_first() -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        first = torch.zeros(3) / 0
        second = torch.zeros(3).log()
        model[2].bias.data += second
        model[2].bias.data += first

    line(named(edit, model), edit, "torch.zeros(3) / 0")


def test_what_ends_in_a_weight_comes_before_what_ends_in_a_loss() -> None:
    model = small()

    def edit(model: nn.Module) -> None:
        loss = (torch.ones(3) / torch.zeros(3)).sum()
        assert loss.isinf()
        model[2].bias.data += torch.zeros(3).log()

    line(named(edit, model), edit, "log()")


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


def test_the_backward_of_what_had_no_value_belongs_to_its_forward() -> None:
    def mean_of_none() -> None:
        given = torch.ones(3, requires_grad=True)
        counts = torch.zeros(3)
        loss = (given * counts).sum() / counts.sum()
        loss.backward()

    operation = named(mean_of_none)
    assert (operation.short, operation.direction) == ("div", "forward")


def test_a_nan_that_is_written_down_is_no_mask() -> None:
    def spoil(model: nn.Module) -> None:
        weight = next(model.parameters())
        with torch.no_grad():
            weight.copy_(torch.full_like(weight, float("nan")))

    operation = named(spoil, small())
    assert (operation.short, operation.made, operation.reach) == ("full_like", "producer", "weight")
