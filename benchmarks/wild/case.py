"""A case of the corpus: an edit loop in which the mechanism of a public bug report is at work, and the truth about it.

Nothing here asks the analyzer. Where a mechanism strikes is fixed by the loop's construction, or else the loop itself
tells its `Witness` in plain torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.zoo.scenario import Witness
from stabilitylab.editors.base import Batch
from stabilitylab.record.run import Run, load
from stabilitylab.watching.attaching import attach

Landed = Literal["all", "some", "none"]
"""Whether a loop's edits took effect: each of them in full, some of them or a part of each, or none."""


@dataclass(frozen=True)
class Truth:
    """What really happened.

    causes: names of the causes any of which is a right answer; empty for a healthy loop. edit: the edit at which the
    mechanism strikes, from 1 (0: before the first edit; None: no single edit). sites: right names of the place, empty
    where it is at no layer. landed: whether the loop's edits took effect. needs_operation: whether only the traced
    operation itself can tell; a vague answer is then the best that is expected without a tracer.
    """

    causes: tuple[str, ...]
    edit: int | None
    sites: tuple[str, ...]
    landed: Landed
    needs_operation: bool = False

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, so that every alarm is a false one."""
        return not self.causes


@dataclass(frozen=True)
class Edit:
    """One edit. apply: makes it and returns the model after it. between: what comes after it, such as restoring."""

    label: str
    apply: Callable[[], nn.Module]
    between: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class WildLoop:
    """An edit loop that is ready to go.

    sites: what is watched, in the order of the dataflow. canary: what `stabilitylab.attach` takes as one. edits: made
    in turn. editor, config: as for `stabilitylab.attach`. witness: told when and where the mechanism strikes, by loops
    in which that hangs on arithmetic; whoever goes through the loop sets its `edit` before each one.
    """

    model: nn.Module
    sites: tuple[str, ...]
    canary: Batch | Callable[[nn.Module], Any]
    edits: Iterator[Edit]
    editor: object | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    witness: Witness = field(default_factory=Witness)


@dataclass(frozen=True)
class Case:
    """A mechanism and a loop in which it is at work.

    name: the mechanism, in kebab case. number: the case's number in the list of reports. reference: repository and
    number of the reports, a dash for a control. summary: what happens, in one sentence. truth: its `edit` is None where
    the loop's witness has to tell. make: the loop, the same one each time.
    """

    name: str
    number: str
    reference: str
    summary: str
    truth: Truth
    make: Callable[[], WildLoop]


def numbered(loop: WildLoop) -> Iterator[tuple[int, Edit]]:
    """The edits from 1; the loop's witness knows at which one it is."""
    for number, edit in enumerate(loop.edits, start=1):
        loop.witness.edit = number
        yield number, edit


def truth_after(case: Case, loop: WildLoop) -> Truth:
    """The truth of a loop that was gone through, with the edit that its witness saw."""
    if case.truth.edit is not None or loop.witness.first is None:
        return case.truth
    return dataclasses.replace(case.truth, edit=loop.witness.first[0])


def run(
    case: Case, folder: Path, *, canary: bool = True, budget: float | None = None, **options: Any
) -> tuple[Run, Truth]:
    """Go through the case's loop under a monitor that writes the run `folder`.

    The global random state is as before. An ArithmeticError, RuntimeError or ValueError fails the edit, and the loop
    goes on. canary: False for a run without one. options: further arguments of `stabilitylab.attach`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loop = case.make()
        with attach(
            loop.model,
            sites=loop.sites,
            run=folder,
            editor=loop.editor,
            canary=loop.canary if canary else None,
            config={**loop.config, "wild": case.name},
            announce=False,
            budget=budget,
            **options,
        ) as monitor:
            for _, step in numbered(loop):
                with suppress(ArithmeticError, RuntimeError, ValueError), monitor.edit(label=step.label) as edit:
                    edit.returns(step.apply())
                if step.between is not None:
                    step.between()
    return load(folder), truth_after(case, loop)
