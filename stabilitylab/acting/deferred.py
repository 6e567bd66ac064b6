"""Tracing without waiting: sums stay on the accelerator while the edit runs, and are read at its end, all at once.

What is then known is which results were not finite, in which order. Which values stood there, and in which entry, is
not: the tensors are gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabilitylab.acting.call import Call
from stabilitylab.acting.origins import Entering, Origins
from stabilitylab.acting.tensors import NAN, is_whole, kind_of, memory_of, spelled_kinds, total
from stabilitylab.record.operations import Made, Operation

Begun = Callable[[Call, Made], Operation]
"""Makes the record of a trail's first operation."""


@dataclass(frozen=True)
class _Logged:
    """One operation. entering: (memory, which sum tells of what was there before, or None, whether it is a weight's);
    leaving: (memory, which sum is its, whether it is all of the memory). single: whether it gave one number.
    """

    call: Call
    entering: tuple[tuple[int, int | None, bool], ...]
    leaving: tuple[tuple[int, int, bool], ...]
    single: bool


@dataclass(frozen=True)
class _Unwritten:
    """Memory that holds anything."""

    memories: frozenset[int]


class Log:
    """The operations of one edit with their sums."""

    def __init__(self) -> None:
        self._logged: list[_Logged | _Unwritten] = []
        self._sums: list[Tensor] = []
        self._seen: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._logged)

    def unwritten(self, results: Iterable[Tensor]) -> None:
        """These hold anything, until they are written."""
        memories = frozenset(map(memory_of, results))
        self._seen |= memories
        self._logged.append(_Unwritten(memories))

    def add(self, call: Call, results: Sequence[Tensor], is_weight: Callable[[Tensor], bool]) -> None:
        """An operation has run, and gave these."""
        entering = tuple(self._entering(call, is_weight))
        leaving = tuple((memory_of(tensor), self._sum(tensor), is_whole(tensor)) for tensor in results)
        self._seen.update(memory for memory, _, _ in leaving)
        self._logged.append(_Logged(call.without_tensors(), entering, leaving, results[0].numel() == 1))

    def _sum(self, tensor: Tensor) -> int:
        self._sums.append(total(tensor))
        return len(self._sums) - 1

    def _entering(self, call: Call, is_weight: Callable[[Tensor], bool]) -> Iterator[tuple[int, int | None, bool]]:
        """What was there before the edit is summed when it is first met, unless it is just written over."""
        for _, tensor in call.operands:
            memory = memory_of(tensor)
            unknown = memory not in self._seen and memory not in call.changed
            self._seen.add(memory)
            yield memory, self._sum(tensor) if unknown else None, is_weight(tensor)

    def read(self, origins: Origins, begun: Begun) -> None:
        """Wait for the sums, and follow in `origins` what was not finite."""
        sums = torch.stack([each.double() for each in self._sums]).tolist() if self._sums else []
        kinds = [kind_of(each) for each in sums]
        unwritten: set[int] = set()
        for logged in self._logged:
            if isinstance(logged, _Unwritten):
                unwritten |= logged.memories
                for memory in logged.memories:
                    origins.overwritten(memory)
                continue
            bad = [(memory, kinds[at]) for memory, at, _ in logged.leaving if kinds[at]]
            if bad and (logged.call.operator.fills or not logged.call.changed & unwritten):
                unwritten.difference_update(memory for memory, _ in bad)
                _follow(logged, bad, kinds, origins, begun)
            elif not bad:
                for memory, _, whole in logged.leaving:
                    if whole:
                        unwritten.discard(memory)
                        origins.overwritten(memory)

    def clear(self) -> None:
        """Let go of everything."""
        self._logged.clear()
        self._sums.clear()
        self._seen.clear()


def _follow(
    logged: _Logged, bad: Sequence[tuple[int, int]], kinds: Sequence[int], origins: Origins, begun: Begun
) -> None:
    call = logged.call
    entering = [
        Entering(memory, found, functools.partial(_arrived, call, found, is_weight, begun))
        for memory, at, is_weight in logged.entering
        for found in (origins.kinds(memory) or (0 if at is None else kinds[at]),)
        if found and memory not in call.filled
    ]

    def begin(made: Made) -> Operation:
        operation = begun(call, made)
        return replace(operation, operands=call.shapes, settings=call.settings, value=spelled_kinds(bad[0][1]))

    trail = origins.passed(call, entering, bad, begin)
    if logged.single:
        trail.gives_one_number(call)


def _arrived(call: Call, kinds: int, is_weight: bool, begun: Begun) -> Operation:
    # An infinity that was there before, and is no weight: a mask that the model keeps.
    fault = kinds & NAN or is_weight
    return replace(begun(call, "arrived" if fault else "designed"), value=spelled_kinds(kinds))
