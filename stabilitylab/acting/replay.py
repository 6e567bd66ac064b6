"""An edit, made once more: from the state that it began with, under the full tracer, then in wider precisions.

Whatever the edit does there, everything that it can reach is put back afterwards as it was before, bit for bit. What it
prints or writes to files, it prints and writes again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.acting.memory import shortage
from stabilitylab.acting.tensors import is_finite, largest_of, readable, tensors_of
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing, why_untraceable
from stabilitylab.acting.widening import Wider, is_narrower, room_for, widen, wider_than
from stabilitylab.errors import UsageError
from stabilitylab.record.operations import Operation, Precision, Step
from stabilitylab.watching.reach import Outer, model_in, roots_of
from stabilitylab.watching.snapshot import RandomStates, look, take

_logger = logging.getLogger("stabilitylab")

_NAMED: Final = 3
"""How many things a message names."""


@dataclass(frozen=True)
class Application:
    """A call of an editing function, as it can be made again."""

    apply: Callable[..., object]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def make(self) -> object:
        """Make the edit."""
        return self.apply(*self.args, **(self.kwargs or {}))


class Kept:
    """How everything is that an edit can reach, to be put back: state, outer variables, random numbers."""

    def __init__(
        self,
        model: nn.Module,
        editor: object | None,
        application: Application | None = None,
        returned: nn.Module | None = None,
        before: Kept | None = None,
    ) -> None:
        """application: the edit that is made, where it is known. returned: a model besides, that it gave back. before:
        what was kept before the edit; all of that is kept too, where the edit let go of it.

        Raises UsageError for a tensor whose bits can't be copied.
        """
        self.model = model
        self._outer = Outer(None if application is None else application.apply)
        self.snapshot = take(_roots(model, editor, application, returned, before, self._outer))
        self._random = RandomStates(self.snapshot.generators)

    def put_back(self) -> list[str]:
        """Put everything back; the names of what differs all the same."""
        left = self._outer.put_back() + self.snapshot.put_back()
        self._random.put_back()
        return left


def _roots(
    model: nn.Module,
    editor: object | None,
    application: Application | None,
    returned: nn.Module | None,
    before: Kept | None,
    outer: Outer,
) -> dict[str, object]:
    apply = None if application is None else application.apply
    given = None if application is None else [list(application.args), dict(application.kwargs or {})]
    roots = roots_of(model, editor, apply) | {"returned": returned, "arguments": given}
    roots |= {f"outer.{name}": value for name, value in outer.values.items()}
    return roots | {"(before)": None if before is None else before.snapshot.reached}


def lost_in(model: nn.Module) -> frozenset[str]:
    """The names of parameters and buffers that are not finite. Waits for an accelerator."""
    return frozenset(name for name, tensor in tensors_of(model) if not is_finite(tensor))


def size_of(model: nn.Module, editor: object | None) -> dict[torch.device, int]:
    """The bytes that it takes to keep a model and its editor, by device.

    Raises UsageError for a tensor whose bits can't be copied.
    """
    return look(roots_of(model, editor, None)).sizes()


@dataclass(frozen=True)
class _Made:
    """The edit as it was made once. finite: whether all was that it computed and left. error: what it raised, in one
    line. largest: see `Precision`.
    """

    operation: Operation | None
    finite: bool
    error: str | None
    largest: float | None
    returned: nn.Module | None
    unseen: str


class Replay:
    """One edit that is made again, by what was kept before it."""

    def __init__(self, edit: int, application: Application, before: Kept, editor: object | None) -> None:
        """edit: its number."""
        self._edit, self._application, self._before, self._editor = edit, application, before, editor
        self.notes: list[str] = []
        """What else is to be said, a sentence each."""
        self._lost: frozenset[str] = frozenset()

    def make(self, now: nn.Module | None, failed: bool | None = None) -> Operation | None:
        """Make it, then put back what is there at present, whatever is raised. What the edit raises is swallowed.

        now: the model as it is at present, which the edit left; None where all is as it was before the edit. failed:
        whether the edit raised; None where the present state may be that of another edit.
        """
        reason = self._why_not(now is not None)
        if reason is not None:
            self.notes.append(f"edit {self._edit} could not be made once more: {reason}")
            return None
        present = self._before
        if now is not None:
            returned = None if now is self._before.model else now
            present = Kept(self._before.model, self._editor, self._application, returned, self._before)
        try:
            return self._in_all_precisions(None if now is None else present, failed)
        finally:
            left = present.put_back()
            if left:
                self._say(f"after that {_listed(left)} could not be put back: from here on the loop may go another way")
                _logger.warning("stabilitylab: %s", self.notes[-1])

    def _why_not(self, copies: bool) -> str | None:
        """copies: whether the present state has to be copied."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return "other processes take part in it"
        reason = why_untraceable(self._before.model)
        if reason is not None:
            return reason
        iterators = self._before.snapshot.iterators
        if iterators:
            return f"{_listed(iterators)} can't be wound back; expected an edit that is given what it takes"
        return shortage(self._before.snapshot.sizes()) if copies else None

    def _in_all_precisions(self, left: Kept | None, failed: bool | None) -> Operation | None:
        """left: what the edit had left, where that is known. failed: see `make`."""
        made = self._run(None, None)
        if made is None:
            return None
        same = None
        if left is not None:
            unlike = self._unlike(left, made)
            if failed is not None and failed != (made.error is not None):
                unlike.insert(0, "what it raises")
            same = not unlike if failed is not None or not unlike else None
            if unlike:
                or_else = ", or the last edit was another one" if failed is None else ""
                self._say(f"it left something else in {_listed(unlike)}: the editor is not deterministic{or_else}")
        if made.unseen:
            self._say(f"not all of it was seen: {made.unseen}")
        operation, error = made.operation, made.error
        del made  # and the model that it may hold
        if operation is None:
            raised = f"; it raised {error}" if error else ""
            self._say(f"no operation was found whose result is not finite{raised}")
            return None
        # What was lost before the edit began is lost in any precision.
        wider = () if operation.made == "arrived" else self._wider(operation)
        return replace(operation, precisions=wider, deterministic=same)

    def _say(self, says: str) -> None:
        self.notes.append(f"edit {self._edit} was made once more; {says}")

    def _unlike(self, after: Kept, made: _Made) -> list[str]:
        """What differs between what the edit had left and what it has left now."""
        returned = None if made.returned is self._before.model else made.returned
        outer = Outer(self._application.apply)
        now = look(_roots(self._before.model, self._editor, self._application, returned, self._before, outer))
        return after.snapshot.unlike(now)

    # -- once ---------------------------------------------------------------------------------------------------------

    def _run(self, target: torch.dtype | None, blamed: Operation | None) -> _Made | None:
        """Make the edit from the state that it began with; None where that could not be put back.

        target: the precision, None for its own. blamed: what was found in its own.
        """
        left = self._before.put_back()
        if left:
            self.notes.append(
                f"edit {self._edit} could not be made once more: {_listed(left)} could not be put back as before it"
            )
            return None
        model = self._before.model
        if target is None:
            self._lost = lost_in(model)
        else:
            widen(self._before.snapshot, target)
        tracer = Tracer(self._edit, "replay", ranges=True, largest_at=None if blamed is None else _step(blamed))
        answer, error = None, None
        with Tracing.entered(tracer), contextlib.nullcontext() if target is None else Wider(target):
            try:
                answer = self._application.make()
            except UsageError:  # it is made of edits of the run
                raise
            except Exception as raised:
                error = _one_line(raised)
        returned = model_in(answer) or model
        tracer.seal(list(dict.fromkeys((returned, model))))
        operation = tracer.finish()
        lost = lost_in(returned) - self._lost
        largest = tracer.largest
        if largest is None and blamed is not None:
            largest = _largest_reached(blamed, returned)
        unseen = tracer.failure or tracer.stopped
        return _Made(operation, operation is None and not lost, error, largest, returned, unseen)

    # -- wider --------------------------------------------------------------------------------------------------------

    def _wider(self, blamed: Operation) -> tuple[Precision, ...]:
        """In wider precisions, until all is finite."""
        found: list[Precision] = []
        for target in wider_than(self._before.snapshot):
            found.append(self._in(target, blamed))
            if found[-1].finite:
                break
        return tuple(found)

    def _in(self, target: torch.dtype, blamed: Operation) -> Precision:
        name = str(target).removeprefix("torch.")
        short = shortage(room_for(self._before.snapshot, target))
        if short is not None:
            return Precision(name, error=short)
        try:
            made = self._run(target, blamed)
        except UsageError:
            raise
        except Exception as error:  # such as a tensor that can't be widened
            return Precision(name, error=_one_line(error))
        if made is None:
            return Precision(name, error="the state before the edit could not be put back")
        return _judged(name, made, blamed)


def _judged(dtype: str, made: _Made, blamed: Operation) -> Precision:
    """What is to be said of an edit that was made in another precision."""
    result = None if made.operation is None else made.operation.result
    if result is not None and is_narrower(getattr(torch, result.dtype), getattr(torch, dtype)):
        return Precision(dtype, error=f"part of it is in {result.dtype} all the same")
    if made.error or not made.finite:
        return Precision(dtype, None if made.finite else False, error=made.error)
    if made.unseen and blamed.reach != "weight":
        return Precision(dtype, error=f"not all of it was seen: {made.unseen}")
    return Precision(dtype, True, made.largest)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _step(operation: Operation) -> Step:
    return Step(operation.operator, operation.module, operation.direction, operation.place)


def _largest_reached(blamed: Operation, model: nn.Module) -> float | None:
    """The largest magnitude in the weight or the gradient that the blamed operation had reached, as it is now."""
    reached: list[Tensor] = [tensor for name, tensor in tensors_of(model) if name == blamed.reached]
    if blamed.reach == "gradient":
        reached = [tensor for each in reached for tensor in readable(each.grad)]
    return largest_of(iter(reached))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name or "the model's attributes") for name in names[:_NAMED]) + more
