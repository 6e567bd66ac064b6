"""The gradients of the edited layers, reduced as their backward runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.probes.accumulated_gradient import END, STEP, AccumulatedGradient, gradient_used, passes_used
from stabilitylab.probes.base import Host
from stabilitylab.probes.gradient_factors import GradientSize, GradientSpectrum, reduce_factors, reduce_size
from stabilitylab.probes.gradient_passes import (
    Alignment,
    Factors,
    LaterPasses,
    LaterSpectra,
    PassKeeper,
    alignment_from,
    inner_product,
    product_with_update,
)
from stabilitylab.record.readings import Rebuild
from stabilitylab.watching.instruments.accumulated import Accumulated, AccumulatedInstrument, FirstPass
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.exchange import Exchange, How
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.sites import Site, weight_at
from stabilitylab.watching.spread import Spread, spread_of

_USES = 32
"""Uses of a gradient in one edit that processes tell each other of: what they exchange has one length."""

_Packed = tuple[Tensor, Rebuild[GradientSize]]

_OF_GRADIENT = (GradientSize, GradientSpectrum, AccumulatedGradient)
_OF_PASSES = (LaterPasses, LaterSpectra)


@dataclass
class _Seen:
    """What one layer showed inside one edit.

    fired: the module that was answered first; copies of it are left out. first: its factors, where they are kept.
    reduced: what they were reduced to; narrow: whether they are float16; scale: the loss scale that was in force.
    """

    fired: int
    first: Factors | None = None
    reduced: _Packed | None = None
    narrow: bool = False
    scale: Tensor | None = None
    keeper: PassKeeper = field(default_factory=PassKeeper)


class GradientInstrument:
    """Reduces the first pass at once, keeps the last and the worst of the later ones, and counts the rest."""

    def __init__(self, bench: Bench, exchange: Exchange, scaler: torch.amp.GradScaler | None = None) -> None:
        """scaler: see `AccumulatedInstrument`."""
        self._bench = bench
        self._exchange = exchange
        self._spread: dict[str, Spread] = {}
        self._seen: dict[str, _Seen] = {}
        self._before: dict[str, Factors] = {}
        self._said: set[str] = set()
        self._accumulated = AccumulatedInstrument(bench, scaler)
        self._plain: set[str] = set()
        self._sites: dict[str, Site] = {}

    def adopt(self, site: Site, weight: Tensor) -> None:
        """Know of a weight that is watched from now on whether it is spread."""
        spread = spread_of(weight)
        if spread is not None:
            self._spread[site.name] = spread

    def begin(self) -> None:
        """A new edit."""
        self._seen = {}
        self._plain.clear()
        self._accumulated.begin()

    def needs(self, site: Site) -> bool:
        """Whether anything of a weight's gradient is wanted at this edit."""
        return self.needs_factors(site) or self._any(_OF_GRADIENT, site.name)

    def needs_factors(self, site: Site) -> bool:
        """Whether a layer's input and δ are wanted at this edit, or at the next as those of the edit before."""
        needed = self._any((*_OF_GRADIENT, *_OF_PASSES), site.name)
        return site.orientation != "none" and (needed or self._keeps_first(site.name))

    def _any(self, needs: Sequence[type[Any]], site: str) -> bool:
        # A loop, not a generator: this is asked some twenty times a site and edit.
        for need in needs:  # noqa: SIM110
            if self._bench.needed(need, site):
                return True
        return False

    def watch(self, site: Site, module: nn.Module) -> None:
        """Gradients of this layer are wanted in this edit."""
        self._sites[site.name] = site
        # A subclass may compute anything, and so may a forward of the module's own.
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and "forward" not in vars(module):
            self._plain.add(site.name)
        if site.parameter.rpartition(".")[2] not in module._parameters:  # adapters, or a parametrization
            self._accumulated.made_of(site.name, module.parameters())

    def adopts(self, site: str, weight: Tensor) -> bool:
        """Whether to tell of what backwards add to this weight's `.grad`."""
        return self._accumulated.adopt(site, weight, self._sites[site].orientation)

    def accumulated(self, site: str, weight: Tensor) -> None:
        """A backward has added to a weight's `.grad`."""
        self._accumulated.accumulated(site, weight)

    def backward_ended(self) -> None:
        """And is over."""
        self._bench.safely("accumulated gradients", self._accumulated.backward_ended)

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        first = {site: self._first_of(site, seen) for site, seen in self._seen.items()}
        known = {site: found for site, found in first.items() if found is not None}
        self._bench.safely(
            "gradients at the optimizer's step", lambda: self._accumulated.optimizer_steps(optimizer, known)
        )

    def _first_of(self, site: str, seen: _Seen) -> FirstPass | None:
        is_plain = seen.keeper.passes == 1 and site in self._plain
        return None if seen.reduced is None else FirstPass(seen.reduced[0], is_plain, seen.narrow, seen.scale)

    def _keeps_first(self, site: str) -> bool:
        return self._bench.needed(Alignment, site) or self._bench.needed_next(Alignment, site)

    def on_pass(self, site: str, fired: int, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
        """A backward has answered a forward."""
        seen = self._seen.get(site)
        if seen is None:
            seen = self._seen[site] = _Seen(fired)
        if seen.fired == fired:
            product = product if site in self._plain else None
            self._bench.safely(f"gradient of {site}", lambda: self._pass(site, seen, x, delta, product))

    def overwritten(self, site: str) -> None:
        """A pass whose gradient can't be told."""
        self._left_out(f"gradient of {site} left out: its input was overwritten before the backward")

    def _left_out(self, says: str) -> None:
        """Note it, once in the run: it may be so in each of many passes."""
        if says not in self._said:
            self._said.add(says)
            self._bench.note("capture", says)

    def _pass(self, site: str, seen: _Seen, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
        if seen.keeper.passes:
            if self._any(_OF_PASSES, site):
                seen.keeper.later(x, delta)
            return
        if self._keeps_first(site):
            seen.first = Factors.of(x, delta)
        with_spectrum = self._any((GradientSpectrum, LaterSpectra), site)
        seen.reduced = (reduce_factors if with_spectrum else reduce_size)(x, delta, product)
        packed, rebuild = seen.reduced
        seen.narrow, seen.scale = delta.dtype is torch.float16, self._accumulated.scale
        seen.keeper.first(packed, rebuild)

    def after(self, model: nn.Module, sites: Sequence[Site], references: References) -> None:
        """Reduce what was kept, while W₋ is still the weight before the edit."""
        for site in sites:
            seen = self._seen.get(site.name)
            self._bench.safely(f"gradient of {site.name}", functools.partial(self._gradient, site, seen))
            if seen is not None:
                self._bench.safely(
                    f"alignment of {site.name}", functools.partial(self._align, model, site, seen, references)
                )
        self._seen = {}
        self._accumulated.begin()

    def _gradient(self, site: Site, seen: _Seen | None) -> None:
        first = None if seen is None else self._first_of(site.name, seen)
        used = self._accumulated.after(site.name, first)
        spread = self._spread.get(site.name)
        if spread is not None and self._any((*_OF_GRADIENT, *_OF_PASSES), site.name):
            self._over_processes(site, seen, used, spread)
        elif used is not None:
            self._hand_on(site, seen, used)

    def _over_processes(self, site: Site, seen: _Seen | None, used: Accumulated | None, spread: Spread) -> None:
        """What each process's part of `.grad` gives, once the parts of all are combined."""
        own = used.packed if used is not None and used.source in (STEP, END) else torch.empty(0, dtype=torch.float64)
        if own.numel() > 3 * _USES:
            self._left_out(f"gradient of {site.name}: of more than {_USES} steps in an edit the first are told")
            own = own[: 3 * _USES]

        def then(whole: Tensor) -> None:
            if used is not None:
                self._hand_on(site, seen, replace(used, packed=whole[: own.numel()]) if own.numel() else used)

        # Of one length, whatever it is that this process has seen.
        packed = torch.cat([own, own.new_zeros(3 * _USES - own.numel())])
        how: tuple[How, ...] = ("norm", "norm", "first") * _USES
        self._exchange.add(f"gradient of {site.name}", spread, lambda: packed, how, then)

    def _hand_on(self, site: Site, seen: _Seen | None, used: Accumulated) -> None:
        self._add((AccumulatedGradient,), site.name, [(used.packed, used.rebuild)], lambda made: made[0])
        parts = [(used.packed, used.rebuild), used.matrix, None if seen is None else seen.reduced]
        needs = (GradientSize, GradientSpectrum)
        self._add(needs, site.name, parts, lambda made: gradient_used(made[2], made[0], made[1]))
        if seen is not None and self._any(_OF_PASSES, site.name):
            self._later(site.name, seen, used)

    def _later(self, site: str, seen: _Seen, used: Accumulated) -> None:
        reduced = seen.keeper.reduce(self._bench.needed(LaterSpectra, site))
        if reduced is not None and seen.keeper.overwritten:
            what = f"last or worst gradient of {site}"
            self._left_out(f"{what} left out: its factors were overwritten after the backward")
        if reduced is not None:
            parts = [(used.packed, used.rebuild), reduced]
            self._add(_OF_PASSES, site, parts, lambda made: passes_used(made[1], made[0]))

    def _add(
        self,
        needs: Sequence[type[Any]],
        site: str,
        parts: Sequence[tuple[Tensor, Rebuild[Any]] | None],
        combine: Callable[[list[Any]], Any],
    ) -> None:
        """A measurement that is made from several, those that there are, if any of these needs asks for it."""
        if not self._any(needs, site):
            return
        there = [part for part in parts if part is not None]
        ends = [0, *itertools.accumulate(packed.numel() for packed, _ in there)]

        def rebuild(values: Host) -> Any:
            made = iter([make(values[start:end]) for (_, make), start, end in zip(there, ends, ends[1:], strict=False)])
            return combine([None if part is None else next(made) for part in parts])

        full = [packed for packed, _ in there if packed.numel()]
        # Nothing was accumulated and nothing reduced: an empty tensor may lie on another device.
        home = there[-1][0].device
        together = full[0] if len(full) == 1 else torch.cat([packed.to(home) for packed, _ in there])
        self._bench.add(site, together, rebuild)

    def _align(self, model: nn.Module, site: Site, seen: _Seen, references: References) -> None:
        before = self._before.pop(site.name, None)
        before = before if before is not None and before.intact else None
        if seen.first is None or not seen.first.intact:
            return
        if self._bench.needed_next(Alignment, site.name):
            self._before[site.name] = seen.first
        weight = weight_at(model, site) if self._bench.needed(Alignment, site.name) else ""
        if isinstance(weight, str) or not references.holds(site.name):
            return
        own = inner_product(seen.first, seen.first)
        products = [own, torch.zeros_like(own), torch.zeros_like(own)]
        if before is not None:
            products = [own, inner_product(before, before), inner_product(seen.first, before)]
        previous = references.previous(site.name, weight)
        update = product_with_update(seen.first, weight, previous, site.orientation == "in_out")
        packed = torch.cat([torch.stack(products), update])
        self._bench.add(site.name, packed, functools.partial(alignment_from, has_previous=before is not None))
