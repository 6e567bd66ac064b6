"""The tracer among the user's modes and threads: what is entered, who sees what, and what is left when an edit ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import stabilitylab as sl
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing
from tests.traced_loops import (
    EDITS,
    Model,
    Operators,
    closed_form,
    compare,
    modes,
    step,
    with_checkpoint,
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- modes of the user's ----------------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def make_a_nan(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Where something is found, more is looked at."""
    y = model(x)
    bad = (y - y) / (y - y)
    step(model, y.pow(2).mean() + torch.linalg.norm(y[0], 2))
    return [y, bad.nansum()]


@pytest.mark.parametrize("kind", [Operators, Functions])
def test_a_mode_inside_of_the_edit_sees_nothing_of_ours(kind: Callable[[], Any], tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        with kind() as mode:
            left = make_a_nan(model, x)
        seen.append(mode.seen)
        return left

    compare(way, tmp_path)
    _, untraced, traced = (seen[at : at + EDITS] for at in range(0, 3 * EDITS, EDITS))
    assert untraced == traced  # the hooks are seen by a mode without us too
    assert len(untraced[0]) > 20


@pytest.mark.parametrize("kind", [Operators, Functions])
def test_a_mode_around_the_edit_sees_nothing_of_ours(kind: Callable[[], Any]) -> None:
    def edit(traced: bool) -> list[str]:
        torch.manual_seed(0)
        model, x = Model(), torch.randn(3, 5, 8)
        with kind() as mode, Tracing.entered(Tracer(1)) if traced else contextlib.nullcontext():
            make_a_nan(model, x)
        return [name for name in mode.seen if name != "aten.detach.default"]  # of torch 2.4's own, between two modes

    assert edit(True) == edit(False)


def test_a_mode_that_is_left_after_the_edit_stays_entered_and_nothing_of_ours_does(tmp_path: Path) -> None:
    before, dispatch, functions = modes(), Operators(), Functions()
    monitor = sl.attach(Model(), "head", tmp_path / "run", trace=True, announce=False)
    with contextlib.ExitStack() as outlives:
        with monitor.edit():
            outlives.enter_context(dispatch)
            outlives.enter_context(functions)
            monitor._rounds.model(torch.randn(1, 2, 8))
        assert modes() == ([functions], [dispatch], True)
        seen = len(dispatch.seen)
        torch.ones(2) + 1
        assert len(dispatch.seen) > seen
    assert modes() == before


def test_a_mode_that_is_entered_before_and_left_inside_of_the_edit(tmp_path: Path) -> None:
    """A loop whose own stack unwinds in another order."""
    before, dispatch = modes(), Operators()
    monitor = sl.attach(Model(), "head", tmp_path / "run", trace=True, announce=False)
    dispatch.__enter__()
    edit = monitor.edit()
    edit.__enter__()
    monitor._rounds.model(torch.randn(1, 2, 8))
    edit.__exit__(None, None, None)
    dispatch.__exit__(None, None, None)
    assert modes() == before


@torch.library.custom_op("stabilitylab_tests::scaled", mutates_args=(), schema="(Tensor x) -> Tensor")
def scaled(x: Tensor) -> Tensor:
    """An operator in Python, which calls functions that the tracer steps aside for while it is running itself."""
    return x / torch.linalg.svdvals(x)[0] * torch.linalg.norm(x, 2) * x.masked_fill(x > 0, 1.0).prod()


def test_an_operator_in_python(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [scaled(model(x)[0])]

    assert compare(way, tmp_path).said == []


# -- how an edit ends -------------------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing_entered(tmp_path: Path) -> None:
    before, model = modes(), Model()
    with sl.attach(model, "head", tmp_path / "run", trace=True, announce=False) as monitor:
        with pytest.raises(RuntimeError), monitor.edit():
            model(torch.randn(1, 2, 9))
        assert modes() == before
        with pytest.raises(ValueError, match="mine"), monitor.edit():
            model(torch.randn(1, 2, 8))
            raise ValueError("mine")
        assert modes() == before
        with pytest.raises(ValueError, match="hook"), monitor.edit():
            y = model(torch.randn(1, 2, 8))
            y.register_hook(_raise)
            y.sum().backward()
        assert modes() == before
    assert [note.kind for note in sl.load(tmp_path / "run").notes if note.kind == "trace-off"] == []


def _raise(_: Tensor) -> Tensor:
    raise ValueError("hook")


def test_an_edit_that_is_abandoned_in_a_generator(tmp_path: Path) -> None:
    before, model = modes(), Model()

    def edits(monitor: sl.Monitor) -> Generator[Tensor]:
        while True:
            with monitor.edit():
                yield model(torch.randn(1, 2, 8))

    with sl.attach(model, "head", tmp_path / "run", trace=True, announce=False) as monitor:
        loop = edits(monitor)
        next(loop)
        next(loop)
        assert modes() != before
        loop.close()
        assert modes() == before


def test_two_monitors_nested(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        inner = sl.attach(
            model, "first.out", tmp_path / f"inner{next(count)}", trace=True, announce=False, probes="light"
        )
        with inner, inner.edit():
            return [*make_a_nan(model, x), *closed_form(model, x)]

    count = iter(range(99))
    assert compare(way, tmp_path).said == []


def test_an_edit_that_is_left_in_another_thread(tmp_path: Path) -> None:
    model = Model()
    monitor = sl.attach(model, "head", tmp_path / "run", trace=True, announce=False)

    def enter_here(edit: Any, entered: threading.Event, left: threading.Event, seen: list[Any]) -> None:
        before = modes()
        with contextlib.suppress(BaseException):
            edit.__enter__()
        entered.set()
        left.wait()
        torch.ones(2) + 1
        seen += [before[1], modes()[1], torch.ones(2) + 1]

    edit, entered, left, seen = monitor.edit(), threading.Event(), threading.Event(), []
    thread = threading.Thread(target=enter_here, args=(edit, entered, left, seen))
    thread.start()
    entered.wait()
    here = modes()
    edit.__exit__(None, None, None)
    assert modes() == here
    left.set()
    thread.join()
    assert seen[0] == seen[1] == []
    with monitor.edit():
        model(torch.randn(1, 2, 8))
    assert modes() == here
    monitor.close()
    (says,) = [note.says for note in sl.load(tmp_path / "run").notes if note.kind == "trace-off"]
    assert "another thread" in says


def test_an_edit_in_a_thread_of_its_own(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        """The edit goes on in another thread, which is not traced."""
        left: list[Tensor | None] = []
        thread = threading.Thread(target=lambda: left.extend(with_checkpoint(False)(model, x)))
        thread.start()
        thread.join()
        return [each for each in left if each is not None]

    compare(way, tmp_path)
