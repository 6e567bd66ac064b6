"""The tracer: looks at what each operation gives, while the edit runs, and names the first that was not finite.

A dispatch mode is below autograd, so it sees forward, backward, optimiser and editor algebra alike. Each result is
summed once, in fp32 or above: a sum is not finite where an entry isn't, and a hit is confirmed entry by entry. Nothing
more is done until something is found. On an accelerator the sums are kept there and read when the edit is over, so
that nothing waits; ranges and indices are then not known.

What it can't see: compiled graphs, TorchScript, NumPy, and what other threads of Python do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.acting.call import Call
from stabilitylab.acting.deferred import Log
from stabilitylab.acting.lines import Spot, look, place_of
from stabilitylab.acting.mode import Onlooker
from stabilitylab.acting.operators import Operator, operator_of
from stabilitylab.acting.origins import Entering, Origins
from stabilitylab.acting.telling import Names, bare, in_full, told
from stabilitylab.acting.tensors import (
    NAN,
    SUMMED,
    Held,
    dtype_of,
    first_bad,
    held,
    in_output,
    is_finite,
    is_on_host,
    is_whole,
    kinds_of,
    memory_of,
    quietly,
    range_of,
    readable,
    spelled_kinds,
    sums_up,
    values_of,
)
from stabilitylab.record.operations import Made, Operation, Phase, Step, Values

_FORWARDS_KEPT: Final = 200_000
"""Forward operations of which the line is kept for their backward."""
_AT_ONCE: Final = 8
"""Steps of autograd that one operation may have, at most."""
_LOOKED: Final = 4_000
"""Operands that are looked at, of operations with a result that is not finite; of later ones what is known is trusted:
after a NaN there are many.
"""


_sequence: Final[Callable[[], int]] = torch._C._autograd._get_sequence_nr
_View = tuple[int, Any, torch.Size]
"""The memory of a tensor, and which part of it."""


class Tracer(Onlooker):  # type: ignore[no-untyped-call]
    """Traces what runs in this thread, and in autograd's for it, while it is entered: one edit, or one forward.

    Results are what they are without it: nothing is computed but sums of what was computed. A failure of ours ends the
    tracing (`failure` says why), never the operation.
    """

    def __init__(
        self,
        edit: int,
        phase: Phase = "edit",
        *,
        ranges: bool = False,
        deferred: bool = False,
        largest_at: Step | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """ranges: also keep the range of every result, so that those of overwritten operands are known. deferred: read
        nothing before `finish`, as on an accelerator. largest_at: keep the largest magnitude that this operation gives.
        model: whose weights are no masks, where they hold an infinity.
        """
        super().__init__()
        self.operations = 0
        """How many operations ran, those of ours left out."""
        self.largest: float | None = None
        self._edit, self._phase, self._deferred, self._with_ranges = edit, phase, deferred, ranges
        self._largest_at = largest_at
        self._looks_only = not (deferred or ranges or largest_at)
        self._operators: dict[Any, Operator] = {}
        self._origins = Origins()
        self._alive: dict[int, Held] = {}
        self._unwritten: dict[int, Held] = {}
        self._ranges: dict[_View, tuple[float, float]] = {}
        self._new_ranges: dict[_View, tuple[float, float]] = {}
        self._forwards: dict[int, Spot] = {}
        self._sequence = _sequence()
        self._looked = 0
        self._calls: dict[int, Call] = {}
        self._log = Log()
        self._given: list[int] = []
        self._names = Names()
        weights = () if model is None else model.parameters()
        self._weights = frozenset(memory_of(found) for weight in weights for found in readable(weight))

    def for_canary(self) -> Tracer:
        """The same, for the canary's forward."""
        self._phase = "canary"
        return self

    # -- each operation -------------------------------------------------------------------------------------------

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Look at what an operation gave."""
        number, self.operations = self.operations, self.operations + 1
        sequence = _sequence()
        if sequence != self._sequence:  # it is a step of autograd, whose backward will want to know the line
            self._learn(sequence)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = operator_of(func)
        if operator.skipped:
            return
        if operator.unwritten:
            self._unwritten_memory(result)
        elif not self._is_sound(operator, result):
            self._look(number, operator, args, kwargs, result)

    def _look(
        self, number: int, operator: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        results = list(readable(_values_in(operator, args, kwargs, result)))
        if self._deferred or any(tensor.is_cuda for tensor in results):
            self._put_off(number, operator, args, kwargs, results)
            return
        bad = [tensor for tensor in results if not self._is_finite(tensor)]
        if self._largest_at is not None and operator.full == self._largest_at.operator:
            self._measure(results)
        if bad:
            self._found(Call(number, operator, args, kwargs, *self._where()), bad)
        elif self._origins or self._unwritten:
            for tensor in results:
                if is_whole(tensor):
                    self._forget(memory_of(tensor))
        if self._with_ranges:
            self._remember_ranges()

    def _is_sound(self, operator: Operator, result: Any) -> bool:
        """The short way for nearly all operations: one new tensor on the host, and nothing known that it might undo."""
        if type(result) is not Tensor or operator.written or not self._looks_only or self._unwritten or self._origins:
            return False
        dtype = SUMMED.get(result.dtype)
        if dtype is None:
            return True
        return is_on_host(result) and sums_up(result, dtype)

    def _learn(self, sequence: int) -> None:
        spot = look(sys._getframe(4)).spot
        if spot.code is None:  # a backward that is to be differentiated again
            spot = self._forward_spot() or spot
        for number in range(max(self._sequence, sequence - _AT_ONCE), sequence):
            self._forwards[number] = spot
        while len(self._forwards) > _FORWARDS_KEPT:
            del self._forwards[next(iter(self._forwards))]
        self._sequence = sequence

    def _forward_spot(self) -> Spot | None:
        number = getattr(torch._C._current_autograd_node(), "_sequence_nr", None)
        return None if number is None else self._forwards.get(number())

    def _where(self) -> tuple[Spot, bool, str]:
        """(the line, whether this is a backward, the step of autograd)."""
        node: Any = torch._C._current_autograd_node()
        found = look(sys._getframe(3))
        if node is None:
            return found.spot, False, ""
        if found.above_engine:  # a forward that is made again, or a backward in Python
            backward = not torch.is_grad_enabled()
            return found.spot, backward, node.name() if backward else ""
        spot = self._forward_spot()
        if spot is None:  # such as the sum of two gradients
            spot = look(sys._getframe(3), past_engine=True).spot
        return spot, True, node.name()

    def _is_finite(self, tensor: Tensor) -> bool:
        if not self._with_ranges or not tensor.numel():
            return is_finite(tensor)
        least, greatest = quietly(lambda: [each.item() for each in tensor.aminmax()])
        self._new_ranges[_view(tensor)] = (least, greatest)
        return math.isfinite(least) and math.isfinite(greatest)

    def _remember_ranges(self) -> None:
        """When nobody asks any more what was there before."""
        for view, ends in self._new_ranges.items():
            if all(map(math.isfinite, ends)):
                self._ranges[view] = ends
            else:
                self._ranges.pop(view, None)
        self._new_ranges.clear()

    def _measure(self, results: Sequence[Tensor]) -> None:
        step, place = self._largest_at, place_of(self._where()[0])
        if step is not None and (place.file, place.line) == (step.place.file, step.place.line):
            ends = [end for tensor in results for end in range_of(tensor)[:2] if end is not None]
            self.largest = max([self.largest or 0.0, *map(abs, ends)])

    # -- memory ---------------------------------------------------------------------------------------------------

    def _unwritten_memory(self, result: Any) -> None:
        if self._log or self._deferred:
            self._log.unwritten(readable(result))
        for tensor in readable(result):
            memory = memory_of(tensor)
            self._forget(memory)
            self._ranges.pop(_view(tensor), None)
            self._unwritten[memory] = held(tensor)

    def _forget(self, memory: int) -> None:
        """All of it is written anew."""
        self._unwritten.pop(memory, None)
        self._alive.pop(memory, None)
        self._origins.overwritten(memory)

    def _kinds_before(self, call: Call, tensor: Tensor) -> int:
        """What an operand held when the operation began, as far as that can be known."""
        memory = memory_of(tensor)
        if memory in call.filled:
            return 0
        alive = self._alive.get(memory)
        if alive is not None and alive.expired():
            self._forget(memory)
        self._looked += 1
        if memory in call.changed or memory in self._unwritten or self._looked > _LOOKED:
            return self._origins.kinds(memory)
        return kinds_of(tensor)

    # -- something is not finite ----------------------------------------------------------------------------------

    def _found(self, call: Call, bad: Sequence[Tensor]) -> None:
        blank = {memory for memory in call.changed if memory in self._unwritten}
        if any(not self._unwritten[memory].expired() for memory in blank) and not call.operator.fills:
            return  # some of a memory that is not written yet, and may hold anything
        entering = [
            Entering(memory_of(tensor), kinds, self._arrived(call, name, tensor, kinds))
            for name, tensor in call.operands
            for kinds in (self._kinds_before(call, tensor),)
            if kinds
        ]
        leaving = []
        for tensor in bad:
            memory = memory_of(tensor)
            self._unwritten.pop(memory, None)
            self._alive[memory] = held(tensor)
            leaving.append((memory, kinds_of(tensor)))

        def begin(made: Made) -> Operation:
            index, value = first_bad(bad[0])
            operation = in_full(self._begun(call, made), call, self._operand)
            return replace(operation, result=values_of("", bad[0]), index=index, value=value)

        trail = self._origins.passed(call, entering, leaving, begin)
        if bad[0].numel() == 1:
            trail.gives_one_number(call)

    def _begun(self, call: Call, made: Made) -> Operation:
        self._calls[call.number] = call.without_tensors()
        return bare(self._edit, self._phase, call, made)

    def _arrived(self, call: Call, name: str, tensor: Tensor, kinds: int) -> Callable[[], Operation]:
        def make() -> Operation:
            # An infinity that was there before, and is no weight: a mask that the model keeps.
            fault = kinds & NAN or self._is_weight(tensor)
            operation = self._begun(call, "arrived" if fault else "designed")
            return replace(operation, operands=(values_of(name, tensor),), value=spelled_kinds(kinds))

        return make

    def _is_weight(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or memory_of(tensor) in self._weights

    def _operand(self, call: Call, name: str, tensor: Tensor) -> Values:
        """An operand with its range; of one that was written over, the range that it had, where that was kept."""
        if memory_of(tensor) not in call.changed:
            return values_of(name, tensor)
        least, greatest = self._ranges.get(_view(tensor), (None, None))
        return Values(name, tuple(tensor.shape), dtype_of(tensor), least, greatest)

    # -- on an accelerator ----------------------------------------------------------------------------------------

    def _put_off(
        self,
        number: int,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[Tensor],
    ) -> None:
        if not results or (results[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._log.add(Call(number, operator, args, kwargs, *self._where()), results, self._is_weight)

    # -- the end --------------------------------------------------------------------------------------------------

    def gave(self, output: Any) -> None:
        """The whole model has returned this."""
        self.sweep()
        if self._origins or self._log:
            with torch._C.DisableTorchFunction():  # a mode of the user's would see us look
                self._given += [memory_of(tensor) for tensor in readable(in_output(output))]
            if not self._log:
                self._see_given()

    def _see_given(self) -> None:
        for memory in self._given:
            trail = self._origins.trail(memory)
            if trail is not None:
                trail.reaches("output")
        self._given.clear()

    def seal(self, models: Sequence[nn.Module]) -> None:
        """The edit is over. models: that it began with and left, as they are now. Waits for nothing."""
        if self._origins or self._origins.trails or self._log:
            self._names = Names.of(models)

    def finish(self) -> Operation | None:
        """The operation to blame, if any. Waits for an accelerator; a failure of ours gives None."""
        try:
            self._log.read(self._origins, self._begun)
            self._see_given()
            self._names.see_what_was_reached(self._origins)
            trail = self._origins.blamed()
            return None if trail is None else told(trail, self._calls[trail.operation.number], self._names)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            return None
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._origins, self._names = Origins(), Names()
        for known in (self._alive, self._unwritten, self._ranges, self._new_ranges, self._forwards, self._calls):
            known.clear()
        self._log.clear()
        self._given.clear()


def _view(tensor: Tensor) -> _View:
    return memory_of(tensor), tensor.storage_offset(), tensor.shape


def _values_in(operator: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
    if operator.written:
        return operator.changed(args, kwargs)
    return result[0] if operator.first_only and isinstance(result, tuple) else result
