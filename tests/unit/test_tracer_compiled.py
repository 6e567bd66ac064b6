"""The tracer beside compiled code, TorchScript and transforms, and on an accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing, why_untraceable
from tests.traced_loops import (
    EDITS,
    Model,
    Operators,
    Trace,
    assert_same,
    compare,
    descend,
    keys,
    step,
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- code that is compiled --------------------------------------------------------------------------------------------


class Graphs:
    """A compiler that counts."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(str(module.graph))
        return module.forward


def compiled_loop(
    way: Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor], trace: Trace, folder: Path
) -> Any:
    """(what was computed; how many graphs there were after each edit; the graphs; what the run said)."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    counted, model = Graphs(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    @torch.compile(backend=counted)
    def loss(y: Tensor) -> Tensor:
        z = torch.linalg.norm(y.softmax(-1).masked_fill(y > 1, 0.5))
        if z > 1e6:  # breaks the graph
            z = z + 1
        return z * y.sin().sum()

    monitor = None if trace is None else sl.attach(model, "0", folder / f"{trace}", trace=trace, announce=False)
    seen, graphs = [], []
    for _ in range(3):
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            seen.append(way(model, loss, torch.randn(3, 8)))
        graphs.append(len(counted.graphs))
        seen.append(loss(torch.randn(3, 4)).detach().clone())
        graphs.append(len(counted.graphs))
    said = []
    if monitor is not None:
        monitor.close()
        said = [note.says for note in sl.load(folder / f"{trace}").notes if note.kind == "trace-off"]
    return [*seen, *model.parameters()], graphs, counted.graphs, said


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_what_is_compiled_first_inside_of_an_edit_is_compiled_as_without_us(tmp_path: Path) -> None:
    def way(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = model(x)
        found = loss(y)
        step(model, found)
        return found.detach().clone()

    (plain, *graphs, _), (untraced, *others, _), (traced, *own, said) = (
        compiled_loop(way, trace, tmp_path) for trace in (None, False, True)
    )
    assert_same(plain, untraced)
    assert_same(plain, traced)
    assert graphs == others == own
    assert graphs[0][1] == graphs[0][-1] > 0  # and is not compiled again
    assert "Python" not in keys()
    assert said == [
        "from there on operations are not traced in an edit: torch.compile is in use",
        "operations are not traced: torch.compile is in use",
    ]


def _scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4))


def _fast() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))


def _compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 4))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "why"), [(_scripted, "TorchScript"), (_fast, "TransformerEncoder"), (_compiled, "compiled")]
)
def test_models_that_are_left_alone(make: Callable[[], nn.Module], why: str, tmp_path: Path) -> None:
    traced = compare(lambda model, x: descend(model, model(x)), tmp_path, make, "1")
    assert traced.traced == 0.0
    assert any(why in says for says in traced.said)


def test_an_edit_inside_of_a_transform_is_left_alone() -> None:
    said: list[str | None] = []
    torch.func.grad(lambda x: (said.append(why_untraceable(nn.Linear(2, 2))), x.sum())[1])(torch.ones(2))
    assert said == ["the edit is inside a transform of torch.func"]
    assert why_untraceable(nn.Linear(2, 2)) is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_functions_in_torchscript_and_what_is_traced_there(tmp_path: Path) -> None:
    def plain(x: Tensor) -> Tensor:
        return torch.relu(x * 2).sum() / x.norm()

    kinds: list[list[str]] = []

    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        script, traced = torch.jit.script(plain), torch.jit.trace(plain, x)
        kinds.append([node.kind() for node in traced.graph.nodes()])
        made = torch.fx.experimental.proxy_tensor.make_fx(plain)(x)
        kinds.append([str(node.target) for node in made.graph.nodes])
        for _ in range(3):
            step(model, script(model(x)))
        return [traced(x), made(x), *model.parameters()]

    compare(way, tmp_path)
    assert kinds[:2] * (3 * EDITS) == kinds


def test_higher_order_operators(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        y = model(x)
        return [torch.cond(x.sum() > 0, lambda z: z.sin(), lambda z: z.cos(), (y.detach(),))]

    compare(way, tmp_path)


# -- an accelerator ---------------------------------------------------------------------------------------------------


class Reads(Operators):
    """Operators by which Python waits for a value."""

    def waits(self) -> list[str]:
        return [name for name in self.seen if "_local_scalar_dense" in name or "is_nonzero" in name or "equal" in name]


def test_nothing_is_read_before_the_edit_is_over() -> None:
    """`_DisableTorchDispatch` hides what is read from any mode, so the bindings themselves are watched."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 5, 8)
    tracer = Tracer(1, deferred=True)
    read: list[str] = []

    def forbid(name: str) -> Callable[..., Any]:
        def said(*_: Any, **__: Any) -> Any:
            read.append(name)
            raise AssertionError(name)

        return said

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "isfinite")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, forbid(name))
        with Tracing.entered(tracer):
            y = model(x)
            bad = (y - y) / (y - y)
            (y.pow(2).mean() + bad.sum()).backward()
        assert (read, tracer.failure) == ([], "")
    tracer.seal([model])
    operation = tracer.finish()
    assert operation is not None
    assert operation.operator == "aten.div.Tensor"
    assert tracer.failure == ""
