"""A loop of edits on a small model, made with the tracer, without it and without any monitor: what each has left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

import stabilitylab as sl
from tests.loops import hooks_on

Trace = bool | None
"""None for no monitor at all."""
EDITS = 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        y = functional.dropout(functional.softmax(q @ k.mT / 2 + mask, dim=-1), 0.1, self.training) @ v
        z: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return z


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.relu(self.second(self.first(x))))
        return z


def modes() -> tuple[list[Any], list[Any], bool]:
    """What is entered in this thread."""
    functions = [torch._C._get_function_stack_at(at) for at in range(torch._C._len_torch_function_stack())]
    dispatch = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
    return functions, dispatch, is_in_torch_dispatch_mode()


class Left(NamedTuple):
    """What a loop left. said: why it was not traced."""

    tensors: list[Tensor]
    said: list[str]
    traced: float


Way = Callable[[nn.Module, Tensor], Sequence[Tensor | None]]


def loop(way: Way, trace: Trace, folder: Path, make: Callable[[], nn.Module] = Model, sites: str = "head") -> Left:
    """A loop of a few edits, and everything that it computed, the random state included."""
    torch._dynamo.reset()
    torch.manual_seed(7)
    model = make()
    before = modes()
    seen: list[Tensor] = []
    monitor = None
    if trace is not None:
        folder = folder / f"{trace}"
        monitor = sl.attach(model, sites, folder, trace=trace, announce=False, probes="light")
    for _ in range(EDITS):
        x = torch.randn(3, 5, 8)
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            seen += [each.detach().clone() for each in way(model, x) if each is not None]
        assert modes() == before
        seen += [each.detach().clone() for each in (*model.parameters(), *model.buffers())]
        seen += [each.grad.clone() for each in model.parameters() if each.grad is not None]
    seen.append(torch.get_rng_state())
    assert hooks_on(model) == 0
    if monitor is None:
        return Left(seen, [], 0.0)
    monitor.close()
    run = sl.load(folder)
    return Left(seen, [note.says for note in run.notes if note.kind == "trace-off"], run.trace_time_share or 0.0)


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def compare(way: Way, folder: Path, make: Callable[[], nn.Module] = Model, sites: str = "head") -> Left:
    """The loop traced, after it was seen to give what it gives untraced and without any monitor."""
    plain, untraced, traced = (loop(way, trace, folder, make, sites) for trace in (None, False, True))
    assert_same(plain.tensors, untraced.tensors)
    assert_same(plain.tensors, traced.tensors)
    assert untraced.traced == 0.0
    return traced


def step(model: nn.Module, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter -= 0.05 * gradient


def keys() -> str:
    return str(torch._C._dispatch_tls_local_include_set())


def descend(model: nn.Module, y: Tensor) -> list[Tensor]:
    step(model, y.pow(2).mean())
    return [y]


class Operators(TorchDispatchMode):
    """Counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def closed_form(model: nn.Module, x: Tensor) -> list[Tensor]:
    keys = x.reshape(-1, 8).double()
    covariance = keys.T @ keys + torch.eye(8)
    update = torch.linalg.solve(covariance, keys.T @ keys.sin())
    values = [torch.linalg.svdvals(update), torch.linalg.eigvalsh(covariance), torch.linalg.norm(update, 2)]
    values += [
        torch.linalg.norm(update, "nuc"),
        torch.linalg.cond(covariance),
        torch.linalg.pinv(update),
        update.norm(),
    ]
    with torch.no_grad():
        model.get_parameter("first.out.weight").add_(update.float())
    return [*values, torch.linalg.cholesky(covariance), torch.linalg.matrix_rank(update), update.norm(p="nuc")]


def with_checkpoint(reentrant: bool) -> Way:
    def run(model: nn.Module, x: Tensor) -> list[Tensor | None]:
        x = x.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.pow(2).sum().backward()
        return [y, x.grad]

    return run
