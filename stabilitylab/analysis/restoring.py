"""Whether edits begin at the original weights, at which layers, and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stabilitylab.record.readings import Array

SAME: Final = 0.01
"""Share of ‖W_t − W_0‖ within which ‖W_t − W_{t−1}‖ is the same: the edit began at the original weight."""
SUSTAINED: Final = 3
LONG: Final = 5
"""Edits in a row at which one layer begins anew and another does not, so that chance has no part in it."""


def means_single_edits(config: Mapping[str, Any]) -> bool:
    """Whether a loop's configuration says that each edit is made on the original model, in EasyEdit's word for it."""
    return config.get("sequential_edit") is False


@dataclass(frozen=True)
class Forgotten:
    """A layer that is not put back while others are. since: the first edit that it carried into. edit: when it was
    established.
    """

    edit: int
    site: str
    since: int


class Restoring:
    """Follows ‖W_t − W_0‖ against ‖W_t − W_{t−1}‖, which are the same where an edit began at the original weight.

    until: the last of at least three edits that each began at the original weights, once three in a row did not; None
    where there were none, or where it went on so. forgotten: the first layer that is not put back while others are.
    carried: how many edits did not begin at the original weights, as long as none did.
    """

    def __init__(self) -> None:
        self.until: int | None = None
        self.forgotten: Forgotten | None = None
        self.carried = 0
        self._since_second = 0
        self._restored = 0
        self._carried = 0
        self._last_restored = 0
        self._runs: dict[str, tuple[int, int]] = {}

    @property
    def restored(self) -> int:
        """How many edits began at the original weights, from the second on."""
        return self._restored

    def follow(self, edit: int, sites: Sequence[str], updates: Array, drifts: Array) -> None:
        """An applied edit: ‖W_t − W_{t−1}‖ and ‖W_t − W_0‖ of each of some sites, [sites]. May hold NaN or infinity."""
        if not (updates > 0).any():
            return
        finite = np.isfinite(updates) & np.isfinite(drifts)
        apart = np.subtract(drifts, updates, out=np.full(drifts.shape, np.inf), where=finite)
        anew = finite & (np.abs(apart) <= SAME * drifts)
        self._follow_all(edit, bool(anew.all()))
        if edit > 1:
            self._follow_each(edit, [(site, bool(a)) for site, a, u in zip(sites, anew, updates, strict=True) if u > 0])

    def _follow_all(self, edit: int, anew: bool) -> None:
        self.carried = self.carried + 1 if edit > 1 and not anew and self.carried == self._since_second else 0
        self._since_second += edit > 1
        if edit > 1 and anew:
            self._restored, self._carried = self._restored + 1, 0
        elif self._restored >= SUSTAINED:
            self._carried += 1
            if self._carried == SUSTAINED and self.until is None:
                self.until = self._last_restored
        if self._carried == 0:
            self._last_restored = edit

    def _follow_each(self, edit: int, moved: Sequence[tuple[str, bool]]) -> None:
        """Per layer that moved: since when, and at how many of its edits in a row, it began anew (> 0) or not (< 0)."""
        for site, anew in moved:
            since, run = self._runs.get(site, (edit, 0))
            same = run > 0 if anew else run < 0
            self._runs[site] = (since, run + (1 if anew else -1)) if same else (edit, 1 if anew else -1)
        if self.forgotten is None and any(run >= LONG for _, run in self._runs.values()):
            carried = [(site, since) for site, (since, run) in self._runs.items() if run <= -LONG]
            if carried:
                self.forgotten = Forgotten(edit, *carried[0])
