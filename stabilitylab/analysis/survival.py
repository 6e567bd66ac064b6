"""How long runs last: the share that still held after so many edits, by Kaplan and Meier (1958).

A run that ended while it held is censored there: it counts as long as it was watched, and as nothing afterwards.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Survival:
    """A step curve. edits: where it may fall, rising, 0 first. share: of runs that held, from each of them on.

    at_risk: runs that had held and were watched up to each. failed, ended: those that failed there, and those that
    ended there while they held.
    """

    edits: tuple[int, ...]
    share: tuple[float, ...]
    at_risk: tuple[int, ...]
    failed: tuple[int, ...]
    ended: tuple[int, ...]

    def at(self, edit: int) -> tuple[int, float]:
        """How many runs were at risk at an edit from 0 on, and the share that held."""
        here, after = bisect_right(self.edits, edit) - 1, bisect_left(self.edits, edit)
        return self.at_risk[after] if after < len(self.edits) else 0, self.share[here]


def survival(last: Sequence[int], failed: Sequence[bool]) -> Survival:
    """The curve of runs. last: the edit of each at which it failed, or else its last one; failed: which it was.

    Empty where there is no run.
    """
    if not last:
        return Survival((), (), (), (), ())
    times, fails = np.asarray(last, dtype=np.float64), np.asarray(failed, dtype=np.bool_)
    edits = np.unique(np.append(times, 0.0))
    at_risk = (times >= edits[:, None]).sum(axis=1)
    there = times == edits[:, None]
    failing, ending = (there & fails).sum(axis=1), (there & ~fails).sum(axis=1)
    share = np.cumprod(1.0 - failing / at_risk)  # as scipy.stats.ecdf has it, which takes half a second to import
    return Survival(
        edits=tuple(edits.astype(int).tolist()),
        share=tuple(share.tolist()),
        at_risk=tuple(at_risk.tolist()),
        failed=tuple(failing.tolist()),
        ended=tuple(ending.tolist()),
    )
