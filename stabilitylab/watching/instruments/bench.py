"""What all instruments share: which probes are due, the stack of packed measurements, time, and a way to fail open."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stabilitylab.probes.base import Probe
from stabilitylab.record.readings import Rebuild
from stabilitylab.watching.guard import NoteTaker
from stabilitylab.watching.instruments.transfer import Stack
from stabilitylab.watching.interrupts import later
from stabilitylab.watching.one_hook import logger

T = TypeVar("T")

_AUTOCAST_DEVICES = ("cpu", "cuda")


def _is_autocast() -> bool:
    # The first asks of all devices at once, in a tenth of the time: this comes some hundred times an edit.
    return torch._C._is_any_autocast_enabled() and any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))


class Stopwatch:
    """Adds up the time spent inside `with` blocks; a block inside another one counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._since = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._since = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """The seconds so far; the count starts anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast inside, on any device for which the loop has turned it on."""
    with contextlib.ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def name_of(probe: Probe[Any]) -> str:
    """What a probe is called where it is switched off."""
    return f"probe {type(probe).__name__}"


class Bench:
    """The place where instruments work. Whatever breaks there is switched off, noted once and logged.

    A failure of ours must never be the user's: that measurement is skipped from then on, and the edit loop goes on.
    """

    def __init__(self, probes: Sequence[Probe[Any]], note: NoteTaker) -> None:
        self.probes = tuple(probes)
        self.due = self.probes
        self.edit = 0
        self.in_full = True
        """Whether what is dear is measured too."""
        self.stack = Stack()
        self.probe_time = Stopwatch()
        self.canary_time = Stopwatch()
        self.note = note
        self.off: dict[str, str] = {}
        """What is switched off, each with the error that did it."""
        self._names = {id(probe): name_of(probe) for probe in self.probes}
        self._of_need: dict[type[Any], list[Probe[Any]]] = {}
        for probe in self.probes:
            self._of_need.setdefault(probe.needs, []).append(probe)
        self._places: dict[tuple[int, str], bool] = {}
        self._needed: dict[tuple[type[Any], str | None], bool] = {}

    def begin(self, edit: int, in_full: bool = True) -> None:
        """From now on measure what the probes that are due at this edit need. in_full: those that are dear, too."""
        self.edit, self.in_full = edit, in_full
        due = tuple(self._due_at(edit, self.probes))
        if due != self.due:
            self._needed.clear()
        self.due = due

    def _due_at(self, edit: int, probes: Iterable[Probe[Any]]) -> list[Probe[Any]]:
        """Those that measure at an edit that is in full as this one is."""
        due: list[Probe[Any]] = []

        def ask(probe: Probe[Any]) -> None:
            if (self.in_full or not probe.is_paced) and probe.is_due(edit):
                due.append(probe)

        self.each(probes, self.name_of, ask)
        return due

    def name_of(self, probe: Probe[Any]) -> str:
        """What a probe of this bench is called where it is switched off."""
        return self._names[id(probe)]

    def works(self, probe: Probe[Any]) -> bool:
        """Whether a probe is not switched off."""
        return self.name_of(probe) not in self.off

    def is_for(self, probe: Probe[Any], site: str) -> bool:
        """Whether a probe measures at this site. It is asked once in a run."""
        if not self.works(probe):
            return False
        place = (id(probe), site)
        known = self._places.get(place)
        if known is None:
            known = self._places[place] = bool(self.safely(self.name_of(probe), lambda: probe.is_for(site)))
        return known

    def needed(self, need: type[Any], site: str | None = None) -> bool:
        """Whether a probe that is due needs this measurement, here or at all."""
        known = self._needed.get((need, site))
        if known is None:
            probes = [probe for probe in self._of_need.get(need, ()) if probe in self.due and self.works(probe)]
            known = any(site is None or self.is_for(probe, site) for probe in probes)
            self._needed[(need, site)] = known
        return known

    def needed_next(self, need: type[Any], site: str) -> bool:
        """Whether it will be needed here at the next edit."""
        probes = [probe for probe in self._of_need.get(need, ()) if self.is_for(probe, site)]
        return bool(self._due_at(self.edit + 1, probes))

    def ever_needed(self, need: type[Any]) -> bool:
        """Whether any probe of the run needs it, at whatever edit."""
        return need in self._of_need

    def add(self, site: str, packed: Tensor, rebuild: Rebuild[Any]) -> None:
        """Hand over a measurement, see `Stack.add`."""
        self.stack.add(site, packed, rebuild)

    def safely(
        self, what: str, action: Callable[[], Any], *, as_the_loop: bool = False, kind: str = "probe-off"
    ) -> Any:
        """`action()`, or None when it raised; `what` is then off for the rest of the run.

        as_the_loop: run the user's model as the loop does; else autocast is off, which would round our products. kind:
        of the note that says so.
        """
        if what in self.off:
            return None
        try:
            if as_the_loop or not _is_autocast():
                return action()
            with full_precision():
                return action()
        except KeyboardInterrupt:  # only of this reading: the row is written all the same
            later()
        except (Exception, SystemExit) as error:
            self._switch_off(what, error, kind)
        return None

    def each(self, things: Iterable[T], name: Callable[[T], str], act: Callable[[T], object]) -> None:
        """What `safely` does, for each of many small things. name: what one of them is called."""
        with full_precision() if _is_autocast() else contextlib.nullcontext():
            for thing in things:
                if self.off and name(thing) in self.off:
                    continue
                try:
                    act(thing)
                except KeyboardInterrupt:
                    later()
                except (Exception, SystemExit) as error:
                    self._switch_off(name(thing), error)

    def _switch_off(self, what: str, error: BaseException, kind: str = "probe-off") -> None:
        self.off[what] = f"{type(error).__name__}: {error}"
        self._needed.clear()
        says = f"{what} switched off: {self.off[what]}"
        logger.warning("stabilitylab: %s (the edit loop goes on)", says)
        self.note(kind, says)
