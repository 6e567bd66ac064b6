"""The losses that the model's own forwards give inside an edit, and what the loop's objective makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabilitylab.probes.logits_pass import LossPass
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching.answer import loss_of
from stabilitylab.watching.hooks import plain
from stabilitylab.watching.instruments.bench import Bench


class LossInstrument:
    """Keeps the first loss of an edit and its last, and the least weight that a backward gave to any of them."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.begin()

    def begin(self) -> None:
        """A new edit."""
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._weight: Tensor | None = None

    def on_output(self, output: Any) -> None:
        """The whole model has run."""
        if self._bench.needed(LossPass):
            self._bench.safely("losses", lambda: self._output(output))

    def _output(self, output: Any) -> None:
        given = loss_of(output)
        loss = None if given is None else plain(given)
        if loss is None:
            return
        kept = _one_number(loss)
        if self._first is None:
            self._first = kept
        else:
            self._last = kept

    def answered(self, weight: Tensor) -> None:
        """A backward has come to one of these losses. weight: the derivative of what it began at with respect to it."""
        if self._bench.needed(LossPass):
            self._bench.safely("losses", lambda: self._answered(weight))

    def _answered(self, weight: Tensor) -> None:
        values = plain(weight)
        if values is not None:
            now = _one_number(values)
            self._weight = now if self._weight is None else torch.minimum(self._weight, now)  # NaN stays

    def after(self) -> None:
        """Hand over what was kept."""
        if self._first is None:
            return
        parts = [self._first, self._last, self._weight]
        packed = torch.cat([part for part in parts if part is not None])
        has_last, has_weight = self._last is not None, self._weight is not None
        self._bench.add(MODEL_SITE, packed, lambda values: LossPass.from_host(values, has_last, has_weight))
        self.begin()


def _one_number(values: Tensor) -> Tensor:
    """In memory of its own: the loop may change its loss in place."""
    return values.detach().to(torch.float64, copy=True).reshape(1)
