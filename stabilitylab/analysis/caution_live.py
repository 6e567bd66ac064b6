"""What a scan's trials on a live model warn of: dtypes that were tried, and layers that take few updates.

Where the limits come from: ``SWALLOWED``, ``KL_DRIFTING`` are those that a run is judged by, see `analysis.limits`.
``FEW_STEPS``: a layer that two or three ordinary updates of one direction lose has no room for a stream of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.limits import KL_DRIFTING, SWALLOWED
from stabilitylab.analysis.words import number
from stabilitylab.record.scanned import FLOATS, PrecisionScan, Scan

FEW_STEPS: Final = 3.0


def cautions(scan: Scan) -> Iterator[Caution]:
    """All of them."""
    for precision in scan.precisions:
        yield from _dtype(precision)
    for capacity in scan.capacities:
        if capacity.steps < FEW_STEPS:
            yield Caution(
                "few-steps",
                "risk",
                capacity.site,
                f"{number(capacity.steps)} times its typical update, along it, makes the canary a lost one at"
                f" {capacity.site}.",
                "Make smaller updates, restrict their norm, or edit a layer that takes more.",
                "learning-rate-too-high",
            )


def _dtype(precision: PrecisionScan) -> Iterator[Caution]:
    dtype = precision.dtype
    if precision.overflowing:
        yield Caution(
            "would-not-fit",
            "risk",
            "",
            f"{dtype} can't hold {number(precision.overflowing)} of the model's {number(precision.entries)} weights: it"
            f" ends at {number(FLOATS[dtype][0])}.",
            f"Do not load this model in {dtype}.",
            "dtype-overflow",
        )
    if precision.swallowed_share is not None and precision.swallowed_share >= SWALLOWED:
        yield Caution(
            "would-be-swallowed",
            "risk",
            "",
            f"{dtype} would round {precision.swallowed_share:.0%} of these updates' entries away.",
            f"Edit in float32, or make updates that {dtype} can hold.",
            "update-absorbed",
        )
    if precision.kl_nats is not None and not precision.kl_nats < KL_DRIFTING:
        how = "not finite" if math.isnan(precision.kl_nats) else f"{number(precision.kl_nats)} nats from what it is"
        yield Caution(
            "would-answer-otherwise",
            "risk",
            "",
            f"Cast to {dtype}, the model's answer to the canary is {how}, before any edit.",
            f"Do not load this model in {dtype}.",
            "float16-limit" if dtype == "float16" else "",
        )
