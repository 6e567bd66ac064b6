"""What every host hands on to `attach`: said once, for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from stabilitylab.acting.schedule import Trace
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.probes.base import Probe, Tier
from stabilitylab.record.run import Run
from stabilitylab.reports.sinks import Sink
from stabilitylab.watching.canary import Batch, Canary
from stabilitylab.watching.instruments.references import Home


class Options(TypedDict, total=False):
    """Keyword arguments of `stabilitylab.attach`, which says what each of them does, and what it is by default."""

    canary: Canary | Batch | None
    probes: Tier | Sequence[Probe[Any]]
    tensorboard: bool
    sinks: Sequence[Sink]
    config: Mapping[str, Any] | None
    thresholds: str | Path | Thresholds | None
    announce: bool
    trace: Trace
    replay: bool
    scan: bool
    budget: float | None
    schedule: str | Path | Run | None
    references: Home
    redact: bool


def expect_known(options: Options) -> None:
    """Raises UsageError for an argument that is none, before a host has done anything."""
    unknown = next((name for name in options if name not in Options.__annotations__), None)
    if unknown is not None:
        known = list(Options.__annotations__)
        raise UsageError(f"there is no argument {unknown!r}{did_you_mean(unknown, known)}")
