"""Going through a loop of the failure zoo with nobody watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from benchmarks.zoo.scenario import CarryOut, Loop, Step


@contextmanager
def nobody(loop: Loop) -> Iterator[CarryOut]:
    """Carries out the edits, and watches nothing: for `benchmarks.zoo.scenario.watched`."""

    def carry_out(model: nn.Module, step: Step) -> nn.Module:
        return step.apply(model)

    yield carry_out
