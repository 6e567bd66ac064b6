"""Where no sites were named: a copy of every parameter, until an edit shows which ones it moves."""

from __future__ import annotations

from torch import Tensor, nn

from stabilitylab.probes.weight_pass import same_bits
from stabilitylab.watching.sites import Site, all_sites, locate, locate_readable, why_unmeasurable

Moved = dict[str, tuple[Site, Tensor]]
"""By name: the site, and its weight as it was."""


class Discovery:
    """Host copies of everything that may be edited."""

    def __init__(self, model: nn.Module) -> None:
        self._candidates: Moved = {}
        self.remember(model)

    @staticmethod
    def unreadable(model: nn.Module) -> dict[str, str]:
        """What can't be compared, with the reason: ``{"h.0.fc1 and 63 more": "its dtype is …"}``."""
        found: dict[str, list[str]] = {}
        for site in all_sites(model).values():
            located = locate(model, site)
            reason = None if located is None else why_unmeasurable(located[1])
            if reason is not None and located is not None and located[1].numel():
                found.setdefault(reason, []).append(site.name)
        more = {reason: f" and {len(names) - 1} more" if names[1:] else "" for reason, names in found.items()}
        return {f"{names[0]}{more[reason]}": reason for reason, names in found.items()}

    def remember(self, model: nn.Module) -> int:
        """Copy the parameters that are not known yet, such as those of an adapter; returns how many there were."""
        located = (locate(model, site) for site, _ in self._candidates.values())
        held = {id(found[1]) for found in located if found is not None}  # under other names, in an adapter
        fresh: Moved = {}
        for site in all_sites(model).values():
            found = locate_readable(model, site)
            if found is not None and id(found[1]) not in held:
                fresh[site.name] = (site, found[1].detach().to("cpu", copy=True))
        self._candidates |= fresh
        return len(fresh)

    def moved(self, model: nn.Module) -> Moved:
        """What differs from its copy now. Waits for an accelerator."""
        found: Moved = {}
        for site, original in self._candidates.values():
            located = locate_readable(model, site)
            # In the live dtype: the user may have cast the model since.
            if located is not None and not same_bits(located[1].detach().cpu(), original.to(located[1].dtype)):
                found[site.name] = (site, original)
        return found
