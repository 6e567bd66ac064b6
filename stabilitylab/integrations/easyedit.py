"""EasyEdit in one line: ``with stabilitylab.integrations.easyedit.watch(editor, run="runs/mend"): editor.edit(...)``.

Every EasyEdit editor calls its ``apply_algo`` once per edit, and undoes an edit through ``restore_after_edit``, which
its module imported by name. Both are wrapped while the context lasts, and so are the methods that say whether edits are
single or sequential, and what builds an executor's hypernetwork; all are put back when it is left, whatever was raised.
EasyEdit itself is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from stabilitylab.acting.schedule import Trace
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.errors import UsageError
from stabilitylab.probes.base import Probe, Tier
from stabilitylab.record.note_kinds import NOT_PUT_BACK, OTHER_MODEL, SEQUENTIAL_EDITS, SINGLE_EDITS
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.canary import Batch, Canary
from stabilitylab.watching.monitor import Monitor
from stabilitylab.watching.sites import Patterns, all_sites

_RESTORE: Final = "restore_after_edit"
_CALLED: Final = ("edit", "batch_edit", "edit_dataset", "edit_requests")
"""The methods of an editor that are told whether edits are single or sequential."""
_BUILDS: Final = "init_model"
"""What builds an executor's hypernetwork, in its first call."""
_DEEPEST: Final = 4
"""Wrappers around `apply_algo` that are looked through."""


def edited_layers(hparams: object, model: nn.Module) -> list[str] | None:
    """The layers that an EasyEdit configuration edits, as names in `model`; None when it does not say.

    Read from ``inner_params`` (MEND, GRACE, WISE: parameter names, some written ``h[3]``) or from ``layers`` with
    ``rewrite_module_tmp`` (FT, ROME, MEMIT: ``transformer.h.{}.mlp.c_proj``).
    """
    named = [re.sub(r"\[(\d+)\]", r".\1", name) for name in getattr(hparams, "inner_params", None) or []]
    template = getattr(hparams, "rewrite_module_tmp", None)
    if not named and template:
        named = [str(template).format(layer) for layer in getattr(hparams, "layers", None) or []]
    offered = all_sites(model)
    parameters = {site.parameter: site.name for site in offered.values()}
    found = [parameters.get(name) or (name if name in offered else None) for name in named]
    return [name for name in found if name is not None] or None


def _label(*args: Any, **kwargs: Any) -> object:
    """The prompt of the request that ``apply_algo(model, tok, request, hparams, …)`` was called with."""
    request = kwargs.get("requests", kwargs.get("request", args[2] if len(args) > 2 else None))
    first = request[0] if isinstance(request, Sequence) and not isinstance(request, str) and request else request
    if isinstance(first, Mapping):
        return first.get("prompt", first.get("src", ""))
    return "" if first is None else first


def _holder_of_state(apply: Callable[..., Any]) -> object | None:
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
    """A callable, and those that it wraps: partial, ``functools.wraps``, the variables of a closure, an object's."""
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
            if not inspect.isroutine(each):
                further += list(getattr(each, "__dict__", {}).values())
        layer = [each for each in further if callable(each) and not isinstance(each, nn.Module | type)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not bound yet
        return False


def _modules_with_restore(editor: object) -> list[Any]:
    modules = {kind.__module__ for kind in type(editor).__mro__}
    return [sys.modules[name] for name in modules if hasattr(sys.modules.get(name), _RESTORE)]


def _watched_restore(original: Callable[..., Any], editor: object, monitor: Monitor) -> Callable[..., Any]:
    said = False

    @functools.wraps(original)
    def restore(whose: object, *args: Any, **kwargs: Any) -> Any:
        nonlocal said
        answer = original(whose, *args, **kwargs)
        stayed = whose is editor and monitor.observe_outcome() == "committed" and monitor.last_edit_moved
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


def _watched_building(original: Callable[..., Any], executor: Any, watched: Any, monitor: Monitor) -> Any:
    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        monitor.editor_grew()
        _say_whose(executor, watched, monitor)
        return answer

    return build


def _say_whose(executor: object, watched: Any, monitor: Monitor) -> None:
    """EasyEdit's executors are shared by all editors of a process; MEND's keeps the model of its first call."""
    held = getattr(executor, "model", None)
    if isinstance(held, nn.Module) and held is not watched.model:
        monitor.note(
            OTHER_MODEL,
            f"{type(executor).__name__} edits another model than this editor's: all editors of a process share it, and"
            " it keeps the model of its first call; call its reset_model() before",
        )


@contextlib.contextmanager
def _replaced(holder: Any, name: str, by: Any) -> Iterator[None]:
    """An attribute of an object, for as long as this lasts; then it is found where it was found before."""
    own = name in vars(holder)
    original = getattr(holder, name)
    setattr(holder, name, by)
    try:
        yield
    finally:
        setattr(holder, name, original) if own else delattr(holder, name)


@contextlib.contextmanager
def watch(
    editor: Any,
    run: str | Path | None = None,
    *,
    sites: Patterns | None = None,
    canary: Canary | Batch | None = None,
    probes: Tier | Sequence[Probe[Any]] = "default",
    tensorboard: bool = False,
    config: Mapping[str, Any] | None = None,
    thresholds: str | Path | Thresholds | None = None,
    announce: bool = True,
    trace: Trace = "auto",
    replay: bool = False,
    scan: bool = False,
) -> Iterator[Monitor]:
    """Record every edit that an EasyEdit editor makes inside the ``with`` block.

    editor: any EasyEdit editor (``BaseEditor``, ``MultimodalEditor``, …). sites: by default the layers that its
    hyperparameters name, else what the first edit moves. The other arguments are those of `stabilitylab.attach`.
    Whether edits are single or sequential is read from the call: of single ones, weights that nobody puts back are
    named as the cause. ROME's u, k and v* live inside its functions and are not seen; a loop that has them can report
    them, see `EditorReport`.
    Raises UsageError for an object that has no ``apply_algo`` and ``model``, and what `attach` raises.
    """
    for attribute in ("apply_algo", "model"):
        if not hasattr(editor, attribute):
            raise UsageError(
                f"{type(editor).__name__} has no '{attribute}'; expected an EasyEdit editor such as BaseEditor"
            )
    if editor.model is None:
        raise UsageError(f"{type(editor).__name__} has no model, only an API to one: there is no weight to watch")
    if sites is None:
        sites = edited_layers(getattr(editor, "hparams", None), editor.model)
    apply = editor.apply_algo
    holder = _holder_of_state(apply)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"canary": canary, "probes": probes, "tensorboard": tensorboard}
        options |= {"config": config, "thresholds": thresholds, "announce": announce, "trace": trace}
        options |= {"replay": replay, "scan": scan}
        monitor = stack.enter_context(attach(editor.model, sites, run, editor=holder, **options))
        stack.enter_context(_replaced(editor, "apply_algo", monitor.wrap(apply, label=_label)))
        told: list[str] = []
        for name in _CALLED:
            if inspect.ismethod(getattr(editor, name, None)):
                stack.enter_context(_replaced(editor, name, _watched_call(getattr(editor, name), told, monitor)))
        if inspect.ismethod(getattr(holder, _BUILDS, None)):
            building = _watched_building(getattr(holder, _BUILDS), holder, editor, monitor)
            stack.enter_context(_replaced(holder, _BUILDS, building))
        if getattr(holder, "is_init", False):
            _say_whose(holder, editor, monitor)
        for module in _modules_with_restore(editor):
            original = getattr(module, _RESTORE)
            stack.enter_context(_replaced(module, _RESTORE, _watched_restore(original, editor, monitor)))
        yield monitor
