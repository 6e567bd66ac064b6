"""The tracer's benchmark: how names are scored, that each loop has one truth, and three loops from end to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import wild, zoo
from benchmarks.overhead import Measured, added
from benchmarks.tracing import ours, peers
from benchmarks.tracing.scoring import (
    GROUPS,
    LOOPS,
    Heard,
    Named,
    Points,
    counts,
    document_of,
    figures,
    judged,
    named_by,
    points,
)
from benchmarks.tracing.table import accuracy, is_well, met, misses
from benchmarks.tracing.truths import TRUTHS, Truth
from stabilitylab.record.operations import Operation, Place

ROOT = TRUTHS["wild/root-of-zero"]
OPERATION = Operation(
    edit=22,
    phase="edit",
    operator="aten.div.Tensor",
    direction="backward",
    module="",
    place=Place("/somewhere/algebra.py", 101, "distance", "return (one - other).square().sum(-1).sqrt()"),
    made="producer",
    reach="weight",
    node="SqrtBackward0",
)


def named(**changes: object) -> Named:
    """What OPERATION names, changed."""
    found = named_by(replace(OPERATION, **changes))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_nothing_is_named_by_no_operation() -> None:
    assert named_by(None) is None


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, Points(True, True, True)),
        ({"operator": "aten.div_.Tensor"}, Points(True, True, True)),
        ({"operator": "aten.mul.Tensor"}, Points(False, True, True)),
        ({"node": "PowBackward0"}, Points(False, True, True)),
        ({"direction": "forward"}, Points(True, True, False)),
        ({"place": replace(OPERATION.place, file="/somewhere/lost.py")}, Points(True, False, True)),
        ({"place": replace(OPERATION.place, source="loss.backward()")}, Points(True, False, True)),
    ],
)
def test_points_of_an_operation(changes: dict[str, object], right: Points) -> None:
    assert points(ROOT, named(**changes)) == right


def test_a_node_alone_stands_for_its_operator() -> None:
    by_node = replace(named(), operator="")
    assert points(ROOT, by_node).operator
    assert not points(ROOT, replace(by_node, node="PowBackward0")).operator
    forward = Truth(("native_layer_norm",), "forward", (), ROOT.lines, "")
    assert points(forward, replace(by_node, node="NativeLayerNormBackward0")) == Points(True, True, False)
    assert not points(forward, replace(by_node, node="")).operator


def test_an_operator_without_a_node_is_enough_for_a_watch_that_tells_none() -> None:
    assert points(ROOT, replace(named(), node="")).operator


@pytest.mark.parametrize(
    ("loop", "what", "answer"),
    [
        ("wild/root-of-zero", named(), "right"),
        ("wild/root-of-zero", named(node="PowBackward0"), "partly"),
        ("wild/root-of-zero", named(node="", operator="aten.mul.Tensor", place=Place()), "wrong"),
        ("wild/root-of-zero", None, "silent"),
        ("wild/unwritten-head", named(made="arrived"), "right"),
        ("wild/unwritten-head", named(), "wrong"),
        ("wild/clipped-to-zero", named(), "wrong"),
        ("wild/two-keys", named(), "wrong"),
        ("zoo/healthy-grace", named(made="arrived"), "wrong"),
        ("zoo/healthy-grace", None, "silent"),
    ],
)
def test_answers(loop: str, what: Named | None, answer: str) -> None:
    assert judged(loop, what)[0] == answer


def test_a_second_truth_holds_only_without_a_canary() -> None:
    source = "variance = hidden_states.pow(2).mean(-1, keepdim=True)"
    square = named(
        operator="aten.mul.Scalar", node="PowBackward0", place=Place("/models/modeling_llama.py", 64, "forward", source)
    )
    assert judged("zoo/bit-flip", square)[0] == "wrong"
    assert judged("zoo/bit-flip", square, canary=False)[0] == "right"


def test_each_loop_that_is_not_held_out_is_in_one_group() -> None:
    loops = [f"wild/{case.name}" for case in (*wild.CASES, *wild.HEALTHY)]
    loops += [f"zoo/{each.name}" for each in (*zoo.SCENARIOS, *zoo.HEALTHY) if not each.held_out]
    assert Counter(loop for group in GROUPS.values() for loop in group) == Counter(loops)
    healthy = {f"wild/{case.name}" for case in wild.HEALTHY} | {f"zoo/{each.name}" for each in zoo.HEALTHY}
    assert {loop for loop, group in LOOPS.items() if group == "no-claim"} == healthy & set(loops)


def test_figures_and_tables() -> None:
    def heard(loop: str, what: Named | None) -> Heard:
        answer, right = judged(loop, what)
        return Heard(loop, LOOPS[loop], "on", answer, right, what)

    heards = [
        heard("wild/root-of-zero", named()),
        heard("wild/zero-scale", named()),
        heard("zoo/empty-mask", None),
        heard("wild/clipped-to-zero", None),
        heard("wild/two-keys", None),
        heard("zoo/healthy-grace", named()),
    ]
    found = figures(heards)
    assert [round((found[name].value or 0) * 3) for name in ("operator", "line", "direction", "right")] == [2, 1, 1, 1]
    assert counts(heards)["truth"] == {"right": 1, "partly": 1, "silent": 1}
    assert [is_well(each) for each in heards] == [True, False, False, True, True, False]
    document = document_of(heards)
    assert document["figures"]["right"]["hits"] == 1
    assert len(document["loops"]) == 6
    assert accuracy("", {"on": heards}).row_count == 1
    assert misses("", heards).row_count == 3


def test_a_cost_meets_its_goal_by_its_median_and_no_cost_by_its_interval() -> None:
    summary = {"median": 1.08, "low": 1.01, "high": 1.2}
    assert met(1.1, summary) is True
    assert met(1.05, summary) is False
    assert met(1.0, summary) is False
    assert met(1.0, summary | {"low": 0.99}) is True
    assert met(1.0, summary | {"low": None}) is None
    assert met(None, summary) is None


def test_what_a_variant_adds_is_told_round_by_round() -> None:
    measured = {"traced": Measured([3.0, 6.0], [2.0, 4.0]), "bare": Measured([2.0, 3.0], [2.0, 4.0])}
    assert added(measured, "traced", "bare") == [1.5, 2.0]


@pytest.mark.parametrize("loop", ["wild/unused-rows", "wild/corrected-by-zero", "wild/log-of-softmax"])
def test_three_loops_are_named_right(loop: str, tmp_path: Path) -> None:
    heard = ours.hear((loop, "on", tmp_path))
    assert heard.answer == "right", heard.named
    assert not heard.error
    assert not list(tmp_path.iterdir())


class Root(nn.Module):
    """Its backward at zero is 0/0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """√0, times what is called by name."""
        found: torch.Tensor = self.inner(x) * (x * 0).sqrt()
        return found


@contextmanager
def watched_by(peer: str, model: nn.Module) -> Iterator[list[Named]]:
    """What a peer names of a backward through `model` on `x`."""
    found: list[Named] = []
    x = torch.ones(1, 2, requires_grad=True)
    try:
        with peers.PEERS[peer](model, found):
            model(x).sum().backward()
    except (RuntimeError, ValueError):
        pass
    yield found


def test_what_peers_name_of_a_root_of_zero() -> None:
    with watched_by("detect_anomaly", Root()) as found:
        assert found[0].node in ("SqrtBackward0", "MulBackward0")
        assert found[0].lines == (("test_tracing.py", "found: torch.Tensor = self.inner(x) * (x * 0).sqrt()"),)
    with watched_by("DebugMode", Root()) as found:
        assert (found[0].operator, found[0].direction) == ("div", "backward")
    model = Root()
    with torch.no_grad():
        model.inner.weight.fill_(float("inf"))
    with watched_by("DebugUnderflowOverflow", model) as found:
        assert found[0].says == "module inner Linear"
        assert ("test_tracing.py", "        found: torch.Tensor = self.inner(x) * (x * 0).sqrt()") in found[0].lines
    assert not any(module._forward_hooks for module in model.modules())
