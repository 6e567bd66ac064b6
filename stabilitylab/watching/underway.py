"""An edit that is under way: as the loop made it, and its measurements until they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from stabilitylab.acting.tracer import Tracer
from stabilitylab.record.readings import OutcomeKind, Status
from stabilitylab.watching.instruments.panel import Cargo


@dataclass(frozen=True)
class Taken:
    """An edit as the loop made it. started: seconds since the epoch. clock: when it began, by `time.perf_counter`."""

    label: str
    started: float
    clock: float
    error: str | None = None


class Times(NamedTuple):
    """Seconds of an edit, in the order of the row."""

    whole: float
    probes: float
    canary: float
    tracer: float

    @property
    def loop(self) -> float:
        """The loop's own, and the tracer's, which is in it."""
        return self.whole - self.probes - self.canary


@dataclass(frozen=True)
class Looked:
    """A look at the weights since an edit, which goes over to other processes when the next one ends. adapters: what
    the model's parts say of it.
    """

    edit: int
    cargo: Cargo
    adapters: OutcomeKind | None


@dataclass(frozen=True)
class Unread:
    """An edit whose measurements are on their way to the host. last: the look since the edit before it, likewise, where
    weights are spread. between: those of the weights after it, likewise, with
    what the model's parts say of it.

    times: how long it took, and the parts of that which probes and canary took, in seconds; None where reading it still
    belongs to it. compiled: layers that run as compiled code. asked: whether hooks were on layers; heard: whether the
    edit ran any of the model. foreign: whether it left a model that was not made from the one that it began with.
    tracers: that were on, of the edit and of the canary. in_full: whether what is dear was measured too.
    """

    edit: int
    taken: Taken
    status: Status
    cargo: Cargo
    last: Looked | None = None
    between: Cargo | None = None
    adapters: OutcomeKind | None = None
    times: Times | None = None
    tracers: tuple[Tracer, ...] = ()
    compiled: Mapping[str, str] = field(default_factory=dict)
    asked: bool = False
    heard: bool = False
    heard_itself: bool = False
    unanswered: Mapping[str, bool] = field(default_factory=dict)
    foreign: bool = False
    in_full: bool = True
