"""What one station hands to the next: a metric's description, and one edit's row of readings. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Seen = TypeVar("Seen")
Rebuild = Callable[[Array], Seen]
"""Makes a measurement from its packed values, on the host."""
Key = tuple[str, str]
"""(metric, site): what was measured, and where."""

Scale = Literal["log", "linear", "count", "flag"]
Phase = Literal["before", "during", "after"]
Status = Literal["start", "applied", "failed"]
OutcomeKind = Literal["committed", "restored", "rolled_back", "independent"]

MODEL_SITE = "model"
"""The site of readings that belong to the model as a whole, such as its logits."""

EDITOR_SITE = "editor"
"""The first part of the site names of the editor's own state, such as ``editor.mend.0``."""


@dataclass(frozen=True)
class Metric:
    """One named quantity that a probe emits.

    scale: how it is compared and drawn: ``log`` (positive, over orders of magnitude), ``linear``, ``count`` (whole
    numbers from 0) or ``flag`` (0 or 1). phase: when it is taken: ``before`` the edit, ``during`` it (by hooks; logits
    seen then are those of the model before this edit took effect) or ``after`` it. length: the most values that one
    reading holds (1: a scalar).
    """

    name: str
    unit: str
    scale: Scale
    phase: Phase
    meaning: str
    formula: str
    source: str
    length: int = 1

    @property
    def family(self) -> str:
        """The part of the name before the first dot: ``update`` of ``update.norm``."""
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class EditRow:
    """What was read around one edit. Edit 0 (status ``start``) is the state before the first edit.

    readings: 1-d float64 arrays by (metric, site), in dataflow order of the sites. A missing key is a reading that was
    not taken; NaN and Inf are values. started: seconds since the epoch. seconds: the whole edit, probes included.
    probe_seconds, canary_seconds: the parts of it that the probes and the canary's forward pass took. trace_seconds:
    spent in the tracer, wherever that was on.
    """

    edit: int
    label: str
    status: Status
    started: float
    seconds: float
    probe_seconds: float
    canary_seconds: float
    error: str | None = None
    readings: Mapping[Key, Array] = field(default_factory=dict)
    trace_seconds: float = 0.0

    def scalar(self, metric: str, site: str) -> float | None:
        """The first value of a reading, or None when it was not taken."""
        values = self.readings.get((metric, site))
        return None if values is None or values.size == 0 else float(values[0])


@dataclass(frozen=True)
class Outcome:
    """What became of an applied edit, observed at the next edit's start or at close."""

    edit: int
    outcome: OutcomeKind
    observed_at: float


@dataclass(frozen=True)
class Note:
    """Something that was not measured, or not as asked, and why. edit: when it was seen."""

    edit: int
    kind: str
    says: str


@dataclass(frozen=True)
class Alarm:
    """A verdict as it was first raised while the run was going on; never rewritten by hindsight."""

    edit: int
    verdict: str
    metric: str
    site: str
    says: str
