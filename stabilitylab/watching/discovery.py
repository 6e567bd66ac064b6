"""Where no sites were named: every parameter as it was, until an edit shows which ones it moves. Where they are what a
host says that it edits: every other parameter, for as long as the loop runs.

As it was: a copy on the host where there is memory for it, so that the first edit is measured like any; else a checksum
of its bits, which tells that it moved and no more.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from stabilitylab.acting.memory import in_gb, shortage
from stabilitylab.probes.weight_pass import same_bits
from stabilitylab.watching.adapted import parts_of_layers
from stabilitylab.watching.sites import Site, all_sites, locate, locate_readable, weight_at, why_unmeasurable

Moved = dict[str, tuple[Site, Tensor | None]]
"""By name: the site, and its weight as it was, where a copy was kept."""

_PIECE: Final = 1 << 20
"""Words that are summed together."""
_FACTOR: Final = 1_000_003
"""What sums are multiplied with before the next one is added, so that pieces can't change places unseen."""


@dataclass(frozen=True, eq=False)
class _Known:
    """A parameter as it was: a host copy, or the checksum of its bits. itself: of one that an edit brought, since the
    next edit may bring another in its place.
    """

    site: Site
    was: Tensor | int
    itself: weakref.ref[Tensor] | None = None

    def is_unlike(self, weight: Tensor) -> bool:
        """Whether it is another now. Waits for an accelerator."""
        if isinstance(self.was, Tensor):  # in the live dtype: the user may have cast the model since
            return not same_bits(weight.cpu(), self.was.to(weight.dtype))
        return checksum(weight) != self.was


def checksum(tensor: Tensor) -> int:
    """A number that changes with any bit of a tensor (and by chance of 2⁻⁶⁴ does not): sums of its words, wrapped."""
    words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = words[: words.numel() // 8 * 8].view(torch.int64)
    found = 0
    for start in range(0, whole.numel(), _PIECE):
        found = found * _FACTOR + int(whole[start : start + _PIECE].sum())
    return found * _FACTOR + int(words[whole.numel() * 8 :].long().sum())


def _whole_sites(model: nn.Module) -> list[Site]:
    """Every site, but for the parts that a layer's weight is made of: it moves as a whole."""
    parts = tuple(parts_of_layers(model).values())
    return [site for site in all_sites(model).values() if not site.name.startswith(parts)]


class Discovery:
    """What every parameter was. Those that stood still in the edits before are compared more and more seldom: after
    1, 2, 4, 8, … edits.
    """

    def __init__(self, model: nn.Module, but: Sequence[Site] = ()) -> None:
        """but: sites that are watched already, beside which no copies are kept."""
        self._known: dict[str, _Known] = {}
        self._edits = 0
        self._watched = list(but)
        self._root = weakref.ref(model)
        located = (locate_readable(model, site) for site in _whole_sites(model))
        sizes = {id(found[1]): found[1].numel() * found[1].element_size() for found in located if found is not None}
        self._size = sum(sizes.values())
        self._copies = not but and shortage({torch.device("cpu"): self._size}) is None
        self.remember(model)

    @property
    def why_not_measured(self) -> str | None:
        """Why the edit that shows what moves is not measured; None where it is."""
        if self._copies:
            return None
        return f"there is no room for a copy of all parameters ({in_gb(self._size)}); name sites to have it measured"

    @staticmethod
    def unreadable(model: nn.Module) -> dict[str, str]:
        """What can't be compared, with the reason: ``{"h.0.fc1 and 63 more": "its dtype is …"}``."""
        found: dict[str, list[str]] = {}
        for site in _whole_sites(model):
            located = locate(model, site)
            reason = None if located is None else why_unmeasurable(located[1])
            if reason is not None and located is not None and located[1].numel():
                found.setdefault(reason, []).append(site.name)
        more = {reason: f" and {len(names) - 1} more" if names[1:] else "" for reason, names in found.items()}
        return {f"{names[0]}{more[reason]}": reason for reason, names in found.items()}

    def remember(self, model: nn.Module) -> int:
        """Keep the parameters that are not known yet, such as those of an adapter; returns how many there were."""
        located = (locate(model, site) for site in (*self._watched, *(known.site for known in self._known.values())))
        held = {id(found[1]) for found in located if found is not None}  # under other names, in an adapter
        fresh: dict[str, _Known] = {}
        for site in self._sites_in(model):
            found, weight = locate(model, site), weight_at(model, site)
            if found is not None and isinstance(weight, Tensor) and id(found[1]) not in held:
                was = weight.detach().to("cpu", copy=True) if self._copies else checksum(weight)
                fresh[site.name] = _Known(site, was, weakref.ref(found[1]) if self._edits else None)
                if self._edits:  # a wrapper may hold an adapter under a second name
                    held.add(id(found[1]))
        self._known |= fresh
        self._fresh = frozenset(fresh)
        return len(fresh)

    def _sites_in(self, model: nn.Module) -> list[Site]:
        """All sites, by the names that they have without a wrapper: it may be taken off again (PEFT)."""
        root = self._root()
        prefix = next((f"{name}." for name, module in model.named_modules() if name and module is root), "")
        return [
            replace(site, name=site.name.removeprefix(prefix), parameter=site.parameter.removeprefix(prefix))
            for site in _whole_sites(model)
        ]

    def watches(self, sites: Sequence[Site]) -> None:
        """These are watched from now on, and compared here no more."""
        self._watched += sites
        for site in sites:
            self._known.pop(site.name, None)

    def moved(self, model: nn.Module) -> Moved:
        """After an edit: what differs from what it was. Waits for an accelerator."""
        self._edits += 1
        is_due = self._edits & (self._edits - 1) == 0  # a power of two
        found: Moved = {}
        gone: list[str] = []
        for name, known in self._known.items():
            if not (is_due or name in self._fresh):
                continue
            located, weight = locate(model, known.site), weight_at(model, known.site)
            if known.itself is not None and (located is None or known.itself() is not located[1]):
                gone.append(name)
            elif isinstance(weight, Tensor) and known.is_unlike(weight.detach()):
                found[name] = (known.site, known.was if isinstance(known.was, Tensor) else None)
        for name in gone:
            del self._known[name]
        return found
