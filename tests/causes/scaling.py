"""Rules of weights that are only made shorter or longer, at their limits."""

from __future__ import annotations

from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Place
from tests.causes.case import BAD, LONE, OTHER, WAY, A, B, Case, bad, finding, noted

SHORTER = replace(WAY, edits=5, largest=10.0, drift=29.8, original=100.0, norm=75.0)
LONGER = replace(WAY, edits=5, largest=25.0, drift=25.0, original=100.0, norm=125.0)
CASES = (
    Case(
        "weights-decayed",
        noted(finding("weight-shrunk", metric="weight.norm", verdict="drifting"), verdict="drifting")
        | {"ways": (replace(WAY, largest=20.0, drift=79.0),)},
        "medium",
        f"10 edits have worn down the weight of {A}, none of them by more than 20",
        Place(5, "weight.norm", A),
        not_with=[
            {"ways": (replace(WAY, largest=20.1, drift=79.0),)},
            {"ways": (replace(WAY, edits=9, drift=79.0),)},
            {"ways": (replace(WAY, site=B, drift=79.0),)},
            {"findings": ()},
        ],
    ),
    Case(
        "weights-decayed",
        bad() | {"ways": (OTHER, SHORTER)},
        "medium",
        f"5 edits have brought the norm of {A} from 100 to 75, and 84% of its distance from the original is that: each"
        " takes a share of the weight away",
        Place(1, "weight.norm", A),
        also=[{"ways": (replace(SHORTER, largest=25.0, drift=31.25),)}],
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"ways": (replace(SHORTER, edits=4),)},
            {"ways": (replace(SHORTER, drift=31.3),)},
            {"ways": (replace(SHORTER, largest=25.1),)},
            {"ways": (replace(SHORTER, norm=76.0, drift=24.9),)},
            {"ways": (replace(SHORTER, original=0.0, norm=0.0),)},
        ],
    ),
    Case(
        "weights-inflated",
        bad() | {"ways": (OTHER, LONGER)},
        "medium",
        f"5 edits have brought the norm of {A} from 100 to 125, and its distance from the original points along the"
        " original weight (cosine 1.00)",
        Place(1, "weight.norm", A),
        also=[{"ways": (replace(LONGER, largest=31.25),)}, {"ways": (replace(LONGER, norm=121.0),)}],
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"ways": (replace(LONGER, edits=4),)},
            {"ways": (replace(LONGER, drift=24.0, norm=124.0),)},
            {"ways": (replace(LONGER, largest=31.3),)},
            {"ways": (replace(LONGER, norm=119.0),)},
            {"ways": (replace(LONGER, drift=1000.0, norm=1005.0),)},
            {"ways": (replace(LONGER, norm=75.0),)},
            {"ways": (replace(LONGER, original=0.0, norm=0.0),)},
            {"ways": (replace(LONGER, original=1e200, norm=2e200, drift=1e200),)},
        ],
    ),
)
