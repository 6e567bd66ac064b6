"""What others name in the same loops, through their public entry points, with none of our monitors.

Each edit is carried out under the peer, with a forward of the canary after it, as our monitor has one. The first thing
that it names counts, whether it interrupts the edit or not, and the loop ends there.

**detect_anomaly** (``torch.autograd.set_detect_anomaly``) raises when a step of a backward gives a NaN, and warns with
the stack of its forward: the node of autograd, and the innermost line of that stack outside of torch and Python.

**DebugUnderflowOverflow** (transformers) raises when an input, a weight or an output of a module is NaN or infinite: a
module, and no operator. Any line of its class is taken for the right one, and so is a line of the class around it that
calls it by its name. Its printed extremes are left out, as in `benchmarks.detection.peers`.

**DebugMode** (``torch.utils._debug_mode``, private so far) logs operations with their stacks, and looks at no result
by itself. It is given a hook of five lines, by its own ``dispatch_hooks``, that looks for the first result that is not
finite, of any operation but those of the ``empty`` family: what a user of it could write. The line is the innermost one
outside of torch and Python, of the forward where it knows that; a stack inside of ``torch.autograd`` is a backward.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import re
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._debug_mode import DebugMode
from torch.utils._pytree import tree_leaves

from benchmarks import wild, zoo
from benchmarks.detection.peers import Debugger, debugging
from benchmarks.tracing.scoring import LOOPS, Heard, Named, judged
from benchmarks.tracing.truths import SEED
from benchmarks.wild.case import numbered
from benchmarks.zoo.scenario import CarryOut, Loop, Step, watched

Found = list[Named]
"""What a peer has named so far."""
Around = Callable[[nn.Module], AbstractContextManager[None]]
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')
_NOT_THE_USERS: Final = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"))
_PACKAGES: Final = str(Path(torch.__file__).parents[1])


class _NamedIt(Exception):
    """A peer spoke: the loop need not go on."""


def line_in(stack: str) -> tuple[tuple[str, str], ...]:
    """(file, source) of the innermost line of a printed stack that is neither torch's nor Python's; none: empty."""
    for path, number in reversed(_FRAME.findall(stack)):
        if _is_the_users(path):
            return ((Path(path).name, linecache.getline(path, int(number)).strip()),)
    return ()


def _spelled(lines: tuple[tuple[str, str], ...]) -> str:
    return "; ".join(f"{file}: {source}" for file, source in lines) or "no line"


def _is_the_users(path: str) -> bool:
    torchs, pythons = _NOT_THE_USERS
    if path.startswith((torchs, "<")):
        return False
    return path.startswith(_PACKAGES) or not path.startswith(pythons)


@contextmanager
def _anomaly(model: nn.Module, found: Found) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                yield
        finally:
            for warning in caught:
                match = re.match(r"Error detected in (\w+)\.", str(warning.message))
                if match is not None:
                    lines = line_in(str(warning.message))
                    says = f"{match[1]}, {_spelled(lines)}"
                    found.append(Named(node=match[1], direction="backward", lines=lines, says=says))


class _Naming(Debugger):
    """Tells the module too."""

    named: nn.Module | None = None

    def create_frame(self, module: nn.Module, input: Any, output: Any) -> None:
        super().create_frame(module, input, output)  # type: ignore[no-untyped-call]
        if self.detected_overflow and self.named is None:
            self.named = module


@contextmanager
def _debugger(model: nn.Module, found: Found) -> Iterator[None]:
    with debugging(model, _Naming) as debugger:
        try:
            yield
        finally:
            module = debugger.named
            if module is not None:
                name = next(name for name, each in model.named_modules() if each is module)
                lines = tuple(_lines_of(model, name, module))
                says = f"module {name or '(the model)'} {type(module).__name__}"
                found.append(Named(direction="forward", lines=lines, says=says))


def _lines_of(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """All of the module's class, and the lines of the class around it that call it."""
    yield _file_of(type(module)), inspect.getsource(type(module))
    if name:
        above, _, own = name.rpartition(".")
        around = type(model.get_submodule(above))
        for line in inspect.getsource(around).splitlines():
            if f"self.{own}(" in line:
                yield _file_of(around), line


def _file_of(kind: type) -> str:
    return Path(inspect.getsourcefile(kind) or "").name


@contextmanager
def _debug_mode(model: nn.Module, found: Found) -> Iterator[None]:
    mode: Any = DebugMode(record_stack_trace=True, record_output=False)

    def look(func: Any, types: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not found and "empty" not in str(func) and not all(map(_finite, tree_leaves(result))):
            found.append(_of_call(mode.operators[-1], func))

    with mode, DebugMode.dispatch_hooks(log_hook=look):
        yield


def _finite(leaf: object) -> bool:
    return not isinstance(leaf, Tensor) or not leaf.is_floating_point() or bool(leaf.isfinite().all())


def _of_call(call: Any, func: Any) -> Named:
    stack = getattr(call, "stack_trace", None) or ""
    lines = line_in(getattr(call, "fwd_stack_trace", None) or stack)
    direction = "backward" if "torch/autograd/" in stack else "forward"
    name = str(func).split(".")[1]
    return Named(operator=name, direction=direction, lines=lines, says=f"{func}, {direction}, {_spelled(lines)}")  # type: ignore[arg-type]


Peer = Callable[[nn.Module, Found], AbstractContextManager[None]]
PEERS: Final[Mapping[str, Peer]] = {
    "detect_anomaly": _anomaly,
    "DebugUnderflowOverflow": _debugger,
    "DebugMode": _debug_mode,
}


def hear(job: tuple[str, str]) -> Heard:
    """(loop, peer): what it names in one loop."""
    loop, peer = job
    found: Found = []
    began = time.perf_counter()
    error = ""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _go_through(loop, lambda model: PEERS[peer](model, found), found)
        except _NamedIt:
            pass
        except Exception as failure:  # the peer's own: it then has named nothing
            error = f"{type(failure).__name__}: {failure}"
    named = found[0] if found else None
    answer, points = judged(loop, named)
    says = tuple(each.says for each in found)
    return Heard(loop, LOOPS[loop], peer, answer, points, named, says, time.perf_counter() - began, error)


def _go_through(loop: str, around: Around, found: Found) -> None:
    corpus, _, name = loop.partition("/")
    if corpus == "wild":
        _through_wild(wild.by_name(name), around, found)
    else:
        watched(zoo.by_name(name), SEED, partial(_zoo_watch, around=around, found=found))


def _carried_out(
    apply: Callable[[], nn.Module],
    model: nn.Module,
    canary: Callable[[nn.Module], Any],
    around: Around,
    found: Found,
) -> nn.Module:
    """One edit and the canary's forward, under the peer. Raises _NamedIt once it has named something."""
    try:
        with around(model):
            model = apply()
        with around(model), torch.no_grad():
            canary(model)
    finally:
        if found:
            raise _NamedIt
    return model


@contextmanager
def _zoo_watch(loop: Loop, around: Around, found: Found) -> Iterator[CarryOut]:
    def carry_out(model: nn.Module, step: Step) -> nn.Module:
        return _carried_out(partial(step.apply, model), model, _canary_of(loop.canary), around, found)

    yield carry_out


def _canary_of(canary: Any) -> Callable[[nn.Module], Any]:
    return canary if callable(canary) else lambda model: model(**canary)


def _through_wild(case: wild.Case, around: Around, found: Found) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loop = case.make()
        model, canary = loop.model, _canary_of(loop.canary)
        for _, step in numbered(loop):
            with suppress(ArithmeticError, RuntimeError, ValueError):
                model = _carried_out(step.apply, model, canary, around, found)
            if step.between is not None:
                step.between()
