"""What an editing function can reach: the model that it gives back, its object, and its outer variables.

Outer variables are those of closures, and the globals that a function's own code names; in functions among them, too.
Not seen: globals of other Python modules, and what classes, torch's functions and C extensions hold.
"""

from __future__ import annotations

import functools
import inspect
import io
import sys
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from random import Random
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Final

from torch import nn

from stabilitylab.watching.snapshot import is_ours

_NO_STATE: Final = (ModuleType, type, str, bytes, int, float, complex, type(None))
_CONTAINERS: Final = (dict, list, set, deque, tuple, Mapping, Iterator, Random, SimpleNamespace)
"""Of Python's own classes, those whose objects are an edit's state; others are its plumbing: loggers, locks, files."""


def model_in(answer: object) -> nn.Module | None:
    """The model in what an editing function returned: itself, or the first of a tuple; None where there is none."""
    first = answer[0] if isinstance(answer, tuple) and answer else answer
    return first if isinstance(first, nn.Module) else None


def roots_of(model: nn.Module, editor: object | None, apply: object) -> dict[str, object]:
    """Whose state is put back: the model's, the editor's, and that of the object whose method `apply` is."""
    while isinstance(apply, functools.partial):
        apply = apply.func
    owner = apply.__self__ if inspect.ismethod(apply) else None if inspect.isroutine(apply) else apply
    return {"": model, "editor": editor, "apply": owner}


@dataclass(frozen=True, eq=False)
class _Binding:
    """A variable, where it lives, and what it was bound to."""

    name: str
    where: CellType | MutableMapping[str, Any]
    value: Any

    @property
    def holds(self) -> bool:
        where = self.where
        now = _content(where) if isinstance(where, CellType) else where.get(self.name, where)
        return now is self.value

    def put_back(self) -> None:
        if isinstance(self.where, CellType):
            self.where.cell_contents = self.value
        else:
            self.where[self.name] = self.value


class Outer:
    """The outer variables of a function as they are bound now."""

    def __init__(self, apply: object) -> None:
        self._bindings: list[_Binding] = []
        self.values: dict[str, object] = {}
        """What they are bound to, where that can hold state; by their names."""
        met: set[int] = set()
        waiting = [apply]
        while waiting:
            thing = waiting.pop()
            if id(thing) in met:
                continue
            met.add(id(thing))
            waiting += self._see(thing)

    def _see(self, thing: Any) -> Iterator[Any]:
        """Returns what is to be seen next."""
        if isinstance(thing, functools.partial):
            given = enumerate(thing.args)
            yield thing.func
            yield from (value for name, value in [*given, *thing.keywords.items()] if self._keeps(str(name), value))
        elif isinstance(thing, MethodType):
            yield thing.__func__
            self._keeps("self", thing.__self__)
        elif isinstance(thing, FunctionType) and _is_the_users(thing):
            for binding in _bindings(thing):
                self._bindings.append(binding)
                if self._keeps(binding.name, binding.value):
                    yield binding.value

    def _keeps(self, name: str, value: object) -> bool:
        """Keep a value that can hold state. Returns whether it is to be seen itself: it has variables of its own."""
        if isinstance(value, FunctionType | MethodType | functools.partial):
            return True
        if not (isinstance(value, _NO_STATE) or is_ours(type(value).__module__) or _is_plumbing(value)):
            free = name if self.values.get(name, value) is value else f"{name}.{len(self.values)}"
            self.values[free] = value
        return False

    def put_back(self) -> list[str]:
        """Bind each to what it was bound to; returns the names of those that could not be."""
        for binding in self._bindings:
            if not binding.holds:
                binding.put_back()
        return [binding.name for binding in self._bindings if not binding.holds]


def _bindings(function: FunctionType) -> Iterator[_Binding]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if not isinstance(_content(cell), CellType):
            yield _Binding(name, cell, cell.cell_contents)
    for name in dict.fromkeys(_names(function.__code__)):
        if name in function.__globals__:
            yield _Binding(name, function.__globals__, function.__globals__[name])


def _content(cell: CellType) -> Any:
    """What is in it; the cell itself where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _names(code: CodeType) -> Iterator[str]:
    """The globals that a function's code may name, and that of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_the_users(function: FunctionType) -> bool:
    home = function.__module__ or ""
    top = home.partition(".")[0]
    return (
        not is_ours(home)
        and top not in {"torch", "numpy"}
        and (top == "__main__" or top not in sys.stdlib_module_names)
    )


def _is_plumbing(value: object) -> bool:
    """Of one of Python's own classes, and no container."""
    top = type(value).__module__.partition(".")[0]
    is_python = top in sys.stdlib_module_names and top != "__main__"
    return is_python and (isinstance(value, io.IOBase) or not isinstance(value, _CONTAINERS))
