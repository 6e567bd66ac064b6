"""Dry edits: made one by one on a live model and put back bit for bit; what each did to the watched weights is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import UsageError
from stabilitylab.probes.weight_pass import same_bits
from stabilitylab.watching.reach import model_in, roots_of
from stabilitylab.watching.sites import Patterns, Site, all_sites, find_sites, locate_readable
from stabilitylab.watching.snapshot import RandomStates, Snapshot, take
from stabilitylab.watching.undoing import undone

Updates = dict[Site, tuple[Tensor, ...]]
"""Of each site, what every dry edit that moved it added: float32, of the weight's shape and on its device."""
Told = Callable[[int, int], None]
"""Takes what is done, and how much there is in all."""


def unheard(done: int, total: int) -> None:
    """No progress is shown."""


def dry_updates(
    model: nn.Module,
    apply: Callable[[Any, Any], object],
    requests: Sequence[Any],
    *,
    sites: Patterns | None = None,
    editor: object | None = None,
    progress: Told = unheard,
) -> Updates:
    """Make each of `requests` as a dry edit, ``apply(model, request)``, and keep what it added to each site.

    The edited model is what `apply` returns, alone or first in a tuple, or else `model` itself; sites are found in it
    by name. Everything is put back after each, as `calibrate` does: model, editor, and the object whose method `apply`
    is; random numbers go on from one dry edit to the next, and are put back after the last. Memory: a copy of those
    three, and 4 bytes for each entry of a moved site and edit.

    sites: patterns of what is watched; None for every parameter that moves. A site that no edit moved has no updates,
    and with sites=None is left out. Of tied parameters the first name counts.

    Raises:
        SiteError: a pattern matches nothing.
        UsageError: no request; or the model or the editor holds a tensor that can't be copied.
        EditError: something was not bit for bit as before after it was put back.
        Whatever `apply` raises, after everything was put back.
    """
    if not requests:
        raise UsageError("dry edits got no request; expected one or more")
    watched = _watched(model, sites)
    found: dict[Site, list[Tensor]] = {site: [] for site in watched}
    before = take(roots_of(model, editor, apply))
    originals = _bits_of(model, watched, before)
    random = RandomStates(before.generators)
    try:
        for number, request in enumerate(requests, 1):
            progress(number - 1, len(requests))
            for site, update in _one(model, apply, request, number, originals, before):
                found[site].append(update)
    finally:
        random.put_back()
    progress(len(requests), len(requests))
    return {site: tuple(each) for site, each in found.items() if each or sites is not None}


def _watched(model: nn.Module, patterns: Patterns | None) -> list[Site]:
    """The sites whose values can be read, each tensor under its first name."""
    chosen = all_sites(model).values() if patterns is None else find_sites(model, patterns)
    found: dict[int, Site] = {}
    for site in chosen:
        located = locate_readable(model, site)
        if located is not None:
            found.setdefault(id(located[1]), site)
    return list(found.values())


def _bits_of(model: nn.Module, sites: Sequence[Site], before: Snapshot) -> dict[Site, Tensor]:
    """The snapshot's copy of each site's weight: a model need not be copied twice."""
    copies = {id(values.tensor): values.bits for values in before.values}
    found: dict[Site, Tensor] = {}
    for site in sites:
        located = locate_readable(model, site)
        bits = None if located is None else copies.get(id(located[1]))
        if bits is not None:
            found[site] = bits
    return found


def _one(
    model: nn.Module,
    apply: Callable[[Any, Any], object],
    request: Any,
    number: int,
    originals: dict[Site, Tensor],
    before: Snapshot,
) -> list[tuple[Site, Tensor]]:
    with undone(before, number, otherwise="scan it without dry edits"):
        return list(_moved(model_in(apply(model, request)) or model, originals))


@torch.no_grad()
def _moved(edited: nn.Module, originals: dict[Site, Tensor]) -> Iterator[tuple[Site, Tensor]]:
    for site, original in originals.items():
        located = locate_readable(edited, site)
        if located is None:
            continue
        weight = located[1].detach().to(original.device)
        if weight.dtype == original.dtype and same_bits(weight, original):
            continue
        wide = torch.promote_types(torch.float32, torch.promote_types(weight.dtype, original.dtype))
        yield site, (weight.to(wide) - original.to(wide)).float()
