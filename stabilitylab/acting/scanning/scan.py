"""The scan itself: tensor by tensor, the editor, the canary, dry edits; the figures in one `Scan`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.acting.scanning.answering import activations_of, is_compiled
from stabilitylab.acting.scanning.answers import original_of
from stabilitylab.acting.scanning.archives import open_archive
from stabilitylab.acting.scanning.capacity import capacities
from stabilitylab.acting.scanning.dry import Updates, dry_updates
from stabilitylab.acting.scanning.editors import scan_archive, scan_editor
from stabilitylab.acting.scanning.entries import entries_of
from stabilitylab.acting.scanning.opening import Entry, Opened, one_line, open_folder, open_model
from stabilitylab.acting.scanning.places import layer_of, matching, named_in, of_hparams, of_live
from stabilitylab.acting.scanning.precision import PrecisionCount, dtype_called, try_cast
from stabilitylab.errors import UsageError
from stabilitylab.probes.weight_spectrum import gram_of, spectrum_of_weight
from stabilitylab.record.scanned import FLOATS, ActivationScan, CapacityScan, PrecisionScan, Scan, TensorScan
from stabilitylab.watching.canary import Batch, Canary
from stabilitylab.watching.canary import of as canary_of
from stabilitylab.watching.sites import locate_readable

Progress = Callable[[str, int, int], None]
"""Takes what is being done, and how far it is: steps done, steps in all."""

_MATRIX: Final = 2  # dimensions
_FULL: Final = 4
"""Bytes of a float32."""


def quiet(doing: str, done: int, total: int) -> None:
    """No progress is shown."""


def figures(
    model: nn.Module | str | Path,
    sites: str | Sequence[str] | None = None,
    *,
    editor: object | None = None,
    canary: Canary | Batch | None = None,
    hparams: str | Path | None = None,
    precision: str | Sequence[str] = (),
    apply: Callable[[Any, Any], object] | None = None,
    requests: Iterable[Any] = (),
    lost_nats: float = math.inf,
    pickles: bool = False,
    progress: Progress = quiet,
) -> Scan:
    """The figures of `stabilitylab.scan`, which says what is what; it raises as that does.

    lost_nats: mean KL from which on a canary is lost.
    """
    began = time.perf_counter()
    live = isinstance(model, nn.Module)
    if isinstance(model, nn.Module):
        opened = open_model(model)
    elif isinstance(model, str | Path):
        opened = open_folder(Path(model), pickles=pickles)
    else:
        raise UsageError(f"model is a {type(model).__name__}; expected a torch.nn.Module or the folder of one")
    requests = list(requests)
    if requests and apply is None:
        raise UsageError("requests= was given without apply=; expected the function that edits the model with one")
    if sites is not None and hparams is not None:
        raise UsageError("sites= and hparams= were both given; expected one of them")
    chosen: frozenset[str] = frozenset()
    if sites is not None:
        known = opened.entries
        chosen = of_live(model, known, sites) if isinstance(model, nn.Module) else matching(known, sites)
    elif hparams is not None:
        chosen = named_in(opened.entries, of_hparams(Path(hparams)), Path(hparams))
    dtypes = [dtype_called(name) for name in ([precision] if isinstance(precision, str) else precision)]
    asked = _asked(model, canary, apply)
    unseen = {} if asked is None else _unseen(asked[0])
    activations = () if asked is None or unseen else _activations(*asked)
    counts = [PrecisionCount(dtype) for dtype in dtypes]
    # An archive that can't be read is said before minutes are spent on the model.
    archives = [open_archive(Path(each), pickles=pickles) for each in _files(editor)]
    tensors, skipped, size = scan_tensors(opened, chosen, also=partial(_count, counts), progress=progress)
    if not tensors:
        raise UsageError(f"{opened.name} holds no tensor of numbers that can be looked at{_first(skipped)}")
    editors = [scan_archive(archive, tensors) for archive in archives]
    if editor is not None and not archives:
        editors = [scan_editor(editor, tensors)]
    updates: Updates = {}
    if isinstance(model, nn.Module) and apply is not None:
        wanted = sites if sites is not None else sorted(chosen) or None
        updates = dry_updates(
            model, apply, requests, sites=wanted, editor=editor, progress=partial(progress, "dry edits")
        )
        _count_updates(model, counts, updates)
    precisions, capacity = _trials(asked, counts, updates, activations, lost_nats, skipped, progress)
    entries: Counter[str] = Counter()
    for tensor in tensors:
        entries[tensor.dtype] += tensor.size
    return Scan(
        model=opened.name,
        kind="live" if live else "folder",
        dtypes=dict(entries),
        tensors=tensors,
        activations=activations,
        statistics=tuple(each for found in editors for each in found.statistics),
        rates=tuple(each for found in editors for each in found.rates),
        moments=tuple(each for found in editors for each in found.moments),
        precisions=precisions,
        capacities=capacity,
        skipped=skipped | unseen,
        sites=tuple(dict.fromkeys(tensor.layer for tensor in tensors if tensor.is_site)),
        model_type=opened.model_type,
        bytes=size,
        seconds=time.perf_counter() - began,
        lost_nats=lost_nats if capacity else None,
        editor_nonfinite={name: count for found in editors for name, count in found.nonfinite.items()},
    )


def _files(editor: object | None) -> Sequence[str | Path]:
    """The files of an editor's state that were given in place of an editor."""
    if isinstance(editor, str | Path):
        return [editor]
    given = isinstance(editor, list | tuple) and all(isinstance(each, str | Path) for each in editor)
    return editor if given else []  # type: ignore[return-value]


def _first(skipped: dict[str, str]) -> str:
    return next((f"; {name}: {reason}" for name, reason in skipped.items()), "")


_Asked = tuple[nn.Module, Canary]
"""A live model, and the canary."""


def editor_figures(editor: object) -> Scan:
    """Those of a live editor alone."""
    found = scan_editor(editor)
    return Scan(
        model="",
        kind="live",
        statistics=found.statistics,
        rates=found.rates,
        moments=found.moments,
        editor_nonfinite=found.nonfinite,
    )


def _asked(model: object, given: Canary | Batch | None, apply: object | None) -> _Asked | None:
    """What is to be forwarded. Raises UsageError for what only a live model can do, and for a canary of no batch."""
    if not isinstance(model, nn.Module):
        if given is not None or apply is not None:
            what = "canary=" if given is not None else "apply="
            raise UsageError(
                f"{what} was given for a folder; expected a live model, which alone can answer and be edited"
            )
        return None
    watched = canary_of(given)
    if watched is None:
        return None
    if watched.is_replay:
        raise UsageError("canary='replay' needs an edit to replay; a scan expects a batch, or a function of the model")
    return model, watched


def _unseen(model: nn.Module) -> dict[str, str]:
    """Why the layers' answers to the canary are not looked at; empty where they are."""
    why = is_compiled(model)
    return {"what the canary makes of the layers": why} if why else {}


def _activations(model: nn.Module, canary: Canary) -> tuple[ActivationScan, ...]:
    try:
        return activations_of(model, canary)
    except Exception as error:
        raise UsageError(f"the canary can't be forwarded: {one_line(error)}") from error


def _count(counts: Sequence[PrecisionCount], entry: Entry, tensor: Tensor) -> None:
    if not entry.is_buffer:
        for count in counts:
            count.add(tensor)


def _count_updates(model: nn.Module, counts: Sequence[PrecisionCount], updates: Updates) -> None:
    for site, each in updates.items():
        located = locate_readable(model, site)
        for count in counts if located is not None else ():
            for update in each:
                count.add_update(located[1], update)  # type: ignore[index]


def _trials(
    asked: _Asked | None,
    counts: Sequence[PrecisionCount],
    updates: Updates,
    activations: Sequence[ActivationScan],
    lost_nats: float,
    skipped: dict[str, str],
    progress: Progress,
) -> tuple[tuple[PrecisionScan, ...], tuple[CapacityScan, ...]]:
    """What takes forwards of the canary: a cast to each dtype, and how far each site can be moved. skipped: takes why
    something could not be tried.
    """
    largest = max((each.largest for each in activations if each.largest is not None), default=None)
    if asked is None or not (counts or updates):
        return tuple(count.result(largest_activation=largest) for count in counts), ()
    original = original_of(*asked)
    precisions = []
    for done, count in enumerate(counts):
        progress("precisions", done, len(counts))
        cast = is_compiled(asked[0]) or try_cast(asked[0], original, count.dtype)
        precisions.append(count.result(cast=cast, largest_activation=largest))
    capacity: tuple[CapacityScan, ...] = ()
    if updates and not original.is_sound:
        skipped["how far layers can be moved"] = "the canary's answer is not finite before any edit"
    elif updates:
        capacity = capacities(asked[0], original, updates, limit=lost_nats, progress=partial(progress, "capacities"))
    return tuple(precisions), capacity


def scan_tensors(
    opened: Opened,
    sites: frozenset[str] = frozenset(),
    *,
    also: Callable[[Entry, Tensor], None] | None = None,
    progress: Progress = quiet,
) -> tuple[tuple[TensorScan, ...], dict[str, str], int]:
    """(each tensor of numbers, why others were skipped, bytes read). sites: names of tensors that are decomposed too.

    also: is handed each tensor while it is in memory.
    """
    found: list[TensorScan] = []
    skipped: dict[str, str] = {}
    size = 0
    total = sum(math.prod(entry.shape) for entry in opened.entries)
    done = 0
    for entry in opened.entries:
        progress("weights", done, total)
        done += math.prod(entry.shape)
        reason = _why_not(entry)
        if reason is None:
            tensor = entry.read()
            size += tensor.numel() * tensor.element_size()
            found.append(_tensor(entry, tensor, entry.name in sites))
            if also is not None:
                also(entry, tensor)
        elif reason:
            skipped[entry.name] = reason
    progress("weights", total, total)
    return tuple(found), skipped, size


def _why_not(entry: Entry) -> str | None:
    """Why it is not looked at; None where it is, empty where there is nothing to say: an index, a mask."""
    if entry.unreadable or not math.prod(entry.shape):
        return entry.unreadable
    if entry.dtype in FLOATS:
        return None
    whole = entry.dtype in {"bool", "int64", "i64"} or (entry.is_buffer and len(entry.shape) < _MATRIX)
    return "" if whole else f"its dtype is {entry.dtype} (quantised?)"


@torch.no_grad()
def _tensor(entry: Entry, tensor: Tensor, is_site: bool) -> TensorScan:
    seen = entries_of(tensor, inputs_first=entry.inputs_first)
    spectral = stable = condition = None
    if is_site and tensor.dim() == _MATRIX and not seen.nonfinite and seen.norm > 0:
        wide = tensor.float() if tensor.element_size() < _FULL else tensor
        values = spectrum_of_weight(wide, gram_of(wide))
        spectral, least = float(values[0]), float(values[-1])
        stable = (seen.norm / spectral) ** 2
        condition = spectral / least if least > 0 else math.inf
    return TensorScan(
        name=entry.name,
        layer=layer_of(entry.name),
        shape=entry.shape,
        dtype=entry.dtype,
        spectral_norm=spectral,
        stable_rank=stable,
        condition=condition,
        is_site=is_site,
        is_buffer=entry.is_buffer,
        inputs_first=entry.inputs_first,
        **vars(seen),
    )
