"""Inert: every editor, tier and dtype, disturbed in four ways, is the same loop bit for bit with and without a monitor.

An exception is raised at a random line of the editor; a layer is wrapped by an adapter between edits, and a deep copy
of it is put back inside the next edit; a second monitor is attached to the same model; another tool has hooks of its
own, one of which changes what a layer gives. What is compared: `states.state_of` after each edit, what the other tool
heard inside the edits, and the errors that came through.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn

import stabilitylab as sl
from benchmarks.reliability.promise import Effort, Result, counted
from benchmarks.reliability.states import State, bits, differences, state_of
from stabilitylab.editors.registry import KINDS, make
from stabilitylab.probes.base import TIERS, Tier
from stabilitylab.testbed.cache import VARIABLE
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.lab import prepare

DTYPES: Final = ("fp32", "bf16", "fp16")
DISTURBANCES: Final = ("exception", "adapter swap", "second attach", "other hooks")
EDITS: Final = 3
_EDITORS_FOLDER: Final = f"{os.sep}editors{os.sep}"


@dataclass(frozen=True)
class Case:
    editor: str
    tier: Tier
    dtype: str
    disturbance: str

    def __str__(self) -> str:
        return f"{self.editor}, {self.tier}, {self.dtype}, {self.disturbance}"


CASES: Final = tuple(
    Case(*each) for each in itertools.product([kind.name for kind in KINDS], TIERS, DTYPES, DISTURBANCES)
)


class Interrupted(Exception):
    """What the user's own code raises."""


@dataclass
class Lines:
    """Counts the lines of an editor that are run, and raises `Interrupted` at one of them."""

    at: int | None = None
    count: int = 0

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        return self.line if _EDITORS_FOLDER in frame.f_code.co_filename else None

    def line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise Interrupted(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self.line

    @contextlib.contextmanager
    def counting(self, at: int | None = None) -> Iterator[None]:
        self.at, self.count = at, 0
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)


class Adapter(nn.Module):
    """Around a layer, as PEFT's are: its weight and bias can be reached by their old names."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.full((2, layer.in_features), 1e-3, dtype=layer.weight.dtype))

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out + 0.01 * (x @ self.down.T).sum(-1, keepdim=True).to(out.dtype)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@dataclass
class Disturbed:
    """What else goes on in a loop, the same whether it is watched or not."""

    case: Case
    chance: random.Random
    heard: list[str] = field(default_factory=list)
    inside: bool = False
    swapped: tuple[str, nn.Linear] | None = None
    lines: Lines = field(default_factory=Lines)

    def begin(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        """Before anything is attached."""
        self.layers = sorted(
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and name.endswith(("fc1", "fc2", "q_proj", "out_proj"))
        )
        if self.case.disturbance == "other hooks":
            self._hook(model, stack)

    def _hook(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        def hear(what: str) -> Callable[..., None]:
            def hook(module: nn.Module, *values: Any) -> None:
                if self.inside:
                    self.heard.append(f"{what} {_digests(values)}")

            return hook

        def shrink(module: nn.Module, args: object, output: Tensor) -> Tensor:
            return output * 0.999

        for name in self.chance.sample(self.layers, 3):
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(hear(f"before {name}")).remove)
            stack.callback(layer.register_forward_hook(shrink).remove)
            stack.callback(layer.register_forward_hook(hear(f"after {name}")).remove)
            stack.callback(layer.register_full_backward_hook(hear(f"back {name}")).remove)
        everywhere = nn.modules.module.register_module_forward_hook(hear("anywhere"))
        stack.callback(everywhere.remove)

    def before(self, number: int, model: nn.Module) -> None:
        """Between two edits."""
        if self.case.disturbance == "adapter swap" and number == 1:
            name = self.chance.choice(self.layers)
            layer = model.get_submodule(name)
            if type(layer) is nn.Linear:  # GRACE may have wrapped it by now
                self.swapped = name, layer
                _set(model, name, Adapter(layer))

    @contextlib.contextmanager
    def during(self, number: int, model: nn.Module) -> Iterator[None]:
        """Around the editor's own work in an edit."""
        if self.swapped is not None and number == 2:
            name, layer = self.swapped
            _set(model, name, copy.deepcopy(layer))
        self.inside = True
        try:
            if self.case.disturbance == "exception" and number < 2:
                at = self.chance.randint(1, max(1, self.lines.count)) if number == 1 else None
                with self.lines.counting(at):
                    yield
            else:
                yield
        finally:
            self.inside = False


def _digests(values: object) -> str:
    if isinstance(values, Tensor):
        return bits(values)
    if isinstance(values, list | tuple):
        return " ".join(map(_digests, values))
    return ""


@contextlib.contextmanager
def _bare_edit(model: nn.Module) -> Iterator[None]:
    yield


def stream(case: Case, bed: DigitsBed, seed: int, folder: Path | None) -> list[State]:
    """One loop; its state after each edit, and what else the user would see. folder: of the runs, if it is watched."""
    chance = random.Random(f"{seed} {case} watched")  # not the one that disturbs, which both loops draw from
    torch.manual_seed(seed)
    model: nn.Module = bed.load()
    editor = make(case.editor, model, bed)
    prepare(editor, model, bed)
    disturbed, seen = Disturbed(case, random.Random(f"{seed} {case}")), []
    with contextlib.ExitStack() as stack:
        disturbed.begin(model, stack)
        monitors = []
        if folder is not None:
            tiers = [case.tier, chance.choice(TIERS)] if case.disturbance == "second attach" else [case.tier]
            for number, tier in enumerate(tiers):
                monitor = sl.attach(
                    model,
                    sites=editor.sites,
                    run=folder / str(number),
                    editor=editor,
                    canary=bed.canary(),
                    probes=tier,
                    announce=False,
                    trace=chance.choice(("auto", True, "armed")),
                )
                monitors.append(stack.enter_context(monitor))
        for number, request in enumerate(bed.stream(seed, EDITS)):
            disturbed.before(number, model)
            error = ""
            try:
                with contextlib.ExitStack() as edits:
                    opened = [edits.enter_context(monitor.edit(str(number))) for monitor in monitors]
                    with disturbed.during(number, model):
                        model = editor.edit(model, request)
                    for edit in opened:
                        edit.returns(model)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            seen.append(state_of(model, editor) | {"error": error, "heard": str(disturbed.heard)})
    seen.append(state_of(model, editor))
    return seen


def compare(case: Case, seed: int, scratch: Path, beds: dict[str, DigitsBed]) -> str | None:
    """What differs of a loop that is watched; None where nothing does."""
    bed = beds.setdefault(case.dtype, DigitsBed(case.dtype))
    with torch.random.fork_rng():
        bare = stream(case, bed, seed, None)
        watched = stream(case, bed, seed, scratch)
    for number, (one, other) in enumerate(zip(bare, watched, strict=True), start=1):
        names = differences(one, other)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"{case}: after edit {number}: {', '.join(names[:3])}{more}"
    return None


def sample(cases: int, chance: random.Random) -> list[Case]:
    """Of all cases, each editor, tier, dtype and disturbance as often as any other, as far as that goes."""
    order = list(CASES)
    chance.shuffle(order)
    seen: dict[str, int] = {}
    chosen: list[Case] = []
    while order and len(chosen) < cases:
        fewest = min(order, key=lambda case: sum(seen.get(part, 0) for part in vars(case).values()))
        order.remove(fewest)
        chosen.append(fewest)
        for part in vars(fewest).values():
            seen[part] = seen.get(part, 0) + 1
    return chosen


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: no difference."""
    folder, breaks = effort.folder("inert"), []
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder / "cache")  # what ROME, MEMIT and AlphaEdit learn is learned once
    cases = sample(effort.pick(16, len(CASES)), effort.chance("inert"))
    beds: dict[str, DigitsBed] = {}
    try:
        for number, case in enumerate(cases):
            effort.tell(str(case), number / len(cases))
            said = compare(case, effort.seed + number, folder / str(number), beds)
            breaks += [said] if said else []
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
    test = f"editors × tiers × dtypes × {{{', '.join(DISTURBANCES)}}}: {len(cases)} of {len(CASES)} loops"
    yield counted(test, "differences", len(cases), breaks)
