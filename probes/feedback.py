"""What feeds back: an edit that makes the next edit larger."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stabilitylab.probes.base import Host, Probe, Readings
from stabilitylab.record.readings import Metric

WINDOW = 5
"""Steps between readings over which the growth is averaged: edits, where each edit is read."""


@dataclass(frozen=True)
class History:
    """The last readings of a followed metric at one site, oldest first, this edit's last: float64 of shape [≤ 6].

    edits: the edits they were taken at, of the same shape; not every edit need have one.
    """

    values: Host
    edits: Host


class Gain(Probe[History]):
    """The log growth per edit of a quantity that one edit hands on to the next."""

    tier = "light"
    needs = History
    follows = ("update.norm", "editor.input_max", "logits.loss")
    metrics = (
        Metric(
            "feedback.gain",
            "nats per edit",
            "linear",
            "after",
            "Log growth per edit: of the update's norm at a layer, of the largest normalised input at the editor, of "
            "the loss before the edit at the model. Staying above 0 means that each edit makes the next one larger.",
            "(log x_t − log x_s) / (t − s), s: five readings back or the first",
            "loop gain: Åström and Murray, Feedback Systems, 2nd ed., §10.1",
        ),
    )

    def compute(self, seen: History) -> Readings:
        """Left out while there is no earlier reading, or where either end is zero, NaN or infinite."""
        values, edits = seen.values[-(WINDOW + 1) :], seen.edits[-(WINDOW + 1) :]
        first, last = float(values[0]), float(values[-1])
        if values.size == 1 or not np.isfinite([first, last]).all() or min(first, last) <= 0:
            return {}
        return {"feedback.gain": (math.log(last) - math.log(first)) / float(edits[-1] - edits[0])}


@dataclass(frozen=True)
class FeedbackPass:
    """‖G‖ of a layer as this edit finds it, and of the same loss with the original weights; float64."""

    norm: float
    original_norm: float

    @classmethod
    def from_host(cls, values: Host) -> FeedbackPass:
        """From [‖G‖, ‖G₀‖]."""
        return cls(float(values[0]), float(values[1]))


class FeedbackShare(Probe[FeedbackPass]):
    """How much of the gradient comes from the edits before, rather than from the request."""

    tier = "deep"
    needs = FeedbackPass
    metrics = (
        Metric(
            "feedback.share",
            "share of ‖G‖",
            "linear",
            "during",
            "Share of the gradient that the edited weights brought about: the same loss on the original weights has "
            "the rest. Rising towards 1: edits answer edits. Below 0, the edited weights make it smaller.",
            "1 − ‖G(W_0)‖ / ‖G(W_{t−1})‖",
            "loop gain: Åström and Murray, Feedback Systems, 2nd ed., §10.1",
        ),
    )

    def compute(self, seen: FeedbackPass) -> Readings:
        """Left out for a zero gradient and where either is not finite."""
        if seen.norm == 0 or not np.isfinite([seen.norm, seen.original_norm]).all():
            return {}
        return {"feedback.share": 1 - seen.original_norm / seen.norm}
