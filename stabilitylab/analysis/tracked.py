"""Which series are watched against a baseline of their own, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.findings import Verdict


@dataclass(frozen=True)
class Tracked:
    """How a metric is watched.

    spread: prior standard deviation of its log from edit to edit. shrinks: the factor by which it must fall to count,
    infinite where a fall means nothing. fallen: what such a fall is. minus: the metric to subtract, for a range.
    trend: whether its slope is tested. jumps: whether one reading alone may be a jump.
    """

    spread: float
    shrinks: float = math.inf
    fallen: Verdict = "drifting"
    minus: str | None = None
    trend: bool = True
    jumps: bool = False


TRACKED: Final = {
    "update.norm": Tracked(0.5, 1e4, jumps=True),
    "weight.max_abs": Tracked(0.1),
    "weight.spectral_norm": Tracked(0.1),
    "activation.rms": Tracked(0.2, 100.0),
    "activation.max_abs": Tracked(0.3, 100.0),
    "activation.rms_beyond_first": Tracked(0.2, 100.0),
    "activation.max_abs_beyond_first": Tracked(0.3, 100.0),
    "gradient.norm": Tracked(1.0, 1e6, trend=False),  # leads by an edit or two at most, and is the noisiest of all
    "logits.max": Tracked(0.2, 30.0, "diverging", "logits.min"),
    "canary.max": Tracked(0.1, 30.0, "diverging", "canary.min"),
    "editor.input_max": Tracked(0.5),
}
NAMES: Final = {
    "logits.max": "the range of logits (max − min)",
    "canary.max": "the range of canary logits (max − min)",
}
