"""The weights after an edit: one pass over those that moved, and the largest singular value followed along."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import did_you_mean
from stabilitylab.probes.absorption import AbsorptionPass, MovedEntries, reduce_absorption, reduce_moved
from stabilitylab.probes.feedback import FeedbackPass
from stabilitylab.probes.gradient_passes import Alignment
from stabilitylab.probes.top_singular import TopSingular, follow, start_direction, update_direction
from stabilitylab.probes.weight_pass import (
    Scanned,
    WeightPass,
    WeightScan,
    WeightWrites,
    on_cpu,
    same_bits,
    scan_weight,
)
from stabilitylab.probes.weight_spectrum import WeightSpectrum, gram_of, spectrum_of_weight
from stabilitylab.probes.weight_subspace import LeadingSubspace, compare_subspaces, leading_subspace
from stabilitylab.watching.adapted import Parts, is_adapted
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.sites import Site, locate, locate_readable, weight_at

_COMPARING = (WeightPass, TopSingular, LeadingSubspace, AbsorptionPass, MovedEntries, Alignment, FeedbackPass)
"""The measurements that need W₀ or W₋."""

_MATRIX = 2  # dimensions
_NARROW = (torch.float16, torch.bfloat16)

_UNSEEN = 0.005
"""Share of σ₁ by which updates may add up before it is followed anew: it can't have changed by more than that."""


@dataclass
class _Followed:
    """σ₁ of one weight, its direction, and the norms of the updates that came since they were last found."""

    value: Tensor
    direction: Tensor
    first_direction: Tensor
    since: float = 0.0


class WeightInstrument:
    """Looks at each watched weight after each edit where references are kept, since those must follow it.

    A weight that shows no sign of a write is not read again: its readings are those of the last edit with an update of
    0. In turn, one such weight an edit is read all the same, for writes that left no sign.
    """

    def __init__(self, bench: Bench) -> None:
        self.references = References()
        self.keeps_references = any(map(bench.ever_needed, _COMPARING))
        self._bench = bench
        self._missing: set[str] = set()
        self._versions: dict[str, tuple[int, int]] = {}
        self._last: dict[str, Tensor] = {}
        self._followed: dict[str, _Followed] = {}
        self._originals: dict[str, Tensor] = {}
        self._parts: dict[str, Parts] = {}

    def begin(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """An edit begins: which tensor each weight is, and how often that was written so far."""
        self._versions.clear()
        if not self._bench.needed(WeightWrites):
            return
        for site in sites:
            found = locate_readable(model, site)
            if found is not None and not found[1].is_inference() and not is_adapted(found[0]):
                self._versions[site.name] = (id(found[1]), found[1]._version)

    def _written(self, name: str, weight: Tensor) -> None:
        before = self._versions.get(name)
        # Another tensor in its place has a counter of its own.
        if before is not None and before[0] == id(weight) and self._bench.needed(WeightWrites, name):
            writes = float(weight._version - before[1])
            packed = torch.tensor([writes], dtype=torch.float64)
            self._bench.add(name, packed, WeightWrites.from_host)

    def after(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Measure each site; note each that is gone or can't be read any more, once."""
        alone = (WeightScan, WeightSpectrum, WeightWrites)
        if not (self.keeps_references or any(map(self._bench.needed, alone))):
            return
        turn = self._bench.edit % max(len(sites), 1)
        for at, site in enumerate(sites):
            weight = weight_at(model, site)
            if isinstance(weight, Tensor):
                named = site.name
                self._remember_parts(model, site)
                self._bench.safely(f"weight pass of {named}", lambda: self._weight(site, weight, at == turn))  # noqa: B023
                self._bench.safely(f"writes of {named}", lambda: self._written(named, weight))  # noqa: B023
                self._bench.safely(f"spectrum of {named}", lambda: self._spectrum(site, weight))  # noqa: B023
            elif site.name not in self._missing:
                self._missing.add(site.name)
                self._bench.note("skipped-site", f"{site.name}: {weight}")

    def compare(self, model: nn.Module, sites: Sequence[Site], updates: Mapping[str, Tensor]) -> None:
        """See what became of the updates that the editor told of, while W₋ is still the weight before the edit."""
        names = {site.name for site in sites}
        for name in updates.keys() - names - self._missing:
            self._missing.add(name)
            self._bench.note(
                "skipped-site",
                f"{name}: an update was reported for it, but it is not watched{did_you_mean(name, names)}",
            )
        for site in sites:
            if site.name in updates and self._bench.needed(AbsorptionPass, site.name):
                self._bench.safely(
                    f"absorption at {site.name}", functools.partial(self._absorbed, model, site, updates[site.name])
                )

            if site.dtype in _NARROW and self._bench.needed(MovedEntries, site.name):
                self._bench.safely(f"moved entries of {site.name}", functools.partial(self._moved, model, site))

    def _moved(self, model: nn.Module, site: Site) -> None:
        weight = weight_at(model, site)
        if isinstance(weight, str) or not self.references.holds(site.name):
            return
        if not self.references.untouched(site.name, weight):
            previous = self.references.previous(site.name, weight)
            self._bench.add(site.name, reduce_moved(weight, previous), MovedEntries.from_host)

    def _absorbed(self, model: nn.Module, site: Site, update: Tensor) -> None:
        weight = weight_at(model, site)
        if isinstance(weight, Tensor) and self.references.holds(site.name):
            previous = self.references.previous(site.name, weight)
            self._bench.add(site.name, reduce_absorption(update, weight, previous), AbsorptionPass.from_host)

    def look(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Measure sites between two edits, by references alone; W₋ is what they are now."""
        for site in sites:
            weight = weight_at(model, site)
            if isinstance(weight, Tensor):
                self._bench.safely(f"weight pass of {site.name}", functools.partial(self._look, site, weight))

    def _look(self, site: Site, weight: Tensor) -> None:
        seen = self.references.measure(site.name, weight)
        self._last[site.name] = WeightPass.unmoved(seen.packed)
        self._bench.add(site.name, seen.packed, functools.partial(WeightPass.from_host, dtype=weight.dtype))
        if site.name in self._followed:
            self._followed[site.name].since += math.inf if seen.update is None else seen.update

    def changed(self, model: nn.Module, sites: Sequence[Site]) -> list[Site]:
        """The sites whose weight differs from what the last edit left. Synchronises an accelerator."""
        return [site for site in sites if self._has_changed(model, site)]

    def _has_changed(self, model: nn.Module, site: Site) -> bool:
        parts, found = self._parts.get(site.name), locate(model, site)
        if parts is not None and found is not None and is_adapted(found[0]) and parts.are_those_of(found[0]):
            return False
        weight = weight_at(model, site)
        return isinstance(weight, Tensor) and self.references.moved(site.name, weight)

    def _remember_parts(self, model: nn.Module, site: Site) -> None:
        found = locate(model, site)
        if self.keeps_references and found is not None and is_adapted(found[0]):
            self._parts[site.name] = Parts(found[0])
        else:
            self._parts.pop(site.name, None)

    def _weight(self, site: Site, weight: Tensor, in_full: bool) -> None:
        if not self.keeps_references:
            if self._bench.needed(WeightScan, site.name):
                rebuild: Any = functools.partial(WeightScan.from_scan, dtype=weight.dtype)
                self._bench.add(site.name, scan_weight(weight), rebuild)
            return
        followed = self._bench.ever_needed(TopSingular) and weight.dim() >= _MATRIX
        last = self._last.get(site.name)
        if last is not None and not in_full and self.references.untouched(site.name, weight):
            seen = Scanned(last, 0.0)
        else:
            seen = self.references.measure(site.name, weight, want_change=followed)
            self._last[site.name] = WeightPass.unmoved(seen.packed)
        self._bench.add(site.name, seen.packed, functools.partial(WeightPass.from_host, dtype=weight.dtype))
        if followed:
            self._bench.safely(f"spectral norm of {site.name}", lambda: self._follow(site, weight, seen))

    def _follow(self, site: Site, weight: Tensor, seen: Scanned) -> None:
        followed = self._followed.get(site.name)
        if followed is None:
            value, direction = start_direction(weight)
            followed = self._followed[site.name] = _Followed(value, direction, direction)
        elif seen.update is None or seen.update != 0:
            followed.since += seen.update or 0.0
            unknown = not on_cpu(weight) or not followed.since <= _UNSEEN * followed.value.item()
            if unknown:
                self._find_anew(followed, site, weight, seen)
        if self._bench.needed(TopSingular, site.name):
            packed = torch.stack([followed.value.to(seen.packed.device), seen.packed[0]])
            self._bench.add(site.name, packed, TopSingular.from_host)

    def _find_anew(self, followed: _Followed, site: Site, weight: Tensor, seen: Scanned) -> None:
        direction = followed.direction.to(weight.device)
        usable = torch.isfinite(direction).all()
        direction = torch.where(usable, direction, followed.first_direction.to(weight.device))
        update = torch.ones_like(direction) if seen.change is None else update_direction(seen.change)
        update = torch.where(torch.isfinite(update).all(), update, torch.ones_like(update))
        largest = torch.maximum(-seen.packed[4], seen.packed[5])
        size = torch.where(largest > 0, largest, torch.ones_like(largest)).to(direction.dtype)
        followed.value, followed.direction = follow(weight, (direction, update), size)
        followed.since = 0.0

    def _spectrum(self, site: Site, weight: Tensor) -> None:
        """What the deep probes need of a matrix, where one that is due does. Waits for an accelerator."""
        spectrum = self._bench.needed(WeightSpectrum, site.name)
        subspace = self._bench.needed(LeadingSubspace, site.name)
        if weight.dim() != _MATRIX or not (spectrum or subspace):
            return
        gram = gram_of(weight)
        if spectrum:
            self._bench.add(site.name, spectrum_of_weight(weight, gram), WeightSpectrum)
        if subspace:
            now = leading_subspace(gram)
            original = self._originals.get(site.name)
            if original is None:
                first = self.references.original(site.name, weight)
                same = first.dtype == weight.dtype and same_bits(weight, first)
                original = self._originals[site.name] = now if same else leading_subspace(gram_of(first))
            self._bench.add(site.name, compare_subspaces(original, now), LeadingSubspace)
