"""Which series are watched against their own baseline, and what is remembered of each; see `drift`.

A series is in ``TRACKED`` because healthy editing leaves it where it was. ``drift.norm`` (grows as √t or t) is left
out on purpose; the canary has detectors of its own, without a baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Places, Schema
from stabilitylab.analysis.findings import Verdict

BASELINE: Final = 8
PRIOR_WEIGHT: Final = 4.0
SHORT: Final = 12
LONG: Final = 30
LONG_EVERY: Final = 4

DRIFT_SPREADS: Final = 4.0
DRIFT_LOG: Final = math.log(3.0)
BAND_SPREADS: Final = 2.0
BAND_LOG: Final = math.log(1.5)
ROUNDING: Final = 2.0**-23
"""Of a weight's norm: one unit of rounding of float32."""
VANISHED: Final = 1e-30
"""Stands for zero, which has no log."""
NOTHING: Final = math.log(VANISHED)


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

STATE: Final = np.dtype(
    [
        ("place", np.intp),
        ("prior", np.float64),
        ("shrinks", np.float64),
        ("dies", np.bool_),
        ("trend", np.bool_),
        ("jumps", np.bool_),
        ("from_zero", np.bool_),
        ("count", np.intp),
        ("middle", np.float64),
        ("spread", np.float64),
        # Natural logs: of the first learning rate that is known, and by how much that of the last reading is above it.
        ("first_rate", np.float64),
        ("risen", np.float64),
        # By side, upwards first: since which edit it is outside its band, and readings in a row back inside.
        ("since", np.float64, (2,)),
        ("inside", np.float64, (2,)),
        # Ring buffers of the last readings.
        ("edits", np.float64, (LONG,)),
        ("logs", np.float64, (LONG,)),
    ]
)
FIXED: Final = ("place", "prior", "shrinks", "dies", "trend", "jumps", "from_zero")
"""What is known of a series before its first reading."""
UP: Final = 0
DOWN: Final = 1


def updates(schema: Schema) -> tuple[Places, Places]:
    """Positions of updates in a row, and of their ratios to the weights; -1 where there is none."""
    found = [
        (position, schema.position.get(("update.ratio", site), -1))
        for position, (metric, site) in enumerate(schema.keys)
        if metric == "update.norm"
    ]
    update, ratio = np.array(found, dtype=np.intp).reshape(-1, 2).T
    return update, ratio
