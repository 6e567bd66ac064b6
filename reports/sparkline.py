"""A series as one line of blocks, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

BLOCKS: Final = "▁▂▃▄▅▆▇█"
NOT_A_NUMBER: Final = "×"
INFINITE: Final = "∞"


def sparkline(values: Sequence[float | None], *, log: bool = False) -> str:
    """One character per value: higher blocks for larger ones, ``×`` for NaN, ``∞`` for either infinity, blank for None.

    log: blocks by the logarithm; zero and what is below are the lowest block.
    """
    scaled = [_scaled(value, log) for value in values]
    finite = [value for value in scaled if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def block(value: float | None, height: float | None) -> str:
        if value is None or height is None:
            return " "
        if math.isnan(value):
            return NOT_A_NUMBER
        if math.isinf(value):
            return INFINITE
        if height == -math.inf:
            return BLOCKS[0]
        if high == low:
            return BLOCKS[3]
        # Halves first: the difference of two large floats may be none.
        share = (height / 2 - low / 2) / (high / 2 - low / 2)
        return BLOCKS[min(len(BLOCKS) - 1, int(share * len(BLOCKS)))]

    return "".join(map(block, values, scaled))


def _scaled(value: float | None, log: bool) -> float | None:
    if value is None or not log or not math.isfinite(value):
        return value
    return math.log10(value) if value > 0 else -math.inf
