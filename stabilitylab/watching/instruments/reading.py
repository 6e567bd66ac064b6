"""From measurements that have arrived on the host to readings: every probe on every measurement of its kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stabilitylab.probes.base import BySite, Probe
from stabilitylab.probes.feedback import WINDOW, History
from stabilitylab.record.readings import Array, Key
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.transfer import Shipment

Measured = list[tuple[str, Any]]
"""Measurements, each with its site."""


class Reader:
    """Runs the probes of a bench. A probe that breaks, or says nonsense, is switched off."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._followed = {metric for probe in bench.probes for metric in probe.follows}
        self._history: dict[Key, deque[tuple[float, float]]] = {}
        self._known = {id(probe): frozenset(metric.name for metric in probe.metrics) for probe in bench.probes}

    def arrived(self, shipment: Shipment) -> Measured:
        """The measurements of a shipment; waits for it. One that can't be made again is switched off."""
        measured: Measured = []
        for site, name, make in self._bench.safely("arrival", lambda: shipment.arrived) or ():
            seen = self._bench.safely(f"{name} of {site}", make)
            if isinstance(seen, BySite):
                measured.extend(seen.parts.items())
            elif seen is not None:
                measured.append((site, seen))
        return measured

    def read(self, measured: Measured, due: Sequence[Probe[Any]], edit: int) -> dict[Key, Array]:
        """What the probes that were due say of them."""
        readings: dict[Key, Array] = {}
        reading: dict[type[Any], tuple[Probe[Any], ...]] = {}
        for site, seen in measured:
            kind = type(seen)
            if kind not in reading:
                reading[kind] = tuple(probe for probe in due if issubclass(kind, probe.needs))
            self._apply(reading[kind], site, seen, readings)
        if self._followed:
            for (metric, site), values in list(readings.items()):
                if metric in self._followed:
                    followers = tuple(probe for probe in due if metric in probe.follows)
                    self._apply(followers, site, self._remember((metric, site), edit, values), readings)
        return readings

    def _remember(self, key: Key, edit: int, values: Array) -> History:
        recent = self._history.setdefault(key, deque(maxlen=WINDOW + 1))
        recent.append((float(values[0]), float(edit)))
        return History(*np.array(recent).T)

    def _apply(self, probes: Sequence[Probe[Any]], site: str, seen: Any, readings: dict[Key, Array]) -> None:
        bench = self._bench
        for probe in probes:
            if bench.is_for(probe, site):
                known = self._known[id(probe)]
                values = bench.safely(bench.name_of(probe), lambda: _computed(probe, known, seen))  # noqa: B023
                if values:
                    for metric, value in values.items():
                        readings[(metric, site)] = value


def _computed(probe: Probe[Any], known: frozenset[str], seen: Any) -> dict[str, Array]:
    """What a probe says, as a row holds it. Raises TypeError or ValueError for what can't be a reading.

    known: the names of its metrics.
    """
    said, readings = probe.compute(seen), {}
    if not isinstance(said, Mapping):
        raise TypeError(f"compute gave a {type(said).__name__}; expected values by metric name")
    for name, value in said.items():
        if name not in known:
            raise ValueError(f"{name!r} is none of its metrics; expected one of {', '.join(sorted(known))}")
        readings[name] = np.array([value]) if type(value) is float else _as_reading(name, np.asarray(value))
    return readings


def _as_reading(name: str, values: Any) -> Array:
    if values.dtype.kind not in "fiub" or values.ndim > 1 or values.size == 0:
        what = f"{values.dtype} of shape {list(values.shape)}"
        raise TypeError(f"{name!r} is {what}; expected a real number, or a list of one or more")
    return np.atleast_1d(values.astype(np.float64))
