"""One edit under the tracer, without a monitor: what is named of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

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
    assert (Path(place.file), place.line, place.function) == (Path(inspect.getfile(act)), first + offset, act.__name__)
    assert source in place.source


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
