"""The model's own logits inside an edit, and the canary's after it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.probes.canary_places import CanaryPlaces, canary_places
from stabilitylab.probes.logits_pass import (
    CanaryPass,
    LaterLogits,
    LogitsPass,
    TextPass,
    reduce_canary,
    reduce_logits,
    text_nll,
)
from stabilitylab.probes.output_pass import OutputKeeper
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching import answer as answers
from stabilitylab.watching.canary import Canary
from stabilitylab.watching.hooks import plain
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.model_call import ModelCall

CANARY_OFF: Final = "canary-off"
"""The kind of the note that the canary is no longer forwarded."""


class LogitsInstrument:
    """Reduces the logits of the model's first forward in an edit in full, and of the later ones their extremes."""

    def __init__(self, bench: Bench, canary: Canary | None) -> None:
        self._bench = bench
        self._select = None if canary is None else canary.logits
        self._keeper = OutputKeeper()

    def begin(self) -> None:
        """A new edit."""
        self._keeper = OutputKeeper()

    def on_output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """The whole model has run."""
        if self._bench.needed(LogitsPass) or self._bench.needed(LaterLogits):
            self._bench.safely("logits", lambda: self._output(kwargs, output))

    def _output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        given = answers.logits_of(output, self._select)
        logits = None if given is None else plain(given)
        if logits is None:
            return
        largest = None
        if self._keeper.passes == 0 and self._bench.needed(LogitsPass):
            packed = reduce_logits(logits, answers.mask_of(kwargs, output))
            largest = packed[:2].abs().amax()
            self._bench.add(MODEL_SITE, packed, LogitsPass.from_host)
        if self._bench.needed(LaterLogits):
            self._keeper.add(logits, largest)
        else:
            self._keeper.passes += 1

    def after(self) -> None:
        """Hand over what was counted."""
        reduced = self._keeper.reduce()
        if reduced is not None:
            self._bench.add(MODEL_SITE, reduced, LaterLogits.from_host)


class CanaryInstrument:
    """Forwards the canary after an edit, against what it gave at edit 0: that is stored, and never formed again."""

    def __init__(self, bench: Bench, canary: Canary | None) -> None:
        self._bench = bench
        self._canary = canary
        self._places: CanaryPlaces | None = None
        self._targets: Tensor | None = None
        self._original_nll: Tensor | None = None

    @property
    def failure(self) -> str:
        """Why the canary is no longer forwarded; empty while it is."""
        return self._bench.off.get("canary", "")

    @property
    def wanted(self) -> bool:
        """Whether there is a canary, and a probe that is due needs it."""
        return self._canary is not None and (self._bench.needed(CanaryPass) or self._bench.needed(TextPass))

    def forward(
        self, model: nn.Module, last_call: ModelCall | None, around: AbstractContextManager[Any] | None = None
    ) -> Tensor | None:
        """Forward it and reduce its logits, which are returned; None where there are none. last_call: what a replay
        forwards. around: entered for the forward pass.
        """
        canary = self._canary
        if canary is None or not self.wanted:
            return None
        with self._bench.canary_time:
            answer = self._answer(canary, model, last_call, around)
            if answer is None:
                return None
            self._bench.safely("canary", lambda: self._reduce(canary, model, answer), kind=CANARY_OFF)
            return answer.logits

    def forward_again(
        self, model: nn.Module, last_call: ModelCall | None, around: AbstractContextManager[Any]
    ) -> Tensor | None:
        """Forward it once more and measure nothing; returns its logits."""
        answer = None if self._canary is None else self._answer(self._canary, model, last_call, around)
        return None if answer is None else answer.logits

    def _answer(
        self,
        canary: Canary,
        model: nn.Module,
        last_call: ModelCall | None,
        around: AbstractContextManager[Any] | None,
    ) -> answers.Answer | None:
        def forward() -> answers.Answer | None:
            with around or nullcontext():
                return answers.forward(model, canary, last_call)

        answer: answers.Answer | None = self._bench.safely("canary", forward, as_the_loop=True, kind=CANARY_OFF)
        return answer

    def _reduce(self, canary: Canary, model: nn.Module, answer: answers.Answer) -> None:
        if canary.is_replay:
            if self._bench.needed(CanaryPass):
                packed = reduce_logits(answer.logits, answer.mask)
                self._bench.add(MODEL_SITE, packed, CanaryPass.from_host)
            return
        if self._places is None:
            self._targets = answers.targets_of(model, canary, answer)
            self._places = canary_places(answer.logits, self._targets, answer.mask)
        if self._bench.needed(CanaryPass):
            packed = reduce_canary(answer.logits, answer.mask, self._places)
            self._bench.add(MODEL_SITE, packed, CanaryPass.from_host)
        if self._targets is not None and self._bench.needed(TextPass):
            self._text(answer.logits, self._targets)

    def _text(self, logits: Tensor, targets: Tensor) -> None:
        nll = text_nll(logits, targets)
        if nll is not None:
            self._original_nll = nll if self._original_nll is None else self._original_nll
            self._bench.add(MODEL_SITE, torch.stack([nll, self._original_nll]), TextPass.from_host)
