"""The weights after an edit: one pass over those that moved, and the largest singular value followed along."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import did_you_mean
from stabilitylab.probes.absorption import AbsorptionPass, MovedEntries, reduce_absorption, reduce_moved
from stabilitylab.probes.feedback import FeedbackPass
from stabilitylab.probes.gradient_passes import Alignment
from stabilitylab.probes.top_singular import TopSingular, any_direction, follow, start_direction, update_direction
from stabilitylab.probes.weight_pass import (
    Scanned,
    WeightPass,
    WeightScan,
    WeightWrites,
    as_matrix,
    same_bits,
    scan_weight,
)
from stabilitylab.probes.weight_pieces import InPieces, scan_pieces
from stabilitylab.probes.weight_spectrum import WeightSpectrum, gram_of, spectrum_of_weight
from stabilitylab.probes.weight_subspace import LeadingSubspace, compare_subspaces, leading_subspace
from stabilitylab.watching.adapted import Parts, is_made
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.exchange import Exchange
from stabilitylab.watching.instruments.references import Home, References
from stabilitylab.watching.instruments.spread_weights import SpreadWeights, Weighed
from stabilitylab.watching.instruments.transfer import Stack
from stabilitylab.watching.offloaded import mark_of, written_in_vain
from stabilitylab.watching.sites import Site, locate, weight_at, weight_in, weight_to_pass, why_unmeasurable
from stabilitylab.watching.spread import FLATTENED, flattened, is_spread, whole_of

_COMPARING = (WeightPass, TopSingular, LeadingSubspace, AbsorptionPass, MovedEntries, Alignment, FeedbackPass)
"""The measurements that need W₀ or W₋."""

_WHOLE = (WeightSpectrum, LeadingSubspace)
"""Those that need all of a weight, which may be spread."""

_MATRIX = 2  # dimensions
_NARROW = (torch.float16, torch.bfloat16)

_AT_ONCE = 1 << 24
"""Entries of all watched matrices up to which σ₁ is found before the first edit; else each from the first edit on that
moves it."""

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

    def __init__(self, bench: Bench, exchange: Exchange, home: Home = "device") -> None:
        """home: where the copies of the weights are kept."""
        self.references = References(home)
        self.keeps_references = any(map(bench.ever_needed, _COMPARING))
        self._bench = bench
        self._spread = SpreadWeights(bench, self.references, exchange)
        self._missing: set[str] = set()
        self._versions: dict[str, tuple[int, int]] = {}
        self._placeholders: dict[str, tuple[int, int]] = {}
        self._in_vain: set[str] = set()
        self._said_lost: set[str] = set()
        self.lost: str | None = None
        """The first site whose placeholder the last edit wrote to, in vain."""
        self._last: dict[str, Tensor] = {}
        self._followed: dict[str, _Followed] = {}
        self._entries = 0
        self._originals: dict[str, Tensor] = {}
        self._parts: dict[str, Parts] = {}
        self._weighed: Sequence[Weighed] = ()

    def adopt(self, site: Site, weight: Tensor) -> None:
        """Watch a weight from now on, which is as it was before any edit."""
        in_parts = is_spread(weight)
        part = self._spread.adopt(site, weight) if in_parts else weight
        if self.keeps_references:
            self.references.adopt(site, part, is_part=in_parts)
            self._last[site.name] = WeightPass.unmoved(self.references.at_rest(site.name))
            self._entries += weight.numel() if weight.dim() >= _MATRIX else 0

    @property
    def is_spread(self) -> bool:
        """Whether any watched weight is spread over processes."""
        return self._spread.any

    def begin(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """An edit begins: which tensor each weight is, and how often that was written so far."""
        self._versions.clear()
        self.lost = None
        self._in_vain.clear()
        located = [(site, locate(model, site)) for site in sites]
        self._placeholders = {
            site.name: mark
            for site, found in located
            if found and (mark := mark_of(found[0], site.parameter.rpartition(".")[2]))
        }
        if not self._bench.needed(WeightWrites):
            return
        for site, found in located:
            if found is None or why_unmeasurable(found[1]) is not None:
                continue
            if not found[1].is_inference() and not is_made(*found):
                self._versions[site.name] = (id(found[1]), found[1]._version)
        for site, weight in self._spread.found(model, sites):
            self._versions[site.name] = (id(weight), weight._version)

    def _written(self, name: str, weight: Tensor | InPieces) -> None:
        before = self._versions.get(name)
        if not isinstance(weight, Tensor):  # nobody writes to what is made of others
            return
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
        spread = self._spread.found(model, sites)
        in_parts = {site.name for site, _ in spread}
        for at, site in enumerate(sites):
            if site.name in in_parts:
                continue
            found = locate(model, site)
            weight = weight_to_pass(model, found)
            if not isinstance(weight, str):
                named = site.name
                self._remember_parts(site, found)
                self._say_lost(site, found)
                self._bench.safely(f"weight pass of {named}", lambda: self._weight(site, weight, at == turn))  # noqa: B023
                if self._bench.needed(WeightWrites, named):
                    self._bench.safely(f"writes of {named}", lambda: self._written(named, weight))  # noqa: B023
                if any(self._bench.needed(each, named) for each in _WHOLE):
                    first = functools.partial(self.references.original, site.name)
                    whole = functools.partial(self._lying, site, weight)
                    self._bench.safely(f"spectrum of {named}", lambda: self._spectrum(site, whole, first))  # noqa: B023
            elif site.name not in self._missing:
                self._missing.add(site.name)
                self._bench.note("skipped-site", f"{site.name}: {self._why_not(model, site) or weight}")
        asks_whole = self._bench.ever_needed(TopSingular) or any(map(self._bench.needed, _WHOLE))
        self._weighed = self._spread.after(spread, comparing=self.keeps_references, whole=asks_whole)

    def settled(self) -> None:
        """What the processes exchanged is there: measure what needs more than their parts' figures."""
        weighed, self._weighed = self._weighed, ()
        for each in weighed:
            self._in_parts(each)

    @property
    def looks(self) -> Stack:
        """What the exchange made of looks at weights that are spread."""
        return self._spread.looks

    def is_gone(self, site: Site, weight: Tensor) -> bool:
        """Whether the weight is spread, and was not when it was adopted: no part of it is the weight."""
        return is_spread(weight) and not self._spread.watches(site)

    def has_placeholder(self, site: Site) -> bool:
        """Whether a site's weight was offloaded when the edit began."""
        return site.name in self._placeholders

    def look_at_placeholder(self, site: Site, layer: nn.Module) -> None:
        """Whether the edit has written to the layer's placeholder so far: the next forward takes a new one."""
        if written_in_vain(layer, site.parameter.rpartition(".")[2], self._placeholders.get(site.name)):
            self._in_vain.add(site.name)

    def _say_lost(self, site: Site, found: tuple[nn.Module, Tensor] | None) -> None:
        if found is not None:
            self.look_at_placeholder(site, found[0])
        if site.name not in self._in_vain:
            return
        leaf = site.parameter.rpartition(".")[2]
        self.lost = self.lost or site.name
        if site.name not in self._said_lost:
            self._said_lost.add(site.name)
            self._bench.note(
                "lost-edit",
                f"{site.name}: an edit wrote to the placeholder of a weight that is offloaded, and was lost; expected "
                f"it to write to the layer's _hf_hook.weights_map[{leaf!r}], or the layer on a device",
            )

    def _in_parts(self, each: Weighed) -> None:
        """What needs more than the parts' figures of a weight that is spread."""
        named, weight = each.site.name, each.weight
        self._bench.safely(f"writes of {named}", lambda: self._written(named, weight))
        if each.previous is None or weight.dim() < _MATRIX:
            return
        if self._bench.ever_needed(TopSingular):
            self._bench.safely(f"spectral norm of {named}", lambda: self._follow(each.site, each.seen, each.gathered))
        original = self.references.original(named, each.previous)
        self._bench.safely(
            f"spectrum of {named}",
            lambda: self._spectrum(each.site, lambda: whole_of(weight), lambda _: whole_of(weight, original)),
        )

    @staticmethod
    def _why_not(model: nn.Module, site: Site) -> str | None:
        found = locate(model, site)
        if found is None and flattened(model) is not None:
            return FLATTENED
        if found is None or not is_spread(found[1]):
            return None
        return (
            "its weight has become a DTensor since, or is spread in another way; attach after fully_shard or "
            "parallelize_module"
        )

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
        """Measure sites between two edits, by references alone; W₋ is what they are now. What is spread goes over with
        what the exchange settles next.
        """
        for site in sites:
            weight = "" if self._spread.watches(site) else weight_to_pass(model, locate(model, site))
            if not isinstance(weight, str):
                self._bench.safely(f"weight pass of {site.name}", functools.partial(self._look, site, weight))
        self._spread.look(self._spread.found(model, sites), self._moved_since)

    def _look(self, site: Site, weight: Tensor | InPieces) -> None:
        seen = self.references.measure(site.name, weight)
        self._last[site.name] = WeightPass.unmoved(seen.packed)
        self._bench.add(site.name, seen.packed, functools.partial(WeightPass.from_host, dtype=weight.dtype))
        self._moved_since(site.name, seen.update)

    def _moved_since(self, name: str, update: float | None) -> None:
        if name in self._followed:
            self._followed[name].since += math.inf if update is None else update

    def changed(self, model: nn.Module, sites: Sequence[Site]) -> list[Site]:
        """The sites whose weight differs from what the last edit left, and those that are spread: of them no process
        can tell by itself. Synchronises an accelerator.
        """
        spread = [site for site in sites if self._spread.watches(site)]
        return spread + [site for site in sites if site not in spread and self._has_changed(model, site)]

    def _has_changed(self, model: nn.Module, site: Site) -> bool:
        parts, found = self._parts.get(site.name), locate(model, site)
        if parts is not None and found is not None and is_made(*found) and parts.are_those_of(found[0]):
            return False
        weight = weight_in(model, found)
        return isinstance(weight, Tensor) and self.references.moved(site.name, weight)

    def _remember_parts(self, site: Site, found: tuple[nn.Module, Tensor] | None) -> None:
        if self.keeps_references and found is not None and is_made(*found):
            self._parts[site.name] = Parts(found[0])
        else:
            self._parts.pop(site.name, None)

    def _weight(self, site: Site, weight: Tensor | InPieces, in_full: bool) -> None:
        if not self.keeps_references:
            if self._bench.needed(WeightScan, site.name):
                rebuild: Any = functools.partial(WeightScan.from_scan, dtype=weight.dtype)
                scanned = scan_pieces(weight) if isinstance(weight, InPieces) else scan_weight(weight)
                self._bench.add(site.name, scanned, rebuild)
            return
        followed = self._bench.ever_needed(TopSingular) and len(weight.shape) >= _MATRIX
        wanted = followed and self._bench.needed(TopSingular, site.name)
        last = self._last.get(site.name)
        if last is not None and not in_full and self._rests(site.name, weight):
            seen = Scanned(last, 0.0)
        else:
            seen = self.references.measure(site.name, weight, want_change=wanted)
            self._last[site.name] = WeightPass.unmoved(seen.packed)
        self._bench.add(site.name, seen.packed, functools.partial(WeightPass.from_host, dtype=weight.dtype))
        if followed:
            self._bench.safely(
                f"spectral norm of {site.name}",
                lambda: self._follow(site, seen, lambda: (self._lying(site, weight), seen)),
            )

    def _rests(self, name: str, weight: Tensor | InPieces) -> bool:
        return isinstance(weight, Tensor) and self.references.untouched(name, weight)

    def _lying(self, site: Site, weight: Tensor | InPieces) -> Tensor:
        """The weight that was just measured, as one tensor: of one in pieces what the pass left as W₋."""
        if isinstance(weight, Tensor):
            return weight
        return self.references.last(site.name) if self.keeps_references else weight.whole()

    def _follow(self, site: Site, seen: Scanned, whole: Callable[[], tuple[Tensor, Scanned]]) -> None:
        """whole: gives the weight, and what a pass over it found with what it changed."""
        followed, due = self._followed.get(site.name), self._bench.needed(TopSingular, site.name)
        if followed is None and self._entries <= _AT_ONCE:
            value, direction = start_direction(whole()[0])
            followed = self._followed[site.name] = _Followed(value, direction, direction)
        elif followed is None:
            if seen.update == 0 or self._bench.edit == 0:
                return
            weight, closer = whole()
            start = any_direction(as_matrix(weight).shape[1], weight.device)
            followed = self._followed[site.name] = _Followed(closer.packed[0], start, start)
            self._find_anew(followed, weight, closer)
        else:
            followed.since += math.inf if seen.update is None else seen.update
            # What came at edits at which it was not due is found by the same few products.
            if due and followed.since != 0 and not self._is_known(followed):
                self._find_anew(followed, *whole())
        if due:
            packed = torch.stack([followed.value.to(seen.packed.device), seen.packed[0]])
            self._bench.add(site.name, packed, TopSingular.from_host)

    @staticmethod
    def _is_known(followed: _Followed) -> bool:
        """Whether σ₁ can't have changed by much; asks an accelerator nothing."""
        return math.isfinite(followed.since) and followed.since <= _UNSEEN * followed.value.item()

    def _find_anew(self, followed: _Followed, weight: Tensor, seen: Scanned) -> None:
        direction = followed.direction.to(weight.device)
        usable = torch.isfinite(direction).all()
        direction = torch.where(usable, direction, followed.first_direction.to(weight.device))
        update = torch.ones_like(direction) if seen.change is None else update_direction(seen.change)
        update = torch.where(torch.isfinite(update).all(), update, torch.ones_like(update))
        largest = torch.maximum(-seen.packed[4], seen.packed[5])
        size = torch.where(largest > 0, largest, torch.ones_like(largest)).to(direction.dtype)
        followed.value, followed.direction = follow(weight, (direction, update), size)
        followed.since = 0.0

    def _spectrum(self, site: Site, whole: Callable[[], Tensor], first: Callable[[Tensor], Tensor]) -> None:
        """What the deep probes need of a matrix, where one that is due does. Waits for an accelerator.

        whole: gives the weight. first: gives W₀, on the device of the weight.
        """
        spectrum = self._bench.needed(WeightSpectrum, site.name)
        subspace = self._bench.needed(LeadingSubspace, site.name)
        if len(site.shape) != _MATRIX or not (spectrum or subspace):
            return
        weight = whole()
        gram = gram_of(weight)
        if spectrum:
            self._bench.add(site.name, spectrum_of_weight(weight, gram), WeightSpectrum)
        if subspace:
            now = leading_subspace(gram)
            original = self._originals.get(site.name)
            if original is None:
                before = first(weight)
                same = before.dtype == weight.dtype and same_bits(weight, before)
                original = self._originals[site.name] = now if same else leading_subspace(gram_of(before))
            self._bench.add(site.name, compare_subspaces(original, now), LeadingSubspace)
