"""How much a layer can take: it is moved along the update of a dry edit until the canary is lost, and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from stabilitylab.acting.scanning.answers import Original
from stabilitylab.acting.scanning.dry import Told, unheard
from stabilitylab.errors import EditError, UsageError
from stabilitylab.record.scanned import CapacityScan
from stabilitylab.watching.sites import Site, locate_readable
from stabilitylab.watching.snapshot import RandomStates, take

MOST_UPDATES: Final = 8
"""Of each site that are tried. Single updates of one layer differ tenfold in their steps, and along some the canary is
never lost: medians of four ranked the layers of some models at random (`benchmarks.scan.ranking`), of eight no more."""
MOST_OCTAVES: Final = 20
"""The largest step is 2^20 times the update, the smallest 2^-20 times."""
RESOLUTION: Final = 0.125
"""Octaves between a step that keeps the canary and one that loses it, when the search is over."""


def capacities(
    model: nn.Module,
    original: Original,
    updates: Mapping[Site, Sequence[Tensor]],
    *,
    limit: float,
    progress: Told = unheard,
) -> tuple[CapacityScan, ...]:
    """Of each site, how many times an update can be added to its weight until the canary is `limit` nats away.

    W₀ + s·Δ is formed in float32 or above and written in the weight's dtype, for a step s that is doubled from 1 until
    the canary is lost (or halved until it is not), and then found by bisection of log₂ s to `RESOLUTION`. Every next
    update begins at the step of the one before, which saves forwards; where the distance along an update passes the
    limit more than once, any of the crossings may be found.

    updates: from `dry.dry_updates`; of each site `MOST_UPDATES` are tried, spread evenly. A site without one, or that
    is gone, is left out. limit: mean KL in nats, `analysis.limits.KL_COLLAPSED`. Forwards: 5 to 24 for each update;
    gradients are off, the model is in evaluation mode, and afterwards it is bit for bit as before, random states too.
    Memory: a copy of the model and three of the largest site in float32.

    Raises:
        UsageError: the canary's answer of the unedited model is not finite.
        EditError: something was not bit for bit as before after it was put back.
        Whatever the model raises, after everything was put back.
    """
    if not original.is_sound:
        raise UsageError(
            "the canary's answer is not finite before any edit; expected a canary that the model can answer"
        )
    chosen = {site: _spread(found) for site, found in updates.items() if found and locate_readable(model, site)}
    total = sum(map(len, chosen.values()))
    before = take({"": model})
    random = RandomStates(before.generators)
    found: list[CapacityScan] = []
    try:
        for site, each in chosen.items():
            done = sum(capacity.updates for capacity in found)
            told = partial(_told, progress, done, total)
            found.append(_of_site(model, original, site, each, limit, told))
    finally:
        left = before.put_back()
        random.put_back()
    if left:
        raise EditError(f"{left[0]!r} could not be put back after it was moved; load the model anew")
    progress(total, total)
    return tuple(found)


def _told(progress: Told, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _spread(updates: Sequence[Tensor]) -> list[Tensor]:
    """At most `MOST_UPDATES` of them, the first and the last among them."""
    if len(updates) <= MOST_UPDATES:
        return list(updates)
    return [updates[round(n * (len(updates) - 1) / (MOST_UPDATES - 1))] for n in range(MOST_UPDATES)]


@torch.no_grad()
def _of_site(
    model: nn.Module,
    original: Original,
    site: Site,
    updates: Sequence[Tensor],
    limit: float,
    progress: Callable[[int], None],
) -> CapacityScan:
    located = locate_readable(model, site)
    assert located is not None
    weight = located[1].detach()
    kept = weight.clone()
    wide = kept.to(torch.promote_types(torch.float32, kept.dtype))
    steps: list[float] = []
    norms: list[float] = []
    start = 0
    try:
        for number, update in enumerate(updates):
            progress(number)
            change = update.to(wide)

            def is_lost(step: float, change: Tensor = change) -> bool:
                weight.copy_(torch.add(wide, change, alpha=step))
                return original.distance_of(model).is_lost(limit)

            steps.append(first_lost(is_lost, start))
            start = 0 if math.isinf(steps[-1]) else round(math.log2(steps[-1]))
            norms.append(float(torch.linalg.vector_norm(change, dtype=torch.float64)))
    finally:
        weight.copy_(kept)
    return CapacityScan(site.name, median(steps), min(steps), max(steps), median(norms), len(steps))


def first_lost(is_lost: Callable[[float], bool], start: int = 0) -> float:
    """The step from which on `is_lost`, to within half of `RESOLUTION`; ∞ where none up to 2^`MOST_OCTAVES` is.

    start: log₂ of the first step that is tried. Where all steps down to 2^-`MOST_OCTAVES` are lost it is that one.
    """
    low = high = max(1 - MOST_OCTAVES, min(MOST_OCTAVES - 1, start))
    if is_lost(2.0**low):
        while is_lost(2.0 ** (low := low - 1)):
            if low <= -MOST_OCTAVES:
                return 2.0**low
        high = low + 1
    else:
        while not is_lost(2.0 ** (high := high + 1)):
            if high >= MOST_OCTAVES:
                return math.inf
        low = high - 1
    kept, lost = float(low), float(high)
    while lost - kept > RESOLUTION:
        middle = (kept + lost) / 2
        kept, lost = (kept, middle) if is_lost(2.0**middle) else (middle, lost)
    return float(2.0 ** ((kept + lost) / 2))
