"""What judges outcomes: what became of an edit, from how the weights stand when the next one begins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from stabilitylab.probes.weight_pass import WeightPass
from stabilitylab.record.readings import OutcomeKind
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.walking import NamedModules

Passes = Mapping[str, WeightPass]
"""What a look at each weight says, by site."""


def outcome_of(looks: Passes, left: Passes, references: References) -> OutcomeKind | None:
    """What became of the last edit; None when the weights went to none of the states that are kept.

    looks: at the weights now. left: what the edit left, where they need not differ from it.
    """
    changed = {site: seen for site, seen in looks.items() if seen.update != 0 and not _is_lost(seen, left.get(site))}
    if not changed:
        return "committed"
    seen = {references.changed_between(site, look) for site, look in changed.items()}
    return seen.pop() if len(seen) == 1 else None


Parts = list[tuple[str, tuple[int, ...]]]
"""Which parameters the modules of a model have: each one's last name and shape, whatever they are wrapped in."""


def _parts_of(named: NamedModules) -> Parts:
    held = [module._parameters for _, module in named if module._parameters]
    return [(leaf, tensor.shape) for each in held for leaf, tensor in each.items() if tensor is not None]


def _alike(left: Parts, right: Parts) -> bool:
    """In whatever order, which they need not be put into to be seen to be the same."""
    return left == right or (len(left) == len(right) and Counter(left) == Counter(right))


class Adapters:
    """Whether what an edit brought along, such as an adapter, is gone again, where no weight was ever moved."""

    def __init__(self, named: NamedModules) -> None:
        """named: the model's modules, as everywhere here."""
        self._first = self._before = self._now = _parts_of(named)

    def edited(self, named: NamedModules) -> None:
        """An edit has ended."""
        self._before, self._now = self._now, _parts_of(named)

    def outcome(self, named: NamedModules) -> OutcomeKind | None:
        """What became of the last edit, by what the model is made of now; None where that tells nothing."""
        now, left = _parts_of(named), self._now
        self._now = now
        if _alike(now, left):
            return None if _alike(left, self._before) else "committed"
        return "restored" if _alike(now, self._first) else "rolled_back" if _alike(now, self._before) else None


def is_independent(passes: Passes) -> bool:
    """Whether a model that was not made from what the last edit returned was made from the unedited one: it is nearer
    to that. MEND's editors and ROME with a copy make each edit so.
    """
    seen = passes.values()
    return math.hypot(*(each.drift for each in seen)) < math.hypot(*(each.update for each in seen))


def _is_lost(now: WeightPass, before: WeightPass | None) -> bool:
    """Whether a weight was not finite before and isn't now, so that no distance tells whether it changed."""
    return before is not None and before.nonfinite == now.nonfinite > 0
