"""What a probe is: one kind of quantity, computed in float64 from a measurement that probes share.

Two steps keep probes cheap and simple. A *measurement* (``weight_pass``, ``gradient_factors``, ``output_pass``,
``logits_pass``, ``normaliser_pass``) reduces big tensors to a few small ones on their device, once per site. The
monitor copies all of them to the host in one go. A *probe* then is a plain formula on those numbers: it never sees the
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Generic, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import UsageError
from stabilitylab.record.readings import Metric, Seen

Host = NDArray[np.float64]
Readings = Mapping[str, float | Host]
Tier = Literal["light", "default", "deep"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""By cost; each holds the ones before it."""

DEEP_EVERY = 10
"""Edits between two measurements of a deep probe, unless it is told otherwise."""


@dataclass(frozen=True)
class BySite:
    """Measurements of several sites that were made at once: each is what the probes of its kind are given there."""

    parts: Mapping[str, Any]


class Probe(ABC, Generic[Seen]):
    """Measures one kind of quantity at each site.

    Subclass it with the measurement it needs, describe its metrics, write `compute`, and add the class to
    `stabilitylab.probes.ALL`. The contract tests, the catalogue and the reports find it there.
    """

    needs: ClassVar[type[Any]]
    """The measurement class whose instances `compute` is given."""

    metrics: ClassVar[tuple[Metric, ...]]
    """What `compute` emits; `follows` below names what a probe of earlier readings is fed with."""

    follows: ClassVar[tuple[str, ...]] = ()

    tier: ClassVar[Tier] = "default"
    """The cheapest tier that the probe belongs to: its cost, mostly that of what it needs."""

    dear: ClassVar[bool] = False
    """Whether it measures only as often as the run's budget allows, unless it was told how often."""

    def __init__(self, *, every: int | None = None, sites: str | Sequence[str] | None = None) -> None:
        """every: measure at edit 0 and at each n-th edit (each edit; a deep probe each tenth). sites: only at sites
        whose names match these patterns (``*`` crosses dots). Raises UsageError when `every` is not 1 or more.
        """
        self.every = every if every is not None else DEEP_EVERY if self.tier == "deep" else 1
        if self.every < 1:
            raise UsageError(f"{type(self).__name__}(every={every}): expected a number of edits, 1 or more")
        self.is_paced = self.dear and every is None
        """Whether the run's budget says when it measures."""
        self.sites = None if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)

    def is_due(self, edit: int) -> bool:
        """Whether it measures at this edit."""
        return edit % self.every == 0

    def is_for(self, site: str) -> bool:
        """Whether it measures at this site."""
        return self.sites is None or any(fnmatchcase(site, pattern) for pattern in self.sites)

    @abstractmethod
    def compute(self, seen: Seen) -> Readings:
        """Values by metric name: a float, or a float64 array of at most `Metric.length` values.

        A metric that does not apply is left out: absent is not NaN.
        """
