"""The tracer names the first operation whose result is not finite, with its line; and nothing where there is none."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stabilitylab as sl
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing
from tests.traced_edits import BOTH, line, named, small

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
