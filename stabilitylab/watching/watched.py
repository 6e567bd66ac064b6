"""Which sites are watched, and how they came to be: named from the start, or seen to move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Final

from torch import Tensor, nn

from stabilitylab.record.note_kinds import BROUGHT, MOVED_BESIDES, NOTHING_MOVED
from stabilitylab.watching import manifest
from stabilitylab.watching.discovery import Discovery
from stabilitylab.watching.instruments.panel import Instruments
from stabilitylab.watching.progress import bar
from stabilitylab.watching.recording import Recorder
from stabilitylab.watching.sites import Site, locate, weight_at
from stabilitylab.watching.spread import is_spread

_NAMED: Final = 4
"""Sites that a note names."""
_MANY_ENTRIES: Final = 1 << 26
"""Entries of all watched weights from which on a person is shown how far it is."""


class Watched:
    """The sites of a run. What an edit moves besides is watched from then on, where it is looked for."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site] | None, instruments: Instruments, recorder: Recorder
    ) -> None:
        """sites: None for what the first edit moves."""
        self.sites: tuple[Site, ...] = ()
        self._instruments = instruments
        self._recorder = recorder
        self._discovery: Discovery | None = None
        self._looks_on = False
        self._said_brought = False
        self._late: tuple[Site, ...] = ()
        """Sites that are watched since the last edit: of what that was like before them nothing is known."""
        if sites is None:
            self._discovery = Discovery(model)
            for name, reason in self._discovery.unreadable(model).items():
                recorder.note("skipped-site", f"{name}: {reason}")
        else:
            self._watch(model, sites, {})

    def look_elsewhere(self, model: nn.Module) -> None:
        """The sites are a guess: what edits move besides is looked for, and watched from then on."""
        self._looks_on = True
        if self._discovery is None:
            self._discovery = self._recorder.guard("what else may move", lambda: Discovery(model, but=self.sites))

    def adopt_late(self, model: nn.Module) -> None:
        """What is watched only since the last edit is as it should be now, whether or not that was undone."""
        late, self._late = self._late, ()
        self._adopt(model, late, {})

    def _watch(self, model: nn.Module, sites: Sequence[Site], originals: Mapping[str, Tensor]) -> None:
        """Begin to watch these sites too. originals: their weights before any edit, where those are no more."""
        self._adopt(model, sites, originals)
        self.sites += tuple(sites)
        self._recorder.manifest(manifest.of_sites(self.sites))

    def _adopt(self, model: nn.Module, sites: Sequence[Site], originals: Mapping[str, Tensor]) -> None:
        size = sum(math.prod(site.shape) for site in sites)
        with bar("weights before edit 1", len(sites)) if size > _MANY_ENTRIES else nullcontext(_unseen) as done:
            for number, site in enumerate(sites, start=1):
                weight = _watched_at(model, site)
                if weight is not None:
                    self._instruments.adopt(site, originals.get(site.name, weight).to(weight.device))
                done(number)

    def discover(self, model: nn.Module) -> None:
        """Watch what the first edit moved; keep looking when it moved nothing."""
        if self._discovery is None:
            return
        edit, moved = self._recorder.edits, self._discovery.moved(model)
        self._late = ()
        if self.sites:
            self._watch_more(model, self._discovery, [site for site, _ in moved.values()])
            return
        if not moved:
            fresh = self._discovery.remember(model)
            if not fresh:
                self._recorder.note(NOTHING_MOVED, f"edit {edit} moved no parameter of the model")
            self._say_brought(fresh)
            return
        why, self._discovery = self._discovery.why_not_measured, None
        originals = {name: original for name, (_, original) in moved.items() if original is not None}
        self._watch(model, [site for site, _ in moved.values()], originals)
        if self._looks_on:
            self._discovery = Discovery(model, but=self.sites)
        self._recorder.note(
            "sites-discovered", f"edit {edit} moved {', '.join(moved)}; hooks are on them from the next edit on"
        )
        if why is not None:
            self._recorder.note(
                "skipped-site", f"what edit {edit} did to them is not measured, and drift counts from there: {why}"
            )

    def _watch_more(self, model: nn.Module, discovery: Discovery, moved: Sequence[Site]) -> None:
        """Watch what an edit moved besides the sites that were guessed, and look at what it brought from now on."""
        discovery.watches(moved)
        brought = discovery.remember(model)
        if moved:
            self._late = tuple(moved)
            self._watch(model, moved, {})
            names = _in_short([site.name for site in moved])
            self._recorder.note(
                MOVED_BESIDES,
                f"edit {self._recorder.edits} also moved {names}, which were not named: they are watched from now on;"
                " what was done to them by then is not measured, and their drift counts from there",
            )
        self._say_brought(brought)

    def _say_brought(self, brought: int) -> None:
        if brought and not self._said_brought:
            self._said_brought = True
            self._recorder.note(
                BROUGHT,
                f"edit {self._recorder.edits} brought {brought} new parameters into the model, such as an adapter's:"
                " they are watched once an edit moves them",
            )

    def release(self, instruments: Instruments) -> None:
        """Look for nothing any more, and let go of what was measured with: these hold nothing."""
        self._discovery, self._instruments = None, instruments


def _watched_at(model: nn.Module, site: Site) -> Tensor | None:
    """The weight that counts at a site, in parts where it is spread; None where it can't be read."""
    found = locate(model, site)
    if found is not None and is_spread(found[1]):
        return found[1]
    weight = weight_at(model, site)
    return weight if isinstance(weight, Tensor) else None


def _unseen(_: int) -> None:
    """In place of a bar."""


def _in_short(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
    return ", ".join(names[:_NAMED]) + more
