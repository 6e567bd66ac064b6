"""The tracer in a loop: on in the edits that the schedule says, around the canary too, and what it found handed on."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import nn

from stabilitylab.acting.aside import StepAside, compiler
from stabilitylab.acting.schedule import Asked, Schedule, Trace, asked_for, mode_of
from stabilitylab.acting.tracer import Tracer
from stabilitylab.record.operations import Operation, Place, Reach
from stabilitylab.watching.calls import why_unwatchable

_SECOND_LOOKS: Final = 3
"""How often the canary is forwarded once more, traced, to find out where its answer ceased to be finite."""


_SAME: Final = 3
"""How often the same operation is told of that comes just as far."""


def why_untraceable(model: nn.Module) -> str | None:
    """Why operations can't be traced inside an edit of `model`; None where they can."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the edit is inside a transform of torch.func"
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or 'the model'} is TorchScript"
    return why_unwatchable(model)


class Tracing:
    """One run's tracer. What `begin` and `around_canary` give is to be entered, and handed back when it was left."""

    def __init__(self, trace: Trace | None, note: Callable[[str, str], None]) -> None:
        """trace: None for never, whatever the environment asks for. note: takes (kind, what it says).

        Raises UsageError for an unknown `trace`, and for an environment variable that can't be read.
        """
        self.schedule = Schedule(mode_of(trace or False))
        self.asked = Asked() if trace is None else asked_for()
        self.seconds = 0.0
        """Spent in tracers since they were last asked for."""
        self._note = note
        self._said: set[str] = set()
        self._second_looks = _SECOND_LOOKS
        self._named: Counter[tuple[str, Place, Reach]] = Counter()
        if not self.is_off:
            compiler()  # not inside the first edit

    @property
    def is_off(self) -> bool:
        """Whether no edit will be traced, whatever happens."""
        return self.schedule.mode == "off" and not self.asked

    def to_json(self) -> dict[str, object]:
        """What was asked for and decided, for the manifest."""
        return self.schedule.to_json() | ({"asked": str(self.asked)} if self.asked else {})

    def begin(self, edit: int, model: nn.Module) -> Tracer | None:
        """The tracer of an edit, or None where it is off."""
        in_full = edit in self.asked
        if not in_full and not self.schedule.wants(edit):
            return None
        return self._tracer(edit, model, in_full)

    def _tracer(self, edit: int, model: nn.Module, in_full: bool) -> Tracer | None:
        reason = why_untraceable(model)
        if reason is not None:
            self._say(f"operations are not traced: {reason}")
            return None
        return Tracer(edit, ranges=in_full, model=model)

    def around_canary(self, edit: int, model: nn.Module) -> Tracer | None:
        """The tracer of the canary's forward, or None where it is off."""
        tracer = self.begin(edit, model)
        return None if tracer is None else tracer.for_canary()

    def second_look(self, edit: int, model: nn.Module) -> Tracer | None:
        """The canary's answer is not finite, and nobody saw why: a tracer to forward it once more with, a few times in
        a run.
        """
        if self.is_off or self._second_looks == 0:
            return None
        self._second_looks -= 1
        tracer = self._tracer(edit, model, in_full=True)
        return None if tracer is None else tracer.for_canary()

    @staticmethod
    @contextlib.contextmanager
    def entered(tracer: Tracer) -> Iterator[None]:
        """Traced inside."""
        with tracer, StepAside(tracer):
            yield

    def left(self, tracer: Tracer, models: Sequence[nn.Module]) -> None:
        """A tracer was left; what it tells of is now as it is in `models`. Waits for nothing."""
        self.seconds += tracer.seconds
        tracer.seal(models)
        self._check(tracer)

    def read(self, tracer: Tracer) -> Operation | None:
        """What it has found, if anything. Waits for an accelerator."""
        operation = tracer.finish()
        self._check(tracer)
        return operation if operation is not None and self._is_news(operation) else None

    def _is_news(self, operation: Operation) -> bool:
        """Whether it says more than was said: what one edit broke, each later one only passes on; and a line that gives
        an infinity at each edit, of which nothing comes, is said a few times.
        """
        known = (operation.operator, operation.place, operation.reach)
        if operation.made == "arrived" and self._named:
            return False
        self._named[known] += 1
        return self._named[known] <= _SAME

    def _check(self, tracer: Tracer) -> None:
        if tracer.stopped:
            self._say(f"from there on operations are not traced in an edit: {tracer.stopped}")
        if tracer.failure:
            self._say(f"the tracer failed and was off for the rest of the edit: {tracer.failure}")

    def _say(self, says: str) -> None:
        if says not in self._said:
            self._said.add(says)
            self._note("trace-off", says)

    def take_seconds(self) -> float:
        """The seconds so far; the count starts anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
