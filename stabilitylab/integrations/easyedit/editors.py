"""EasyEdit's editors. Each calls its ``apply_algo`` once per edit, and undoes an edit through ``restore_after_edit``,
which its module imported by name. Both are wrapped while the context lasts, and so are the methods that say whether
edits are single or sequential, and what builds an executor's hypernetwork; all are put back when it is left, whatever
was raised.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from stabilitylab.errors import UsageError
from stabilitylab.integrations.easyedit.executors import BUILDS, holder_of_state, say_whose, watched_building
from stabilitylab.integrations.easyedit.layers import edited_layers
from stabilitylab.integrations.easyedit.patching import replaced
from stabilitylab.record.note_kinds import NOT_PUT_BACK, SEQUENTIAL_EDITS, SINGLE_EDITS
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.monitor import Monitor
from stabilitylab.watching.sites import Patterns

_RESTORE: Final = "restore_after_edit"
_CALLED: Final = ("edit", "batch_edit", "edit_dataset", "edit_requests")
"""The methods of an editor that are told whether edits are single or sequential."""


@contextlib.contextmanager
def watch_editor(
    editor: Any, sites: Patterns | None, run: str | Path | None, options: Mapping[str, Any]
) -> Iterator[Monitor]:
    """See `stabilitylab.integrations.easyedit.watch`. options: the further arguments of `attach`."""
    if editor.model is None:
        raise UsageError(f"{type(editor).__name__} has no model, only an API to one: there is no weight to watch")
    guessed = sites is None
    if sites is None:
        sites = edited_layers(getattr(editor, "hparams", None), editor.model)
    apply = editor.apply_algo
    holder = holder_of_state(apply)
    with contextlib.ExitStack() as stack:
        monitor = stack.enter_context(attach(editor.model, sites, run, editor=holder, **options))
        if guessed:
            monitor.sites_are_guessed()
        stack.enter_context(replaced(editor, "apply_algo", monitor.wrap(apply, label=_label)))
        told: list[str] = []
        for name in _CALLED:
            if inspect.ismethod(getattr(editor, name, None)):
                stack.enter_context(replaced(editor, name, _watched_call(getattr(editor, name), told, monitor)))
        if inspect.ismethod(getattr(holder, BUILDS, None)):
            building = watched_building(getattr(holder, BUILDS), holder, editor, monitor)
            stack.enter_context(replaced(holder, BUILDS, building))
        if getattr(holder, "is_init", False):
            say_whose(holder, editor, monitor)
        for module in _modules_with_restore(editor):
            original = getattr(module, _RESTORE)
            stack.enter_context(replaced(module, _RESTORE, _watched_restore(original, editor, monitor)))
        yield monitor


def _label(*args: Any, **kwargs: Any) -> object:
    """The prompt of the request that ``apply_algo(model, tok, request, hparams, …)`` was called with."""
    request = kwargs.get("requests", kwargs.get("request", args[2] if len(args) > 2 else None))
    first = request[0] if isinstance(request, Sequence) and not isinstance(request, str) and request else request
    if isinstance(first, Mapping):
        return first.get("prompt", first.get("src", ""))
    return "" if first is None else first


def _modules_with_restore(editor: object) -> list[Any]:
    modules = {kind.__module__ for kind in type(editor).__mro__}
    return [sys.modules[name] for name in modules if hasattr(sys.modules.get(name), _RESTORE)]


def _watched_restore(original: Callable[..., Any], editor: object, monitor: Monitor) -> Callable[..., Any]:
    said = False

    @functools.wraps(original)
    def restore(whose: object, *args: Any, **kwargs: Any) -> Any:
        nonlocal said
        answer = original(whose, *args, **kwargs)
        held = getattr(editor, "model", None)  # of a method that wraps the model, the one inside again
        outcome = monitor.observe_outcome(held if isinstance(held, nn.Module) else None) if whose is editor else None
        stayed = outcome == "committed" and monitor.last_edit_moved
        if stayed and not said:
            said = True
            monitor.note(
                NOT_PUT_BACK,
                f"{_RESTORE} ran after edit {monitor.edits}, but the edited weights stayed: every later edit builds on "
                "them; pass keep_original_weight=True if single edits were meant",
            )
        return answer

    return restore


def _watched_call(original: Callable[..., Any], told: list[str], monitor: Monitor) -> Callable[..., Any]:
    """A method of an editor, whose arguments say whether edits are single or sequential. told: the kinds of notes that
    were taken of it, of all methods together: one is taken where it says something else than the last.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(TypeError):  # which the original raises too
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            kind, says = _kind_of_edits(original.__name__, {**bound.arguments, **bound.arguments.get("kwargs", {})})
            if kind and told[-1:] != [kind]:
                told.append(kind)
                monitor.note(kind, says)
        return original(*args, **kwargs)

    return call


def _kind_of_edits(method: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """(kind of note, what it says) of a call with these arguments; empty where they say nothing."""
    if given.get("sequential_edit"):
        return SEQUENTIAL_EDITS, f"{method} was called with sequential_edit=True"
    if "sequential_edit" not in given and "keep_original_weight" not in given:
        return "", ""
    keeps = given.get("keep_original_weight")
    kept = "" if keeps is None else f", keep_original_weight={keeps}"
    return SINGLE_EDITS, f"{method} makes single edits (sequential_edit=False{kept}): each is for the original model"
