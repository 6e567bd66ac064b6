"""What the weights are doing right now, roughly: standing still, moving, or leaping. It sets the canary's pace."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

WINDOW: Final = 8
"""Edits that say what is usual for a site; those that left it alone don't count."""

MOVES: Final = 1.5
LEAPS: Final = 5.0
"""Times the usual update."""

ENOUGH: Final = 3
"""Edits from which on there is something usual; until then any update is taken for movement."""


@dataclass(frozen=True)
class Movement:
    """moving: some update is larger than usual, or what is usual isn't known yet. leaping: some site has begun to leap:
    its update is far larger, or not finite, and that before wasn't. Further ones without a break are movement.
    """

    moving: bool = True
    leaping: bool = False


class Pace:
    """Compares each site's update with the median of its last ones."""

    def __init__(self) -> None:
        self.now = Movement()
        self._usual: dict[str, deque[float]] = {}
        self._leapt: set[str] = set()

    def observe(self, updates: Mapping[str, float]) -> Movement:
        """updates: ‖W_t − W_{t−1}‖ by site; NaN or infinite where the weight is no longer finite."""
        moving, leapt = False, set()
        for site, update in updates.items():
            before = self._usual.setdefault(site, deque(maxlen=WINDOW))
            usual = median(before) if len(before) >= ENOUGH else math.inf
            moving = moving or (update != 0 and len(before) < ENOUGH) or not update <= MOVES * usual
            if not update <= LEAPS * usual or math.isinf(update):
                leapt.add(site)
            if 0 < update < math.inf:
                before.append(update)
        leaping = bool(leapt - self._leapt)
        self._leapt = leapt
        self.now = Movement(moving, leaping)
        return self.now
