"""One call of an operator: what went in, where it was asked for, and which memory it has changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from torch import Tensor

from stabilitylab.acting.lines import Spot
from stabilitylab.acting.operators import Operator
from stabilitylab.acting.tensors import memory_of, readable, shape_of
from stabilitylab.record.operations import Direction, Values

OPERANDS: Final = 6
"""Operands that are told of."""


@dataclass(frozen=True)
class Call:
    """One call of an operator. number: how many came before it. spot: where it was asked for. node: of a backward, the
    step of autograd that it is part of.
    """

    number: int
    operator: Operator
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    spot: Spot
    backward: bool
    node: str

    @cached_property
    def operands(self) -> list[tuple[str, Tensor]]:
        """The tensors that went in, with their names."""
        named = self.operator.named(self.args, self.kwargs)
        return [(name, tensor) for name, value in named for tensor in readable(value)]

    @cached_property
    def changed(self) -> frozenset[int]:
        """The memories of the operands that it has changed."""
        return frozenset(memory_of(tensor) for tensor in readable(self.operator.changed(self.args, self.kwargs)))

    @cached_property
    def filled(self) -> frozenset[int]:
        """Those of them that it has written over, whatever was there; not where it read there too: ``w[:8] += x`` ends
        in a copy of ``w[:8]`` onto itself.
        """
        written = {name for _, name in self.operator.written}
        read = {memory for name, memory in self.memories if name not in written}
        return self.changed - read if self.operator.fills else frozenset()

    @cached_property
    def memories(self) -> tuple[tuple[str, int], ...]:
        """The name and the memory of each operand."""
        return tuple((name, memory_of(tensor)) for name, tensor in self.operands)

    @cached_property
    def shapes(self) -> tuple[Values, ...]:
        """The operands without their values."""
        return tuple(shape_of(name, tensor) for name, tensor in self.operands[:OPERANDS])

    @cached_property
    def settings(self) -> dict[str, str]:
        """The arguments that are numbers."""
        named = self.operator.named(self.args, self.kwargs)
        numbers = ((name, value) for name, value in named if isinstance(value, int | float))
        return {name: f"{value:.6g}" for name, value in numbers if not isinstance(value, bool)}

    @cached_property
    def gathers(self) -> bool:
        """Whether anything of more than one entry went in."""
        return any(tensor.numel() > 1 for _, tensor in self.operands)

    @cached_property
    def asks_for_infinity(self) -> bool:
        """Whether it makes a tensor of a number, or a number that it was called with is not finite."""
        given = [*self.args, *self.kwargs.values()]
        return self.operator.constant or any(isinstance(each, float) and not math.isfinite(each) for each in given)

    @property
    def direction(self) -> Direction:
        """Which way it belongs to."""
        return "backward" if self.backward else "forward"

    def without_tensors(self) -> Call:
        """The same, remembering what it is asked for and no tensor."""
        light = replace(self, args=(), kwargs={})
        for name in ("changed", "filled", "memories", "shapes", "settings", "gathers", "asks_for_infinity"):
            light.__dict__[name] = getattr(self, name)
        return light
