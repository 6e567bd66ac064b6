"""From measurements that have arrived on the host to readings: every probe on every measurement of its kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
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
_Asked = tuple[Probe[Any], str, Any]
"""A probe, and what it is to read of a site."""


class Reader:
    """Runs the probes of a bench. A probe that breaks, or says nonsense, is switched off."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._followed = {metric for probe in bench.probes for metric in probe.follows}
        self._history: dict[Key, deque[tuple[float, float]]] = {}
        self._known = {id(probe): {metric.name: metric.length for metric in probe.metrics} for probe in bench.probes}
        self._due: Sequence[Probe[Any]] = ()
        self._of_kind: dict[type[Any], list[Probe[Any]]] = {}
        self._reads: dict[tuple[type[Any], str], list[Probe[Any]]] = {}
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
            self._reads.clear()

        def compute(asked: _Asked) -> None:
            probe, site, seen = asked
            for metric, value in _checked(probe.compute(seen), self._known[id(probe)]).items():
                readings[metric, site] = value

        # All of them in one go: of a small model each measurement takes less time than a round of its own.
        asked = [(probe, site, seen) for site, seen in measured for probe in self._reading(type(seen), site, due)]
        self._bench.each(asked, self._name_of, compute)
        if self._followed:
            self._bench.each(self._following(readings, due, edit), self._name_of, compute)
        return self._frames.packed(readings)

    def _following(self, readings: Mapping[Key, float | Array], due: Sequence[Probe[Any]], edit: int) -> list[_Asked]:
        """The probes that read what others have said so far, each with that."""
        asked: list[_Asked] = []
        for key, values in readings.items():
            if key[0] in self._followed:
                history = self._remember(key, edit, values)
                followers = (probe for probe in due if key[0] in probe.follows and self._bench.is_for(probe, key[1]))
                asked += [(probe, key[1], history) for probe in followers]
        return asked

    def _name_of(self, asked: _Asked) -> str:
        return self._bench.name_of(asked[0])

    def _reading(self, kind: type[Any], site: str, due: Sequence[Probe[Any]]) -> list[Probe[Any]]:
        """The probes that read such a measurement of a site."""
        known = self._reads.get((kind, site))
        if known is None:
            of_kind = self._of_kind.get(kind)
            if of_kind is None:
                of_kind = self._of_kind[kind] = [probe for probe in due if issubclass(kind, probe.needs)]
            known = self._reads[kind, site] = [probe for probe in of_kind if self._bench.is_for(probe, site)]
        return known

    def _remember(self, key: Key, edit: int, values: float | Array) -> History:
        recent = self._history.setdefault(key, deque(maxlen=WINDOW + 1))
        recent.append((values if isinstance(values, float) else float(values[0]), float(edit)))
        return History(*np.array(recent).T)


def _name_of(one: Arrived) -> str:
    return one.name


def _checked(said: Any, known: Mapping[str, int]) -> Mapping[str, float | Array]:
    """What a probe says, as a row holds it. Raises TypeError or ValueError for what can't be a reading.

    known: of each of its metrics, how many values a reading has at most.
    """
    if not isinstance(said, Mapping):
        raise TypeError(f"compute gave a {type(said).__name__}; expected values by metric name")
    odd: dict[str, Array] = {}
    for name, value in said.items():
        if name not in known:
            raise ValueError(f"{name!r} is none of its metrics; expected one of {', '.join(sorted(known))}")
        if not isinstance(value, float):
            odd[name] = _as_reading(name, np.asarray(value), known[name])
    return {**said, **odd} if odd else said


def _as_reading(name: str, values: Any, most: int) -> Array:
    if values.dtype.kind not in "fiub" or values.ndim > 1 or values.size == 0:
        what = f"{values.dtype} of shape {list(values.shape)}"
        raise TypeError(f"{name!r} is {what}; expected a real number, or a list of one or more")
    if values.size > most:
        raise ValueError(f"{name!r} is {values.size:,} values; expected at most {most}, as its metric says")
    return np.atleast_1d(values.astype(np.float64))
