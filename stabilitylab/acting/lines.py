"""Where an operation was asked for: the innermost line of code that is neither torch's, Python's nor ours.

Frames are walked from the operation outwards. What a frame is, is decided once for each code object by the name of the
module that it is from. Editors and testbed of ours count as the user's code.
"""

from __future__ import annotations

import linecache
import sys
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

from torch import nn

from stabilitylab.record.operations import Place

_THEIRS, _OTHER, _ENGINE, _CALL = range(4)
_CALLS: Final = frozenset({nn.Module._call_impl.__code__})
_ENGINES: Final = frozenset({"_engine_run_backward", "backward", "grad"})
_TYPED_IN: Final = ("<stdin>", "<ipython", "<cell", "<console")
_USERS_OF_OURS: Final = ("stabilitylab.editors", "stabilitylab.testbed")
_SOURCE_LIMIT: Final = 200
_FRAMES: Final = 400

_kinds: dict[int, tuple[int, CodeType]] = {}
"""By the code object's `id`, kept alive: its hash is that of all its constants and names, each time anew."""


class Spot(NamedTuple):
    """A line that was being run: as little as can be kept of it. module: the innermost module that was being called."""

    code: CodeType | None
    instruction: int
    module: Any


class Look(NamedTuple):
    """What a walk found. above_engine: whether the line was met before autograd's engine, if that is running at all:
    it is then code that the engine called, such as a recomputed forward.
    """

    spot: Spot
    above_engine: bool


def _kind_of(frame: FrameType) -> int:
    code, name = frame.f_code, str(frame.f_globals.get("__name__", ""))
    if code in _CALLS:
        return _CALL
    top = name.partition(".")[0]
    if top == "torch":
        return _ENGINE if name.startswith("torch.autograd") and code.co_name in _ENGINES else _OTHER
    if top == "stabilitylab" and not name.startswith(_USERS_OF_OURS):
        return _OTHER
    if top in sys.stdlib_module_names and top != "__main__":
        return _OTHER
    if code.co_filename.startswith("<") and not code.co_filename.startswith(_TYPED_IN):
        return _OTHER
    return _THEIRS


def look(frame: FrameType | None, *, past_engine: bool = False) -> Look:
    """Walk outwards from `frame` until a line and a module are found, or autograd's engine is met.

    past_engine: go on beyond it, to the line that called for the backward.
    """
    code, instruction, module = None, -1, None
    for _ in range(_FRAMES):
        if frame is None:
            break
        here = frame.f_code
        known = _kinds.get(id(here))
        if known is None:
            known = _kinds[id(here)] = (_kind_of(frame), here)
        kind = known[0]
        if kind == _THEIRS:
            if code is None:
                code, instruction = here, frame.f_lasti
                if module is not None:
                    break
        elif kind == _CALL:
            if module is None:
                module = frame.f_locals.get("self")
                if code is not None:
                    break
        elif kind == _ENGINE and not past_engine:
            return Look(Spot(code, instruction, module), code is not None)
        frame = frame.f_back
    return Look(Spot(code, instruction, module), False)


def place_of(spot: Spot | None) -> Place:
    """The line of a spot, with its source where that can be read."""
    if spot is None or spot.code is None:
        return Place()
    code = spot.code
    line = next(
        (line for start, end, line in code.co_lines() if start <= spot.instruction < end and line is not None),
        code.co_firstlineno,
    )
    source = linecache.getline(code.co_filename, line).strip()
    if len(source) > _SOURCE_LIMIT:
        source = f"{source[: _SOURCE_LIMIT - 1]}…"
    return Place(code.co_filename, line, code.co_name, source)
