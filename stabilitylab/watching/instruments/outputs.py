"""The outputs of the watched layers, reduced as their forward runs, and what enters the next normalisation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stabilitylab.probes.output_pass import (
    LaterOutputs,
    NormInput,
    OutputKeeper,
    OutputPass,
    largest_magnitude,
    reduce_output,
)
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.sites import Site


@dataclass
class _Seen:
    """What one layer showed inside one edit. fired: the module that ran first; copies of it are left out."""

    fired: int
    keeper: OutputKeeper = field(default_factory=OutputKeeper)


class OutputInstrument:
    """Reduces the first output of a layer in an edit in full, and of the later ones their extremes."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._seen: dict[str, _Seen] = {}
        self._awaiting_norm: list[str] = []

    def begin(self) -> None:
        """A new edit."""
        self._seen, self._awaiting_norm = {}, []

    def wants(self, site: str) -> bool:
        """Whether a layer's outputs are wanted at this edit."""
        needed = self._bench.needed
        return needed(LaterOutputs, site) or needed(OutputPass, site) or needed(NormInput, site)

    def on_output(self, site: str, fired: int, output: Tensor) -> None:
        """A watched layer has run."""
        seen = self._seen.get(site)
        if seen is None:
            seen = self._seen[site] = _Seen(fired)
        if seen.fired == fired and self.wants(site):
            self._bench.safely(f"output of {site}", lambda: self._output(site, seen, output))

    def _output(self, site: str, seen: _Seen, output: Tensor) -> None:
        largest = None
        if seen.keeper.passes == 0:
            if self._bench.needed(OutputPass, site):
                packed = reduce_output(output)
                largest = packed[1]
                self._bench.add(site, packed, functools.partial(OutputPass.from_host, dtype=output.dtype))
            if self._bench.needed(NormInput, site):
                self._awaiting_norm.append(site)
        if self._bench.needed(LaterOutputs, site):
            seen.keeper.add(output, largest)
        else:
            seen.keeper.passes += 1

    @property
    def awaits_norm(self) -> bool:
        """Whether a layer's first output is to be followed to the normalisation after it."""
        return bool(self._awaiting_norm)

    def on_norm_input(self, entering: Tensor) -> None:
        """A normalisation is about to run: the first after a layer is the one that its output reaches."""
        sites, self._awaiting_norm = self._awaiting_norm, []
        if sites:
            self._bench.safely("inputs of normalisations", lambda: self._norm_input(sites, entering))

    def _norm_input(self, sites: Sequence[str], entering: Tensor) -> None:
        with torch.no_grad():
            largest = largest_magnitude(entering).reshape(1)
        for site in sites:
            self._bench.add(site, largest, functools.partial(NormInput.from_host, dtype=entering.dtype))

    def after(self, sites: Sequence[Site]) -> None:
        """Hand over what was counted."""
        for site in sites:
            seen = self._seen.get(site.name)
            reduced = None if seen is None else seen.keeper.reduce()
            if reduced is not None:
                self._bench.add(site.name, reduced, LaterOutputs.from_host)
        self._seen, self._awaiting_norm = {}, []
