"""The gradients of the edited layers, reduced as their backward runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stabilitylab.probes.gradient_factors import GradientSpectrum, reduce_factors
from stabilitylab.probes.gradient_passes import (
    Alignment,
    Factors,
    LaterPasses,
    PassKeeper,
    alignment_from,
    inner_product,
    product_with_update,
)
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.sites import Site, locate_readable


@dataclass
class _Seen:
    """What one layer showed inside one edit. fired: the module that was answered first; copies of it are left out."""

    fired: int
    first: Factors | None = None
    keeper: PassKeeper = field(default_factory=PassKeeper)


class GradientInstrument:
    """Reduces the first pass at once, keeps the last and the worst of the later ones, and counts the rest."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._seen: dict[str, _Seen] = {}
        self._before: dict[str, Factors] = {}
        self._said: set[str] = set()

    def begin(self) -> None:
        """A new edit."""
        self._seen = {}

    def needs_factors(self, site: Site) -> bool:
        """Whether a layer's input and δ are wanted at this edit, or at the next as those of the edit before."""
        needed = self._bench.needed(GradientSpectrum, site.name) or self._bench.needed(LaterPasses, site.name)
        return site.orientation != "none" and (needed or self._keeps_first(site.name))

    def _keeps_first(self, site: str) -> bool:
        return self._bench.needed(Alignment, site) or self._bench.needed_next(Alignment, site)

    def on_pass(self, site: str, fired: int, x: Tensor, delta: Tensor) -> None:
        """A backward has answered a forward."""
        seen = self._seen.setdefault(site, _Seen(fired))
        if seen.fired == fired:
            self._bench.safely(f"gradient of {site}", lambda: self._pass(site, seen, x, delta))

    def overwritten(self, site: str) -> None:
        """A pass whose gradient can't be told."""
        self._left_out(f"gradient of {site} left out: its input was overwritten before the backward")

    def _left_out(self, says: str) -> None:
        """Note it, once in the run: it may be so in each of many passes."""
        if says not in self._said:
            self._said.add(says)
            self._bench.note("capture", says)

    def _pass(self, site: str, seen: _Seen, x: Tensor, delta: Tensor) -> None:
        if seen.keeper.passes:
            if self._bench.needed(LaterPasses, site):
                seen.keeper.later(x, delta)
            return
        if self._keeps_first(site):
            seen.first = Factors.of(x, delta)
        packed, rebuild = reduce_factors(x, delta)
        seen.keeper.first(packed, rebuild)
        if self._bench.needed(GradientSpectrum, site):
            self._bench.add(site, packed, rebuild)

    def after(self, model: nn.Module, sites: Sequence[Site], references: References) -> None:
        """Reduce what was kept, while W₋ is still the weight before the edit."""
        for site in sites:
            seen = self._seen.get(site.name)
            if seen is not None:
                self._bench.safely(f"passes of {site.name}", functools.partial(self._later, site.name, seen))
                self._bench.safely(
                    f"alignment of {site.name}", functools.partial(self._align, model, site, seen, references)
                )
        self._seen = {}

    def _later(self, site: str, seen: _Seen) -> None:
        reduced = seen.keeper.reduce() if self._bench.needed(LaterPasses, site) else None
        if reduced is not None and seen.keeper.overwritten:
            what = f"last or worst gradient of {site}"
            self._left_out(f"{what} left out: its factors were overwritten after the backward")
        if reduced is not None:
            self._bench.add(site, *reduced)

    def _align(self, model: nn.Module, site: Site, seen: _Seen, references: References) -> None:
        before = self._before.pop(site.name, None)
        before = before if before is not None and before.intact else None
        if seen.first is None or not seen.first.intact:
            return
        if self._bench.needed_next(Alignment, site.name):
            self._before[site.name] = seen.first
        found = locate_readable(model, site) if self._bench.needed(Alignment, site.name) else None
        if found is None or not references.holds(site.name):
            return
        own = inner_product(seen.first, seen.first)
        products = [own, torch.zeros_like(own), torch.zeros_like(own)]
        if before is not None:
            products = [own, inner_product(before, before), inner_product(seen.first, before)]
        previous = references.previous(site.name, found[1])
        update = product_with_update(seen.first, found[1], previous, site.orientation == "in_out")
        packed = torch.cat([torch.stack(products), update])
        self._bench.add(site.name, packed, functools.partial(alignment_from, has_previous=before is not None))
