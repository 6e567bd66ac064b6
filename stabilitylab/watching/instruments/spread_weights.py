"""The watched weights that are spread over processes: each measures its part, the exchange makes figures of the whole.

What no parts can give (singular values) is found from the whole weight, gathered one at a time where it is not too big.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.probes.absorption import MovedEntries, reduce_moved
from stabilitylab.probes.weight_pass import (
    Scanned,
    WeightPass,
    WeightScan,
    norm_of,
    on_cpu,
    reduce_weight,
    same_bits,
    scan_weight,
)
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.exchange import Exchange, How
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.instruments.transfer import Stack
from stabilitylab.watching.sites import Site, locate
from stabilitylab.watching.spread import Spread, is_spread, part_of, spread_of, whole_of

GATHERED_BYTES: Final = 1 << 28
"""The largest weight that is gathered whole, by each process."""

_SCAN: Final[tuple[How, ...]] = ("norm", "least", "most", "sum")
_PASS: Final[tuple[How, ...]] = ("norm", "norm", "norm", "norm", "least", "most", "sum")
_NARROW: Final = (torch.float16, torch.bfloat16)

Found = tuple[Site, Tensor]
"""A site and its weight, which is spread."""


@dataclass(frozen=True, eq=False)
class Weighed:
    """What an edit left of one weight. packed: as `WeightPass` unpacks it, of the whole. previous: this process's part
    of W₋, or None where the whole is too big to be gathered.
    """

    site: Site
    weight: Tensor
    packed: Tensor
    previous: Tensor | None

    @property
    def seen(self) -> Scanned:
        """The same as of a weight that is not spread; without the change, which needs the whole."""
        return Scanned(self.packed, float(self.packed[3]))

    def gathered(self) -> tuple[Tensor, Scanned]:
        """The whole weight, and what a pass over it finds. Each of its processes must call it."""
        whole = whole_of(self.weight)
        before = whole_of(self.weight, self.previous)
        return whole, reduce_weight(whole, before.clone(), before, norm_of(before), want_change=True)


class SpreadWeights:
    """Looks at each part in full after each edit: a part's version counter does not tell of a write."""

    def __init__(self, bench: Bench, references: References, exchange: Exchange) -> None:
        self._bench = bench
        self._references = references
        self._exchange = exchange
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._last: dict[str, Tensor] = {}
        self.looks = Stack()
        """What the exchange made of looks between two edits."""

    @property
    def any(self) -> bool:
        """Whether any weight was adopted."""
        return bool(self._shapes)

    def adopt(self, site: Site, weight: Tensor) -> Tensor:
        """Watch a weight that is spread, from now on. Returns this process's part of it."""
        part = part_of(weight)
        self._shapes[site.name] = tuple(part.shape)
        self._exchange.joins(over(weight))
        return part

    def watches(self, site: Site) -> bool:
        """Whether this weight was adopted."""
        return site.name in self._shapes

    def found(self, model: nn.Module, sites: Iterable[Site]) -> list[Found]:
        """Those of the sites that were adopted, as they are now. One that is gone, or spread in another way, is not."""
        located = [(site, at[1]) for site in sites if site.name in self._shapes and (at := locate(model, site))]
        return [
            (site, weight)
            for site, weight in located
            if is_spread(weight) and tuple(part_of(weight).shape) == self._shapes[site.name]
        ]

    def look(self, found: Iterable[Found], moved: Callable[[str, float | None], None]) -> None:
        """Measure by references alone, between two edits; W₋ is what the weights are now. Goes over with what is
        settled next. moved: told of ‖W−W₋‖ by site, None where reading it would wait for an accelerator.
        """
        for site, weight in found:

            def then(packed: Tensor, site: Site = site, dtype: torch.dtype = weight.dtype) -> None:
                self.looks.add(site.name, packed, functools.partial(WeightPass.from_host, dtype=dtype))
                moved(site.name, float(packed[3]) if on_cpu(packed) else None)

            self._exchange_pass(site, weight, then, functools.partial(self._glance, site, weight))

    def after(self, found: Sequence[Found], *, comparing: bool, whole: bool) -> list[Weighed]:
        """Measure what an edit left, for the exchange. comparing: whether references are kept. whole: whether anyone
        asks for a weight as a whole. Returns what will hold those that references are kept of, once that is settled.
        """
        weighed: list[Weighed] = []
        for site, weight in found:
            if comparing:
                self._compare(site, weight, whole, weighed)
            elif self._bench.needed(WeightScan, site.name):
                scan: Any = functools.partial(WeightScan.from_scan, dtype=weight.dtype)
                self._add("weight pass", site, weight, functools.partial(_scan, weight), _SCAN, scan)
        return weighed

    def _compare(self, site: Site, weight: Tensor, whole: bool, weighed: list[Weighed]) -> None:
        if self._bench.edit and site.dtype in _NARROW and self._bench.needed(MovedEntries, site.name):
            count = functools.partial(self._count, site, weight)
            self._add("moved entries", site, weight, count, ("sum", "sum"), MovedEntries.from_host)
        gatherable = whole and on_cpu(part_of(weight)) and weight.numel() * weight.element_size() <= GATHERED_BYTES
        previous = self._references.previous(site.name, part_of(weight)).clone() if gatherable else None

        def passed(packed: Tensor) -> None:
            self._bench.add(site.name, packed, functools.partial(WeightPass.from_host, dtype=weight.dtype))
            weighed.append(Weighed(site, weight, packed, previous))

        self._exchange_pass(site, weight, passed, functools.partial(self._measure, site, weight))

    def _exchange_pass(
        self, site: Site, weight: Tensor, then: Callable[[Tensor], None], measure: Callable[[], Tensor | None]
    ) -> None:
        self._exchange.add(f"weight pass of {site.name}", over(weight), measure, _PASS, then)

    def _add(
        self,
        what: str,
        site: Site,
        weight: Tensor,
        measure: Callable[[], Tensor | None],
        how: Sequence[How],
        rebuild: Any,
    ) -> None:
        then = functools.partial(self._bench.add, site.name, rebuild=rebuild)
        self._exchange.add(f"{what} of {site.name}", over(weight), measure, how, then)

    def _measure(self, site: Site, weight: Tensor) -> Tensor | None:
        part = part_of(weight)
        if not part.numel():
            return None
        packed = self._references.measure(site.name, part).packed
        self._last[site.name] = WeightPass.unmoved(packed)
        return packed

    def _glance(self, site: Site, weight: Tensor) -> Tensor | None:
        """The same of a weight that in most cases is as it was."""
        part, last = part_of(weight), self._last.get(site.name)
        if last is not None and on_cpu(part):
            previous = self._references.previous(site.name, part)
            if previous.dtype == part.dtype and same_bits(part, previous):
                return last
        return self._measure(site, weight)

    def _count(self, site: Site, weight: Tensor) -> Tensor | None:
        part = part_of(weight)
        return reduce_moved(part, self._references.previous(site.name, part)) if part.numel() else None


def over(weight: Tensor) -> Spread:
    """Over whom a weight is spread that is known to be."""
    spread = spread_of(weight)
    assert spread is not None
    return spread


def _scan(weight: Tensor) -> Tensor | None:
    part = part_of(weight)
    return scan_weight(part) if part.numel() else None
