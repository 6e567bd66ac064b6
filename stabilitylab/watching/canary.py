"""The canary: a small fixed batch that is forwarded after edits. What a model answers to it is in `answer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stabilitylab.errors import UsageError, did_you_mean

Batch = Mapping[str, Any] | Tensor | Callable[[nn.Module], Any] | str
"""Keyword arguments or input ids for the model, a function of it, or ``"replay"``: the edit's own input again."""

Selector = str | Callable[[Any], Any]
"""Where a model's output has its logits: the name of an attribute or a key, or a function of the output."""

REPLAY = "replay"
_PERCENT = 100

QUIET_SHARE = 0.5
"""Of its budget that a canary spends while values stand still; the rest is saved for when they move."""


@dataclass(frozen=True, eq=False)
class Canary:
    """What to forward after edits, and how often: the one costly probe, whose time is counted apart.

    batch: what is forwarded. every: after each n-th edit. budget: instead of `every`, the share of the loop's time that
    it may take, above 0 and at most 1: half of it while values stand still, all that was saved while they move. Either
    way it is also forwarded at edit 0, and at once after an edit whose weights leap (see `analysis.pace`); on an
    accelerator after the next one, since a leap is seen when the edit is read. Never after an edit that failed. logits:
    where the model's output has them, if not in ``.logits`` or ``["logits"]``, nor as the output itself or the first of
    a tuple: a name, such as ``"logits_per_image"``, or a function of the output.
    Raises UsageError for a batch of no known form and for a cadence that can't be.
    """

    batch: Batch
    every: int = 1
    budget: float | None = None
    logits: Selector | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.batch, Mapping | Tensor) or callable(self.batch)
        if not known and not self.is_replay:
            suggested = did_you_mean(self.batch, [REPLAY]) if isinstance(self.batch, str) else ""
            raise UsageError(
                f"canary={_told(self.batch)} is not usable; expected a dict of model arguments, a tensor of input ids, "
                f"a function of the model, or 'replay'{suggested}"
            )
        if self.logits is not None and not (isinstance(self.logits, str) or callable(self.logits)):
            raise UsageError(
                f"Canary(logits={self.logits!r}): expected the name of what the output has the logits in, or a function"
                " of the output"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise UsageError(f"Canary(every={self.every!r}): expected a whole number of edits, 1 or more")
        if self.budget is not None:
            self._check_budget(self.budget)

    def _check_budget(self, budget: float) -> None:
        number = isinstance(budget, int | float)
        if not number or not 0 < budget <= 1:
            percent = f"; {budget} percent are {budget / 100:g}" if number and 1 < budget <= _PERCENT else ""
            raise UsageError(
                f"Canary(budget={budget!r}): expected a share of the loop's time above 0 and at most 1, such as 0.05"
                f"{percent}"
            )
        if self.every != 1:
            raise UsageError(f"Canary(every={self.every}, budget={budget}): expected one of the two")

    @property
    def is_replay(self) -> bool:
        """Whether each edit's own input is forwarded once more, so that there is no original to compare with."""
        return isinstance(self.batch, str) and self.batch == REPLAY

    @property
    def after_each_edit(self) -> bool:
        """Whether it needs no decision."""
        return self.every == 1 and self.budget is None

    def describe(self) -> str:
        """What it is, in a few words, for the manifest."""
        cadence = f", budget {self.budget:g}" if self.budget is not None else f", every {self.every} edits"
        return _describe(self.batch) + ("" if self.after_each_edit else cadence)


def _describe(batch: Batch) -> str:
    if isinstance(batch, str):
        return batch
    if isinstance(batch, Mapping):
        shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
        return f"batch {shapes}"
    return f"input ids {list(batch.shape)}" if isinstance(batch, Tensor) else f"function {batch!r}"


class Schedule:
    """Says after which edits a canary is forwarded."""

    def __init__(self, canary: Canary) -> None:
        self._canary = canary
        self._spent = 0.0
        self._last = 0.0

    @property
    def always(self) -> bool:
        """Whether it is after each edit."""
        return self._canary.after_each_edit

    def paid(self, seconds: float) -> None:
        """A forward took this long."""
        self._spent, self._last = self._spent + seconds, seconds

    def is_due(self, edit: int, elapsed: float, moving: bool, leaping: bool) -> bool:
        """elapsed: seconds of the whole loop so far. moving, leaping: what the weights do, see `analysis.pace`."""
        if edit == 0 or leaping:
            return True
        if self._canary.budget is None:
            return edit % self._canary.every == 0
        share = self._canary.budget * (1.0 if moving else QUIET_SHARE)
        return self._spent + self._last <= share * elapsed


def _told(given: object) -> str:
    """What was given in a few words: never the values of a tensor."""
    if given is None or isinstance(given, str | int | float):
        return repr(given)
    if isinstance(given, list | tuple) and given:
        return f"<{type(given).__name__} of {len(given)} {type(given[0]).__name__}>"
    return f"<{type(given).__name__}>"


def of(given: Canary | Batch | None) -> Canary | None:
    """A canary from what a user gives. Raises UsageError for one of no known form."""
    return given if given is None or isinstance(given, Canary) else Canary(given)
