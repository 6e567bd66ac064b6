"""EasyEdit in one line: ``with stabilitylab.integrations.easyedit.watch(editor, run="runs/mend"): editor.edit(...)``.

Every EasyEdit editor calls its ``apply_algo`` once per edit, and undoes an edit through ``restore_after_edit``, which
its module imported by name. Both are wrapped while the context lasts, and put back when it is left, whatever was
raised. EasyEdit itself is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stabilitylab.acting.schedule import Trace
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.errors import UsageError
from stabilitylab.probes.base import Probe, Tier
from stabilitylab.record.note_kinds import NOT_PUT_BACK
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.canary import Batch, Canary
from stabilitylab.watching.monitor import Monitor
from stabilitylab.watching.sites import Patterns, all_sites

_RESTORE = "restore_after_edit"


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

    AlphaEdit and MEMIT keep projections, key caches and covariances as globals of that module.
    """
    executor = getattr(apply, "__self__", None)
    return executor if executor is not None else sys.modules.get(getattr(apply, "__module__", ""))


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
) -> Iterator[Monitor]:
    """Record every edit that an EasyEdit editor makes inside the ``with`` block.

    editor: any EasyEdit editor (``BaseEditor``, ``MultimodalEditor``, …). sites: by default the layers that its
    hyperparameters name, else what the first edit moves. The other arguments are those of `stabilitylab.attach`; with
    ``config={"sequential_edit": False}``, as `edit` has it by default, weights that nobody puts back are named as the
    cause. A MEND executor builds its hypernetwork in its first call, so its inputs are seen from the second edit on.
    ROME's u, k and v* live inside its functions and are not seen; a loop that has them can report them, see
    `EditorReport`.
    Raises UsageError for an object that has no ``apply_algo`` and ``model``, and what `attach` raises.
    """
    for attribute in ("apply_algo", "model"):
        if not hasattr(editor, attribute):
            raise UsageError(
                f"{type(editor).__name__} has no '{attribute}'; expected an EasyEdit editor such as BaseEditor"
            )
    if sites is None:
        sites = edited_layers(getattr(editor, "hparams", None), editor.model)
    apply = editor.apply_algo
    own = "apply_algo" in vars(editor)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"canary": canary, "probes": probes, "tensorboard": tensorboard}
        options |= {"config": config, "thresholds": thresholds, "announce": announce, "trace": trace}
        options["replay"] = replay
        monitor = stack.enter_context(attach(editor.model, sites, run, editor=_holder_of_state(apply), **options))
        editor.apply_algo = monitor.wrap(apply, label=_label)
        stack.callback(setattr, editor, "apply_algo", apply) if own else stack.callback(delattr, editor, "apply_algo")
        for module in _modules_with_restore(editor):
            original = getattr(module, _RESTORE)
            setattr(module, _RESTORE, _watched_restore(original, editor, monitor))
            stack.callback(setattr, module, _RESTORE, original)
        yield monitor
