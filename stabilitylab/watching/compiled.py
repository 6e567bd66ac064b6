"""Which parts of a model run as compiled code. A hook in there would be compiled too, or make it be compiled anew."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stabilitylab.watching.walking import NamedModules


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made it, or it was compiled in place."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


@dataclass
class _Given:
    """What `torch.compile` returned in this process. holders: how many hold its class, each of these among them, as far
    as is known: whenever there are others, there are new ones.
    """

    wrappers: list[weakref.ref[nn.Module]] = field(default_factory=list)
    holders: int = 0

    def one_died(self, _: object) -> None:
        """One of them is no more."""
        self.holders -= 1


_given = _Given()


def inside_compiled(named: NamedModules) -> dict[int, str]:
    """Those of a model's modules that run as compiled code, by `id`: the name of what was compiled."""
    found: dict[int, str] = {}
    for name, module in named:
        if is_compiled(module):
            # Around what `torch.compile` made, hooks run as ever.
            inner = getattr(module, "_orig_mod", module)
            found = {id(each): name or "the model" for each in inner.modules()} | found
    many = _given_to_compile()
    names = {id(module): name or "the model" for name, module in named} if many else {}
    for given in many:
        for each in given.modules():
            if id(each) in names:
                found.setdefault(id(each), names.get(id(given), "a part of what was given to torch.compile"))
    return found


def _given_to_compile() -> list[nn.Module]:
    """It leaves no trace on them, so that what it returned is looked for among all objects, when there are new ones."""
    loaded = sys.modules.get("torch._dynamo.eval_frame")
    if loaded is None:
        return []
    kind = loaded.OptimizedModule
    if sys.getrefcount(kind) != _given.holders:
        made = [each for each in gc.get_referrers(kind) if type(each) is kind]
        _given.wrappers = [weakref.ref(each, _given.one_died) for each in made]
        _given.holders = sys.getrefcount(kind)
    wrappers: list[Any] = [each() for each in _given.wrappers]
    return [wrapper._orig_mod for wrapper in wrappers if wrapper is not None]


def frames_compiled() -> int:
    """How many pieces of code were compiled in this process so far."""
    compiler = sys.modules.get("torch._dynamo.convert_frame")  # not imported by anything that doesn't compile
    return int(getattr(compiler, "FRAME_COUNTER", 0))


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What is called inside runs as it is written, where torch can do so (2.6 or newer), and nothing is compiled."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield
