"""A model under torch.compile: as many graphs as without us, the same bits, and what can't be seen is said at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import stabilitylab as sl
from stabilitylab.watching.compiled import inside_compiled
from stabilitylab.watching.walking import named_modules_of

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""The compiler's own, about what it traces."""

CANARY = {"input": torch.linspace(-1, 1, 3 * 8).reshape(3, 8)}
EDITS = 3


class Block(nn.Module):
    """With a normalisation, which is hooked too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.fc2(torch.relu(self.norm(self.fc1(x))))
        return found


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 5))


def around(model: nn.Sequential) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return compiled


def in_one_graph(model: nn.Sequential) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[assignment]
    return compiled


def in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="eager")
    return model


def by_block(model: nn.Sequential) -> nn.Module:
    for block in model[:2]:
        block.compile(backend="eager")
    return model


def as_a_function(model: nn.Sequential) -> nn.Module:
    """Nothing tells of the model that is called inside."""

    def forward(x: Tensor) -> Tensor:
        found: Tensor = model(x)
        return found

    compiled: nn.Module = torch.compile(forward, backend="eager")  # type: ignore[assignment]
    return compiled


WAYS = [around, in_place, by_block]


class Made(NamedTuple):
    """What a loop left: how many graphs, breaks and gradients; outputs and weights."""

    graphs: int
    breaks: int
    gradients: list[float]
    tensors: list[Tensor]


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loop(way: Callable[[nn.Sequential], nn.Module], run: Path | None, order: str, canary: bool = False) -> Made:
    """Without `run` nothing is watched."""
    torch._dynamo.reset()
    counters.clear()
    model = two_blocks()
    options = {"announce": False, "canary": CANARY if canary else None}

    def attached(watched: nn.Module) -> sl.Monitor | None:
        return None if run is None else sl.attach(watched, "*fc*", run, **options)  # type: ignore[arg-type]

    early = attached(model) if order == "attach first" else None
    compiled = way(model)
    monitor = early or attached(compiled if order == "attach to what is compiled" else model)
    optimizer, outputs, gradients = torch.optim.SGD(model.parameters(), 0.1), [], []
    for edit in range(EDITS):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(edit))
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            optimizer.zero_grad()
            outputs.append(compiled(x))
            outputs[-1].pow(2).mean().backward()
            gradient = model[0].fc1.weight.grad
            gradients.append(float(gradient.norm()))
            optimizer.step()
    if monitor is not None:
        monitor.close()
    tensors = [*(each.detach() for each in outputs), *(each.detach() for each in model.parameters())]
    return Made(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), gradients, tensors)


@functools.cache
def bare_loop(way: Callable[[nn.Sequential], nn.Module]) -> Made:
    return loop(way, None, "")


FIRST, THEN, ON_TOP = "attach first", "compile first", "attach to what is compiled"


@pytest.mark.parametrize(
    ("way", "order"),
    [
        (around, FIRST),
        (around, THEN),
        (around, ON_TOP),
        (in_one_graph, FIRST),
        (in_place, FIRST),
        (by_block, THEN),
        (as_a_function, FIRST),
        (as_a_function, THEN),
    ],
)
def test_graphs_and_bits_are_those_without_us_and_what_is_not_seen_is_said_after_one_edit(
    tmp_path: Path, way: Callable[[nn.Sequential], nn.Module], order: str
) -> None:
    bare, watched = bare_loop(way), loop(way, tmp_path / "run", order)
    assert (watched.graphs, watched.breaks) == (bare.graphs, bare.breaks)
    assert all(map(torch.equal, watched.tensors, bare.tensors))
    run = sl.load(tmp_path / "run")
    said = [note for note in run.notes if note.kind == "hooks-silent"]
    assert [note.edit for note in said] == [1]
    assert "not seen" in said[0].says
    assert "compile" in said[0].says
    site = next(name for name in run.sites_of("update.norm") if name.endswith("0.fc1"))
    assert (run.series("update.norm", site)[1:] > 0).all()
    np.testing.assert_allclose(run.series("gradient.norm", site)[1:], watched.gradients, rtol=1e-5)
    assert "probe-off" not in {note.kind for note in run.notes}
    assert run.diagnosis().unwatched


def test_an_optimizers_step_that_is_compiled_is_compiled_once(tmp_path: Path) -> None:
    made = []
    for run in (None, tmp_path / "run"):
        torch._dynamo.reset()
        counters.clear()
        model = two_blocks()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = torch.compile(optimizer.step, backend="eager")
        monitor = None if run is None else sl.attach(model, "*fc*", run, announce=False)
        for _ in range(EDITS):
            with contextlib.nullcontext() if monitor is None else monitor.edit():
                optimizer.zero_grad()
                model(torch.ones(4, 8)).pow(2).mean().backward()
                step()
        if monitor is not None:
            monitor.close()
        made.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert made[1] == made[0]
    assert (sl.load(tmp_path / "run").series("update.norm", "0.fc1")[1:] > 0).all()


def test_a_layer_beside_what_is_compiled_is_seen_as_ever(tmp_path: Path) -> None:
    model = two_blocks()
    by_block(model)
    with sl.attach(model, ["0.fc1", "2"], tmp_path / "run", announce=False) as monitor:
        for _ in range(2):
            with monitor.edit():
                model(torch.randn(4, 8)).sum().backward()
    run = sl.load(tmp_path / "run")
    assert run.present("activation.rms", "2")[1:].all()
    assert "0.fc1" not in run.sites_of("activation.rms")
    (said,) = [note.says for note in run.notes if note.kind == "hooks-silent"]
    assert said.startswith("0.fc1: compiled (0)")


def test_what_is_compiled_anew_is_found_when_something_else_is_no_more() -> None:
    for _ in range(3):
        model = two_blocks()
        compiled = torch.compile(model, backend="eager")
        assert inside_compiled(named_modules_of(model))[id(model[0].fc1)] == "the model"
        del compiled
        assert not inside_compiled(named_modules_of(two_blocks()))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 and newer can run a canary uncompiled")
@pytest.mark.parametrize("way", WAYS)
def test_a_canary_has_nothing_compiled_and_sees_what_edits_do(
    tmp_path: Path, way: Callable[[nn.Sequential], nn.Module]
) -> None:
    bare, watched = bare_loop(way), loop(way, tmp_path / "run", ON_TOP, canary=True)
    assert watched.graphs == bare.graphs
    assert all(map(torch.equal, watched.tensors, bare.tensors))
    run = sl.load(tmp_path / "run")
    assert (run.series("canary.kl", "model")[1:] > 0).all()
    assert not run.diagnosis().unwatched
    assert [note.edit for note in run.notes if note.kind == "compiled"] == [1]
