"""When the tracer is on. Times and alerts in, one decision for each edit out. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from stabilitylab.errors import UsageError

Mode = Literal["auto", "armed", "on", "off"]
Trace = Literal["auto", "armed"] | bool
"""What `attach` takes: ``"auto"``, ``"armed"``, True for on and False for off."""

VARIABLE: Final = "STABILITYLAB_TRACE"
"""The environment variable that asks for edits to be traced in full, with no change of code."""

FIRST: Final = 3
"""Edits that are traced first, and as many that are not, to compare."""
ALLOWED: Final = 0.05
"""Of an edit that the tracer may take to stay on."""
QUIET: Final = 8
"""Edits without anything out of the ordinary after which a tracer that was armed is off again."""


def mode_of(trace: object) -> Mode:
    """The mode that `attach` was asked for. Raises UsageError for anything else."""
    if trace is True:
        return "on"
    if trace is False:
        return "off"
    for mode in ("auto", "armed"):
        if trace == mode:
            return "auto" if mode == "auto" else "armed"
    raise UsageError(f"trace={trace!r} is unknown; expected 'auto', 'armed', True or False")


class Asked:
    """Edits that the environment asks to be traced: ``26``, ``25-27``, ``3,25-27`` or ``all``."""

    def __init__(self, words: str = "") -> None:
        """Raises UsageError for anything else."""
        self._words = words
        self._spans: list[tuple[int, float]] = []
        for word in filter(None, (part.strip() for part in words.split(","))):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
            if word != "all" and (match is None or int(match[2] or match[1]) < int(match[1])):
                raise UsageError(f"{VARIABLE}={words!r} can't be read; expected edits such as '26', '25-27' or 'all'")
            first, last = (0, float("inf")) if match is None else (int(match[1]), float(match[2] or match[1]))
            self._spans.append((first, last))

    def __contains__(self, edit: int) -> bool:
        return any(first <= edit <= last for first, last in self._spans)

    def __bool__(self) -> bool:
        return bool(self._spans)

    def __str__(self) -> str:
        return self._words


def asked_for() -> Asked:
    """What the environment asks for now. Raises UsageError where it can't be read."""
    return Asked(os.environ.get(VARIABLE, ""))


class Schedule:
    """Decides edit by edit.

    *auto*: on for the first three edits and off for the next three, which shows what it costs; then on where that is
    little, else armed. *armed*: on from the edit after anything was out of the ordinary, until all is quiet again.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.cost: float | None = None
        """What the tracer takes, as a share of an edit without it; None until that was measured."""
        self._traced: list[float] = []
        self._untraced: list[float] = []
        self._own = 0.0
        self._quiet = QUIET

    @property
    def is_alert(self) -> bool:
        """Whether something was out of the ordinary lately."""
        return self._quiet < QUIET

    @property
    def stays_on(self) -> bool | None:
        """What *auto* has decided; None before."""
        return None if self.cost is None else self.cost < ALLOWED

    def wants(self, edit: int) -> bool:
        """Whether to trace this edit; 0 is the canary before the first one."""
        if self.mode in ("on", "off"):
            return self.mode == "on"
        if self.is_alert:
            return True
        if self.mode == "armed":
            return False
        if self.cost is not None:
            return self.cost < ALLOWED
        return edit == 0 or len(self._traced) < FIRST

    def timed(self, seconds: float, own: float | None) -> bool:
        """An edit took so many seconds, the probes' and the canary's left out; own: those that were spent in the
        tracer, None where it was off. Returns whether this has settled what *auto* does.
        """
        if self.mode != "auto" or self.cost is not None:
            return False
        (self._untraced if own is None else self._traced).append(seconds)
        if own is not None and seconds > 0:
            self._own = max(self._own, own / seconds)
        if min(len(self._traced), len(self._untraced)) < FIRST:
            return False
        least = min(self._untraced)
        # What is seen from inside is a part of it, and no noise.
        self.cost = max(min(self._traced) / least - 1.0 if least > 0 else 0.0, self._own)
        return True

    def heard(self, alert: bool) -> None:
        """What the last edit was like: whether anything was out of the ordinary."""
        self._quiet = 0 if alert else self._quiet + 1

    def to_json(self) -> dict[str, Any]:
        """What was decided, for the manifest."""
        told: Mapping[str, Any] = {"mode": self.mode, "cost": self.cost, "stays_on": self.stays_on}
        return {key: value for key, value in told.items() if value is not None}
