"""Each operator of torch's own database gives the same bits, forward and backward, while it is traced."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing

pytest.importorskip("expecttest", reason="torch's database of operators needs it: pip install expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES, FEW = 6, 2
PARTS = 8
ALIGNMENTS = 24
"""Runs of an operator without us, each with its tensors elsewhere in memory: some round by where they lie."""
UNWRITTEN = ("empty", "resize", "set_")
"""In the name of operators that give memory which holds anything."""

QUICK = (
    "add",
    "addmm",
    "baddbmm",
    "bmm",
    "cat",
    "clamp",
    "cumsum",
    "div.no_rounding_mode",
    "einsum",
    "exp",
    "gather",
    "index_put",
    "index_select",
    "linalg.cholesky",
    "linalg.cond",
    "linalg.det",
    "linalg.eigh",
    "linalg.eigvalsh",
    "linalg.inv",
    "linalg.lstsq.grad_oriented",
    "linalg.matrix_norm",
    "linalg.matrix_rank",
    "linalg.norm",
    "linalg.pinv",
    "linalg.solve",
    "linalg.svd",
    "linalg.svdvals",
    "linalg.vector_norm",
    "logsumexp",
    "masked_fill",
    "matmul",
    "nn.functional.conv2d",
    "nn.functional.cross_entropy",
    "nn.functional.embedding",
    "nn.functional.gelu",
    "nn.functional.layer_norm",
    "nn.functional.linear",
    "nn.functional.scaled_dot_product_attention",
    "norm.nuc",
    "prod",
    "scatter",
    "softmax",
    "sort",
    "svd",
    "var_mean",
    "where",
)


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


OPERATORS = {name_of(op): op for op in op_db if not any(word in name_of(op) for word in UNWRITTEN)}


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the database draws from it)


def fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def results(op: Any, sample: Any, tracer: Tracer | None) -> list[Tensor]:
    """All that it gives: its results, and the gradients of their squares."""
    seed()
    given, args, kwargs = tree_map(fresh, (sample.input, sample.args, sample.kwargs))
    leaves = [each for each in tree_leaves((given, args, kwargs)) if isinstance(each, Tensor) and each.requires_grad]
    with contextlib.nullcontext() if tracer is None else Tracing.entered(tracer):
        flat = [each for each in tree_leaves(op(given, *args, **kwargs)) if isinstance(each, Tensor)]
        found = [each.detach().clone() for each in flat]
        squares = [
            each * each for each in flat if each.requires_grad and (each.is_floating_point() or each.is_complex())
        ]
        if squares and leaves:
            seed()
            sums = [each.sum().real if each.is_complex() else each.sum() for each in squares]
            gradients = torch.autograd.grad(sums, leaves, allow_unused=True)
            found += [each.clone() for each in gradients if each is not None]
    return found


def plain(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(((plain(one) == plain(other)) | (plain(one).isnan() & plain(other).isnan())).all())
        for one, other in zip(left, right, strict=True)
    )


def is_as_without_us(op: Any, sample: Any, traced: list[Tensor]) -> bool:
    """Whether some run without us gives it too: one run, for nearly all operators. Those of LAPACK round by where their
    tensors lie in memory, so that two runs without us are not the same either.
    """
    kept = []
    for number in range(ALIGNMENTS):
        if same(results(op, sample, None), traced):
            return True
        kept.append(torch.empty(4 * number + 1))
    return False


def samples(op: Any, most: int = 1) -> Iterator[Any]:
    for gradients in (True, False) if op.supports_autograd else (False,):
        with contextlib.suppress(Exception):  # of a dtype that it does not have
            yield from list(op.sample_inputs("cpu", torch.float32, requires_grad=gradients))[:most]


def runs(op: Any, sample: Any) -> bool:
    try:
        results(op, sample, None)
    except Exception:  # such as one that has no backward for it
        return False
    return True


def check(name: str, most: int, **options: Any) -> int:
    """Returns how many samples were compared."""
    op, compared, seen = OPERATORS[name], 0, 0
    for sample in filter(functools.partial(runs, op), samples(op, most)):
        tracer = Tracer(1, **options)
        assert is_as_without_us(op, sample, results(op, sample, tracer)), f"{name}: sample {compared}"
        assert tracer.failure == ""
        seen += tracer.operations
        compared += 1
    assert seen > 0 or compared == 0 or name == "broadcast_shapes"  # which computes nothing
    return compared


@pytest.mark.parametrize("name", QUICK)
def test_an_operator_that_editing_uses(name: str) -> None:
    assert check(name, FEW) > 0


@pytest.mark.parametrize("name", ["addmm", "softmax", "linalg.norm", "nn.functional.layer_norm", "index_put"])
@pytest.mark.parametrize("option", ["ranges", "deferred"])
def test_an_operator_in_another_way_of_tracing(name: str, option: str) -> None:
    assert check(name, FEW, **{option: True}) > 0


def test_a_solve_by_least_squares_rounds_by_where_its_tensors_lie() -> None:
    """What makes `is_as_without_us` need more than one run. Where this fails, it needs only one."""
    op = OPERATORS["linalg.lstsq.grad_oriented"]
    sample = next(iter(samples(op)))
    kept, seen = [], [results(op, sample, None)]
    for number in range(ALIGNMENTS):
        kept.append(torch.empty(4 * number + 1))
        seen.append(results(op, sample, None))
    if all(same(seen[0], each) for each in seen):
        pytest.skip("not on this machine")


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
def test_every_operator(part: int) -> None:
    names = sorted(OPERATORS)[part::PARTS]
    failed, compared = [], 0
    for name in names:
        try:
            compared += check(name, SAMPLES)
        except Exception as error:
            failed.append(f"{name}: {error!r}")
    assert failed == []
    assert compared > len(names)
