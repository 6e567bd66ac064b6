"""Tracing without waiting: sums stay on the accelerator while the edit runs, and are read at its end, all at once.

What is then known is which results were not finite, in which order. Which values stood there, and in which entry, is
not: the tensors are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabilitylab.acting.call import Call
from stabilitylab.acting.origins import Entering, Origins
from stabilitylab.acting.tensors import is_whole, kind_of, memory_of, spelled_kinds, total
from stabilitylab.record.operations import Made, Operation

Begun = Callable[[Call, Made], Operation]
"""Makes the record of a trail's first operation."""


@dataclass(frozen=True)
class _Logged:
    """One operation. entering: (memory, which sum tells of what was there before, or None); leaving: (memory, which sum
    is its, whether it is all of the memory).
    """

    call: Call
    entering: tuple[tuple[int, int | None], ...]
    leaving: tuple[tuple[int, int, bool], ...]


class Log:
    """The operations of one edit with their sums."""

    def __init__(self) -> None:
        self._logged: list[_Logged] = []
        self._sums: list[Tensor] = []
        self._seen: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._logged)

    def add(self, call: Call, results: Sequence[Tensor]) -> None:
        """An operation has run, and gave these."""
        entering = tuple(self._entering(call))
        leaving = tuple((memory_of(tensor), self._sum(tensor), is_whole(tensor)) for tensor in results)
        self._seen.update(memory for memory, _, _ in leaving)
        self._logged.append(_Logged(call.without_tensors(), entering, leaving))

    def _sum(self, tensor: Tensor) -> int:
        self._sums.append(total(tensor))
        return len(self._sums) - 1

    def _entering(self, call: Call) -> Iterator[tuple[int, int | None]]:
        """What was there before the edit is summed when it is first met, unless it is just written over."""
        for _, tensor in call.operands:
            memory = memory_of(tensor)
            unknown = memory not in self._seen and memory not in call.changed
            self._seen.add(memory)
            yield memory, self._sum(tensor) if unknown else None

    def read(self, origins: Origins, begun: Begun) -> None:
        """Wait for the sums, and follow in `origins` what was not finite."""
        sums = torch.stack([each.double() for each in self._sums]).tolist() if self._sums else []
        kinds = [kind_of(each) for each in sums]
        for logged in self._logged:
            bad = [(memory, kinds[at]) for memory, at, _ in logged.leaving if kinds[at]]
            if bad:
                _follow(logged, bad, kinds, origins, begun)
            elif origins:
                for memory, _, whole in logged.leaving:
                    if whole:
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
        Entering(memory, found, lambda: begun(call, "arrived"))
        for memory, at in logged.entering
        for found in (origins.kinds(memory) or (0 if at is None else kinds[at]),)
        if found and memory not in call.filled
    ]

    def begin(made: Made) -> Operation:
        operation = begun(call, made)
        return replace(operation, operands=call.shapes, settings=call.settings, value=spelled_kinds(bad[0][1]))

    origins.passed(call, entering, bad, begin)
