"""From measurements that have arrived on the host to readings: every probe on every measurement of its kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stabilitylab.probes.base import BySite, Probe
from stabilitylab.probes.feedback import WINDOW, History
from stabilitylab.record.packed import Frames, PackedReadings
from stabilitylab.record.readings import Array, Key
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.transfer import Arrived, Shipment

Measured = list[tuple[str, Any]]
"""Measurements, each with its site."""


class Reader:
    """Runs the probes of a bench. A probe that breaks, or says nonsense, is switched off."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._followed = {metric for probe in bench.probes for metric in probe.follows}
        self._history: dict[Key, deque[tuple[float, float]]] = {}
        self._known = {id(probe): frozenset(metric.name for metric in probe.metrics) for probe in bench.probes}
        self._due: Sequence[Probe[Any]] = ()
        self._of_kind: dict[type[Any], list[Probe[Any]]] = {}
        self._frames = Frames()

    def arrived(self, shipment: Shipment) -> Measured:
        """The measurements of a shipment; waits for it. One that can't be made again is switched off."""
        measured: Measured = []

        def make(one: Arrived) -> None:
            seen = one.make()
            if isinstance(seen, BySite):
                measured.extend(seen.parts.items())
            elif seen is not None:
                measured.append((one.site, seen))

        self._bench.each(self._bench.safely("arrival", lambda: shipment.arrived) or (), _name_of, make)
        return measured

    def read(self, measured: Measured, due: Sequence[Probe[Any]], edit: int) -> PackedReadings:
        """What the probes that were due say of them."""
        readings: dict[Key, float | Array] = {}
        if due != self._due:
            self._due = due
            self._of_kind.clear()
        for site, seen in measured:
            probes = self._of_kind.get(type(seen))
            if probes is None:
                probes = self._of_kind[type(seen)] = [probe for probe in due if issubclass(type(seen), probe.needs)]
            self._apply(probes, site, seen, readings)
        if self._followed:
            for key in [key for key in readings if key[0] in self._followed]:
                followers = [probe for probe in due if key[0] in probe.follows]
                self._apply(followers, key[1], self._remember(key, edit, readings[key]), readings)
        return self._frames.packed(readings)

    def _remember(self, key: Key, edit: int, values: float | Array) -> History:
        recent = self._history.setdefault(key, deque(maxlen=WINDOW + 1))
        recent.append((values if isinstance(values, float) else float(values[0]), float(edit)))
        return History(*np.array(recent).T)

    def _apply(self, probes: Iterable[Probe[Any]], site: str, seen: Any, readings: dict[Key, float | Array]) -> None:
        bench = self._bench

        def compute(probe: Probe[Any]) -> None:
            said = _computed(probe, self._known[id(probe)], seen)
            for metric, value in said.items():
                readings[(metric, site)] = value

        bench.each([probe for probe in probes if bench.is_for(probe, site)], bench.name_of, compute)


def _name_of(one: Arrived) -> str:
    return one.name


def _computed(probe: Probe[Any], known: frozenset[str], seen: Any) -> Mapping[str, float | Array]:
    """What a probe says, as a row holds it. Raises TypeError or ValueError for what can't be a reading.

    known: the names of its metrics.
    """
    said = probe.compute(seen)
    if not isinstance(said, Mapping):
        raise TypeError(f"compute gave a {type(said).__name__}; expected values by metric name")
    readings: dict[str, float | Array] = {}
    for name, value in said.items():
        if name not in known:
            raise ValueError(f"{name!r} is none of its metrics; expected one of {', '.join(sorted(known))}")
        readings[name] = value if isinstance(value, float) else _as_reading(name, np.asarray(value))
    return readings


def _as_reading(name: str, values: Any) -> Array:
    if values.dtype.kind not in "fiub" or values.ndim > 1 or values.size == 0:
        what = f"{values.dtype} of shape {list(values.shape)}"
        raise TypeError(f"{name!r} is {what}; expected a real number, or a list of one or more")
    return np.atleast_1d(values.astype(np.float64))
