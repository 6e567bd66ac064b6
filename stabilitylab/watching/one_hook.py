"""What we put on a module: it acts while its edit is open, and leaves every copy of the module with it."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch._C import _len_torch_dispatch_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from stabilitylab.watching.compiled import uncompiled
from stabilitylab.watching.own_work import own_work
from stabilitylab.watching.spread import left_as_gathered
from stabilitylab.watching.walking import NamedModules, modules_of, named_modules_of

logger = logging.getLogger("stabilitylab")

_Table = OrderedDict[int, Any]
"""Where a module keeps its hooks."""

_silent = threading.local()


def _log(error: BaseException) -> None:
    logger.warning("stabilitylab: a hook failed and is off for this edit: %r", error)


class Hook:
    """What we put on a module: acts while its edit is open, and is nothing afterwards, wherever it was copied to.

    A layer that is deep-copied inside an edit takes its hooks along, and no handle owns the copies. They share this
    object, so that the copy is watched too, and fall silent with the edit; `leave` takes them off.
    """

    def __init__(self, action: Callable[..., None], broke: Callable[[BaseException], None] | None = None) -> None:
        """broke: told what `action` raised; else it is logged."""
        self._action: Callable[..., None] | None = action
        self._broke = broke or _log
        self._homes: list[weakref.ref[_Table]] = []

    @property
    def alive(self) -> bool:
        """Whether its edit is still open."""
        return self._action is not None

    def __call__(self, *args: Any) -> None:
        """Act, unless silent. A failure of ours ends this hook, never the user's forward."""
        if torch.compiler.is_compiling():  # the compiler traces this very line, so the graph stays the user's
            return
        if self._action is not None and not getattr(_silent, "depth", 0):
            try:
                if _is_alone():
                    self._action(*args)
                else:
                    with own_work(), _outside_of_transforms():
                        self._action(*args)
            except (Exception, SystemExit) as error:
                self.fall_silent()
                self._broke(error)

    @property
    def has_home(self) -> bool:
        """Whether it was put on a module."""
        return bool(self._homes)

    def fall_silent(self) -> None:
        """Do nothing from now on."""
        self._action = None

    def lives_in(self, table: _Table) -> None:
        """It was put into a module's hooks, or is named in the table beside them of those that take keywords."""
        self._homes.append(weakref.ref(table))

    def leave(self) -> None:
        """Fall silent, and go from every module that it was put on, or that was copied from one of those."""
        self.fall_silent()
        tables = [table for home in self._homes if (table := home()) is not None]
        keys = {key for table in tables for key, held in table.items() if held is self}
        for table in tables:
            for key in keys & table.keys():
                del table[key]
        self._homes.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        # The table that it stands in is being copied right now, and its copy is known already.
        for table in [home() for home in self._homes]:
            copied = memo.get(id(table))
            if isinstance(copied, OrderedDict):
                self.lives_in(copied)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that is saved inside an edit holds something of Python's own in its place, which takes whatever it is
        # called with and does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")


def put(
    stack: contextlib.ExitStack, module: nn.Module, hook: Hook, *, before: bool = False, with_kwargs: bool = False
) -> None:
    """A hook on a module, before or after its forward, until `stack` is closed."""
    if not hook.has_home:  # one that is put on many modules leaves all of them at once
        stack.callback(hook.leave)
    if before:
        module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
        tables = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    else:
        module.register_forward_hook(hook, with_kwargs=with_kwargs)
        tables = (module._forward_hooks, module._forward_hooks_with_kwargs)
    for table in tables if with_kwargs else tables[:1]:
        hook.lives_in(cast("_Table", table))


def carries_hooks(model: nn.Module) -> bool:
    """Whether any hook of an edit that is open is on `model`: it is the model that the edit began with, a wrapper
    around it, or a copy of it that was made inside the edit.
    """
    return any(
        isinstance(hook, Hook) and hook.alive
        for module in modules_of(model)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def sweep(model: nn.Module) -> NamedModules:
    """Take the silent hooks of ours off every module of `model`; returns all of them."""
    named = named_modules_of(model)
    for _, module in named:
        if not (module._forward_hooks or module._forward_pre_hooks):
            continue
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and not hook.alive]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return named


def _is_alone() -> bool:
    """Whether no mode and no transform is entered that would have to be left: then nothing has to be."""
    return _len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def _outside_of_transforms() -> contextlib.AbstractContextManager[Any]:
    """Where what is computed is no part of a ``torch.func`` transform that is under way, and outlives it."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


def run_silently(model: nn.Module, call: Callable[[], Any], *, gradients: bool = False) -> Any:
    """`call()` in evaluation mode, with the RNG and every module's mode put back after it; by default no gradients.

    No hook of ours acts meanwhile, another monitor's neither: it is none of what the user does.
    """
    training = [module for module in modules_of(model) if module.training]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    _silent.depth = getattr(_silent, "depth", 0) + 1
    try:
        for module in training:
            module.training = False
        with (
            left_as_gathered(model),
            uncompiled(),
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(devices=devices),
        ):
            return call()
    finally:
        _silent.depth -= 1
        for module in training:
            module.training = True
