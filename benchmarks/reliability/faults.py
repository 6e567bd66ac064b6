"""What can break around an edit: each part of the recorder, raising, hanging or lying. Knows no goal."""

from __future__ import annotations

import contextlib
import inspect
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

import numpy as np

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.probes import ALL
from stabilitylab.probes.base import Probe
from stabilitylab.record.store import RunWriter
from stabilitylab.watching.instruments.attention import AttentionInstrument
from stabilitylab.watching.instruments.editor import EditorInstrument
from stabilitylab.watching.instruments.feedback import FeedbackInstrument
from stabilitylab.watching.instruments.gradients import GradientInstrument
from stabilitylab.watching.instruments.logits import CanaryInstrument, LogitsInstrument
from stabilitylab.watching.instruments.outputs import OutputInstrument
from stabilitylab.watching.instruments.state import StateInstrument
from stabilitylab.watching.instruments.weights import WeightInstrument

MARK: Final = "a fault was put here"
HANGS_SECONDS: Final = 0.1
_INSTRUMENTS: Final = (
    AttentionInstrument,
    CanaryInstrument,
    EditorInstrument,
    FeedbackInstrument,
    GradientInstrument,
    LogitsInstrument,
    OutputInstrument,
    StateInstrument,
    WeightInstrument,
)


def _raises(error: BaseException) -> Callable[..., Any]:
    def fault(*_: object, **__: object) -> Any:
        raise error

    return fault


def _says(what: object) -> Callable[..., Any]:
    return lambda *_, **__: what


RAISES: Final = {
    "raises": _raises(ValueError(MARK)),
    "would end the program": _raises(SystemExit(MARK)),
    "has no memory": _raises(MemoryError(MARK)),
}
LIES: Final = {
    "says a string": _says("nonsense"),
    "says a list": _says([1.0]),
    "says None": _says(None),
    "says an unknown metric": _says({"another": 1.0}),
    "says a key that is no name": _says({7: 1.0}),
}
VALUES: Final[dict[str, object]] = {
    "a word": "seven",
    "a matrix": np.zeros((2, 2)),
    "a complex number": 1j,
    "nothing": [],
    "a ragged list": [[1.0], [1.0, 2.0]],
    "an object": object(),
    "a million values": np.zeros(1_000_000),
}
"""What a probe gives for a metric of its own."""


@dataclass
class Fault:
    """owner.name is replaced. said: whether the run has to say so; else it is in the log alone. part: of what.

    hit: how often it was called.
    """

    part: str
    what: str
    owner: Any
    name: str
    does: Callable[..., Any]
    said: bool = True
    after_attach: bool = False
    hit: list[int] = field(default_factory=lambda: [0])

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name} {self.what}"

    @contextlib.contextmanager
    def put(self) -> Iterator[None]:
        """In place, inside."""
        real = getattr(self.owner, self.name)
        self.hit[0] = 0

        def faulty(*arguments: Any, **named: Any) -> Any:
            self.hit[0] += 1
            if self.what == "hangs":
                time.sleep(HANGS_SECONDS)
                return real(*arguments, **named)
            return self.does(*arguments, **named)

        with mock.patch.object(self.owner, self.name, faulty):
            yield


def _none(*_: object, **__: object) -> None:
    return None


def of_probes() -> Iterator[Fault]:
    """Each probe: what it measures, when and where."""
    for probe in ALL:
        for what, does in (RAISES | LIES).items():
            yield Fault("probe", what, probe, "compute", does)
        own = probe.metrics[0].name
        for what, value in VALUES.items():
            yield Fault("probe", f"says {what}", probe, "compute", _says({own: value}))
        for name in ("is_due", "is_for"):
            for what, does in RAISES.items():
                yield Fault("probe", what, probe, name, does)
        yield Fault("probe", "hangs", probe, "compute", _none, said=False)


def of_hooks() -> Iterator[Fault]:
    """Each public method of each instrument: what hooks call, and what is called between them."""
    for owner in _INSTRUMENTS:
        for name, _ in inspect.getmembers(owner, inspect.isfunction):
            if not name.startswith("_"):
                for what, does in RAISES.items():
                    yield Fault("hook", what, owner, name, does)


def of_the_writer() -> Iterator[Fault]:
    """Each method of the run file's writer, once the run is open."""
    errors: dict[str, BaseException] = {
        "raises": ValueError(MARK),
        "can't write": OSError(28, MARK),
        "is full": sqlite3.OperationalError(MARK),
    }
    for name in ("append", "note", "outcome", "alarm", "operation", "set_manifest", "close"):
        for what, error in errors.items():
            yield Fault("writer", what, RunWriter, name, _raises(error), said=name != "note", after_attach=True)


def of_the_analyzer() -> Iterator[Fault]:
    """Each of its methods."""
    for name in ("observe", "observe_dry", "observe_note", "observe_operation", "diagnosis"):
        for what, does in RAISES.items():
            yield Fault("analyzer", what, Analyzer, name, does, after_attach=True)


class Sink:
    """A receiver, to be broken."""

    def on_row(self, row: object, diagnosis: object) -> None:
        """A row."""

    def close(self) -> None:
        """No more."""


def of_sinks() -> Iterator[Fault]:
    """Both of its methods."""
    for name in ("on_row", "close"):
        for what, does in RAISES.items():
            yield Fault("sink", what, Sink, name, does)
        yield Fault("sink", "hangs", Sink, name, _none, said=False)


def every_probe() -> list[Probe[Any]]:
    return [probe(every=1) for probe in ALL]
