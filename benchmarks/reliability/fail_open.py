"""Fail open: whatever breaks around an edit stays out of the loop, takes nothing else with it, and is said once.

Each fault of `faults` is put in place in loops that reach it. The user's part of the loop must be the same bit for bit,
the run must be there, and hold one note about it. What hangs is not ended, since nobody can end it in the user's own
thread: the loop waits, and the run's time share shows it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

import stabilitylab as sl
from benchmarks.reliability import faults
from benchmarks.reliability.faults import MARK, Fault, Sink, every_probe
from benchmarks.reliability.promise import Effort, Result, counted
from stabilitylab.errors import StabilityLabError
from stabilitylab.probes import Update
from tests.loops import hooks_on
from tests.probed_loops import LOOPS, Loop, Ran, ran, same

EDITS: Final = 2
_NOTES: Final = ("probe-off", "hook-off", "trace-off")


def _differs(plain: Ran, watched: Ran) -> str:
    pairs = zip(plain.computed, watched.computed, strict=True)
    if not all(same(one, other) for two in pairs for one, other in zip(*two, strict=True)):
        return "the user computed something else"
    if not all(map(torch.equal, plain.random, watched.random)) or plain.flags != watched.flags:
        return "random numbers or flags are others"
    parameters = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    if not all(same(one, other) and same(one.grad, other.grad) for one, other in parameters):
        return "weights or gradients are others"
    return f"{left} hooks are left" if (left := hooks_on(watched.model)) else ""


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _hearing() -> Iterator[list[str]]:
    """What our logger says, which goes nowhere else meanwhile."""
    logger, heard = logging.getLogger("stabilitylab"), _Heard()
    logger.addHandler(heard)
    logger.propagate = False
    try:
        yield heard.said
    finally:
        logger.removeHandler(heard)
        logger.propagate = True


def what_is_wrong(fault: Fault, loop: Loop, plain: Ran, folder: Path) -> str:
    """Empty where all is as it should be."""
    options: dict[str, Any] = {"sinks": [Sink()], "announce": False}
    with _hearing() as logged, contextlib.ExitStack() as stack:
        if fault.after_attach:
            real = sl.attach

            def attach(*arguments: Any, **named: Any) -> Any:
                monitor = real(*arguments, **named)
                stack.enter_context(fault.put())
                return monitor

            stack.enter_context(mock.patch.object(sl, "attach", attach))
        else:
            stack.enter_context(fault.put())
        try:
            watched = ran(loop, EDITS, folder, every_probe(), **options)
        except BaseException as error:
            return f"the loop got {type(error).__name__}: {str(error)[:100]}"
    return _differs(plain, watched) or (_unsaid(fault, folder, logged) if fault.hit[0] else "")


def _unsaid(fault: Fault, folder: Path, logged: Sequence[str]) -> str:
    """What is wrong with the run that such a loop leaves."""
    try:
        run = sl.load(folder)
    except StabilityLabError as error:
        return f"no run: {error}"
    said = [note.says for note in run.notes if note.kind in _NOTES or MARK in note.says]
    # Another probe may be off for a reason of its own, which is not what is asked for here.
    about = [says for says in said if fault.part != "probe" or fault.owner.__name__ in says]
    held = [edit.edit for edit in run.edits]
    lost = fault.part == "writer" and fault.name == "append"
    measured = len(run.sites_of("update.norm")) > 0 or fault.owner is Update or fault.part != "probe"
    wrong = {
        "the run does not say so": fault.said and not about,
        "not said at all": fault.part == "writer" and not any(MARK in each for each in (*said, *logged)),
        f"said more than once: {said[0][:60] if said else ''}": len(set(said)) < len(said),
        f"edits {held} are in the run": not lost and held != list(range(EDITS + 1)),
        "complete without rows": lost and run.complete,
        "the other probes measured nothing": not lost and not measured,
    }
    return next((says for says, is_so in wrong.items() if is_so), "")


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: none reaches the loop, each is said once."""
    folder, chance = effort.folder("fail open"), effort.chance("fail open")
    plain = {name: ran(loop, EDITS) for name, loop in LOOPS.items()}
    parts = {
        "probes": (faults.of_probes(), effort.pick(60, 10_000)),
        "hooks and what they call": (faults.of_hooks(), effort.pick(40, 10_000)),
        "the run file's writer": (faults.of_the_writer(), 10_000),
        "the analyzer": (faults.of_the_analyzer(), 10_000),
        "sinks": (faults.of_sinks(), 10_000),
    }
    for part, (of, most) in parts.items():
        every = list(of)
        chosen = chance.sample(every, min(most, len(every)))
        breaks, reached = [], 0
        for number, fault in enumerate(chosen):
            effort.tell(f"faults of {part}", number / len(chosen))
            for name in chance.sample(list(LOOPS), len(LOOPS)):
                said = what_is_wrong(fault, LOOPS[name], plain[name], folder / f"{part} {number} {name}")
                if said:
                    breaks.append(f"{fault}, loop {name!r}: {said}")
                if fault.hit[0] or said:
                    reached += 1
                    break
        note = f"{reached} reached, of {len(every)} faults"
        yield counted(f"{part} raising, hanging, lying", "in the loop or unsaid", len(chosen), breaks, note)
