"""Who keeps the state of an EasyEdit method: found behind whatever is wrapped around its `apply_algo`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn

from stabilitylab.record.note_kinds import EDITOR_REBUILT, OTHER_MODEL
from stabilitylab.watching.monitor import Monitor

BUILDS: Final = "init_model"
"""What builds an executor's hypernetwork, in its first call."""
_AGAIN: Final = 2
_DEEPEST: Final = 4
"""Wrappers around `apply_algo` that are looked through."""


def holder_of_state(apply: Callable[..., Any]) -> object | None:
    """Who keeps the state of an ``apply_algo``: its executor, or for a plain function the Python module it is from.

    AlphaEdit and MEMIT keep projections, key caches and covariances as globals of that module. A function of the user's
    around it is looked through.
    """
    for inner in _inside(apply):
        executor = getattr(inner, "__self__", None)
        if executor is not None and inner.__name__.startswith("apply"):
            return executor  # type: ignore[no-any-return]
    for inner in _inside(apply):
        if getattr(inner, "__name__", "").startswith("apply_"):
            return sys.modules.get(getattr(inner, "__module__", ""))
    return getattr(apply, "__self__", None) or sys.modules.get(getattr(apply, "__module__", ""))


def _inside(apply: Callable[..., Any]) -> Iterator[Any]:
    """A callable, and those that it wraps: partial, ``functools.wraps``, what a closure, script or object holds."""
    layer: list[Any] = [apply]
    met: set[int] = set()
    for _ in range(_DEEPEST):
        further: list[Any] = []
        for each in layer:
            if id(each) in met:
                continue
            met.add(id(each))
            yield each
            further += [getattr(each, "func", None), getattr(each, "__wrapped__", None)]
            further += [cell.cell_contents for cell in getattr(each, "__closure__", None) or () if _is_filled(cell)]
            further += _globals_of(each)
            if not inspect.isroutine(each):
                further += list(getattr(each, "__dict__", {}).values())
        layer = [each for each in further if callable(each) and not isinstance(each, nn.Module | type)]


def _globals_of(function: Any) -> list[Any]:
    """The variables of its module that a wrapper names: in a script, that is where it keeps what it wraps."""
    if not inspect.isfunction(function) or function.__name__.startswith("apply_"):
        return []
    return [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not bound yet
        return False


def watched_building(original: Callable[..., Any], executor: Any, watched: Any, monitor: Monitor) -> Any:
    """What builds an executor's hypernetwork, with the monitor told of it."""

    built = 0

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        nonlocal built
        answer = original(*args, **kwargs)
        built += 1
        if built == _AGAIN:
            says = (
                f"{type(executor).__name__} builds its editor anew in edit {monitor.edits + 1}: what that had learned"
            )
            monitor.note(EDITOR_REBUILT, f"{says} of earlier edits, such as running statistics, is gone")
        monitor.editor_grew()
        say_whose(executor, watched, monitor)
        return answer

    return build


def say_whose(executor: object, watched: Any, monitor: Monitor) -> None:
    """EasyEdit's executors are shared by all editors of a process; MEND's keeps the model of its first call."""
    held = getattr(executor, "model", None)
    if isinstance(held, nn.Module) and held is not watched.model:
        monitor.note(
            OTHER_MODEL,
            f"{type(executor).__name__} edits another model than this editor's: all editors of a process share it, and"
            " it keeps the model of its first call; call its reset_model() before",
        )
