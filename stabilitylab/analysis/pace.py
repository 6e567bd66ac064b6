"""What the weights are doing right now, roughly: standing still, moving, or leaping. It sets the canary's pace."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

WINDOW: Final = 8
"""Edits that say what is usual for a site."""

MOVES: Final = 1.5
LEAPS: Final = 5.0
"""Times the usual update."""

ENOUGH: Final = 3
"""Edits from which on there is something usual; until then all is taken for movement."""


@dataclass(frozen=True)
class Movement:
    """moving: some update is larger than usual, or nothing is known yet. leaping: far larger, or not finite."""

    moving: bool = True
    leaping: bool = False


class Pace:
    """Compares each site's update with the median of its last ones."""

    def __init__(self) -> None:
        self.now = Movement()
        self._usual: dict[str, deque[float]] = {}

    def observe(self, updates: Mapping[str, float]) -> Movement:
        """updates: ‖W_t − W_{t−1}‖ by site; NaN or infinite where the weight is no longer finite."""
        moving = leaping = False
        for site, update in updates.items():
            before = self._usual.setdefault(site, deque(maxlen=WINDOW))
            usual = median(before) if len(before) >= ENOUGH else None
            if not math.isfinite(update):
                moving = leaping = True
                continue
            if usual is None:
                moving = True
            elif update > 0:
                moving = moving or update > MOVES * usual
                leaping = leaping or update > LEAPS * usual
            before.append(update)
        self.now = Movement(moving or leaping, leaping)
        return self.now
