"""What an editor divides by, how fast it learned to write, and what it inverts: of its file, or of the live object.

| editor | known by |
|---|---|
| MEND, its authors' and EasyEdit's | ``….u_mean``, ``….u_std``, ``….v_mean``, ``….v_std``, ``….k``; ``edit_lrs`` |
| MALMEN, RLEdit | ``….n``, ``….mean``, ``….var``, ``….std``; ``….lr.weight`` beside ``….lamda.weight`` |
| UltraEdit | ``….n``, ``….mean``, ``….var``, ``….std`` |
| ROME, MEMIT | ``mom2.mom2`` with ``mom2.count``, as their ``.npz`` files have it; ``….moment`` of this package |
| AlphaEdit | square matrices, one or one per layer, called a projection, ``P`` or ``cache_c``; or alone in a file |
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from stabilitylab.acting.scanning.archives import Archive
from stabilitylab.acting.scanning.moments import idempotence, measure_cache, measure_moments, measure_projection
from stabilitylab.acting.scanning.statistics import measure_statistics, served, shape_in, shape_of, words_of
from stabilitylab.errors import UsageError
from stabilitylab.record.scanned import MomentScan, RatesScan, StatisticsScan, TensorScan
from stabilitylab.watching import editor_parts as parts

_MEND: Final = ("u_mean", "u_std", "v_mean", "v_std")
_RUNNING: Final = ("n", "mean", "var", "std")
_COUNTS: Final = ("k", "rows")
_SUMS: Final = ("u_s", "v_s")
"""What MEND forms its spreads of: NaN until the first row, and not used in an edit."""
_PROJECTION: Final = re.compile(r"(^|[._])(P|project\w*|null_space\w*)([._]|$)")
_CACHE: Final = re.compile(r"(^|[._])cache_c([._]|$)")
_ALIKE: Final = 1e-2
"""‖P² − P‖ / ‖P‖ up to which a matrix without a name is taken for a projection."""
_MATRIX: Final = 2  # dimensions
_KNOWN: Final = "MEND, MALMEN, UltraEdit, second moments of ROME or MEMIT, projections of AlphaEdit"


@dataclass(frozen=True)
class EditorScan:
    """What was found of an editor. nonfinite: entries of its other tensors that are not, by tensor."""

    statistics: tuple[StatisticsScan, ...] = ()
    rates: tuple[RatesScan, ...] = ()
    moments: tuple[MomentScan, ...] = ()
    nonfinite: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.statistics or self.rates or self.moments)


@dataclass(frozen=True)
class _Normaliser:
    editor: str
    name: str
    statistics: tuple[parts.Statistics, ...]


@torch.no_grad()
def scan_archive(archive: Archive, tensors: Sequence[TensorScan] = ()) -> EditorScan:
    """What a file of an editor's state holds. tensors: of the model that it is for.

    Raises:
        UsageError: nothing in it is known, or it is of layers that the model lacks.
    """
    held = archive.tensors
    normalisers = (*_mend(held), *_running(held))
    moments = tuple(_moments(archive))
    rates = tuple(_rates(held))
    if not (normalisers or moments or rates):
        first = ", ".join(list(held)[:3]) or "no tensor"
        raise UsageError(f"{archive.file} holds the state of no editor that is known ({first}); expected {_KNOWN}")
    if tensors:
        _of_this_model(archive, normalisers, moments, tensors)
    statistics = tuple(
        measured
        for each in normalisers
        for measured in measure_statistics(each.editor, each.name, each.statistics, tensors)
    )
    return EditorScan(statistics, rates, moments, _nonfinite(held, normalisers, rates))


@torch.no_grad()
def scan_editor(editor: object, tensors: Sequence[TensorScan] = ()) -> EditorScan:
    """What a live editor holds, found as the probes find it."""
    name = type(editor).__name__
    statistics = tuple(
        measured
        for each, normaliser in parts.find_normalisers(editor).items()
        for measured in measure_statistics(name, each, normaliser.statistics, tensors)
    )
    rates = tuple(
        RatesScan(name, each or "edit_lrs", tuple(values.double().tolist()))
        for each, values in parts.find_learning_rates(editor).items()
    )
    moments = (
        *(measure_moments(each, matrix, None) for each, matrix in parts.find_covariances(editor).items()),
        *(measure_projection(each, matrix) for each, matrix in parts.find_projections(editor).items()),
        *(measure_cache(each, matrix) for each, matrix in parts.find_key_caches(editor).items()),
    )
    return EditorScan(statistics, rates, moments)


def _of_this_model(
    archive: Archive,
    normalisers: Sequence[_Normaliser],
    moments: Sequence[MomentScan],
    tensors: Sequence[TensorScan],
) -> None:
    for each in normalisers:
        shape = shape_of(each.statistics)
        if not served(each.name, shape, tensors):
            raise UsageError(
                f"{archive.file} is of another model: {each.name or each.editor} is of layers of {words_of(shape)}; the"
                " model has none"
            )
    # Either end, since which of the two a file keeps first is not always known.
    ends = {end for tensor in tensors if len(tensor.shape) == _MATRIX for end in tensor.shape}
    stray = next((moment for moment in moments if moment.size not in ends), None)
    if stray is not None:
        raise UsageError(
            f"{archive.file} is of another model: {stray.name} is of layers of {stray.size} inputs; the model has none"
        )


# -- recognised by name -------------------------------------------------------------------------------------------


_State = Mapping[str, Tensor]


def _with_all(names: Collection[str], leaves: Sequence[str]) -> Iterator[str]:
    """The prefixes, with their dot, under which all of these are."""
    for name in sorted(names):
        prefix, _, leaf = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        if leaf == leaves[0] and all(f"{dot}{each}" in names for each in leaves):
            yield dot


def _mend(state: _State) -> Iterator[_Normaliser]:
    for dot in _with_all(state, _MEND):
        rows = next((state[f"{dot}{name}"] for name in _COUNTS if f"{dot}{name}" in state), None)
        statistics = tuple(
            parts.Statistics(
                kind, state[f"{dot}{kind}_mean"], state[f"{dot}{kind}_std"], place, 0, parts.MEND_GUARD, rows, False
            )
            for place, kind in enumerate("uv")
        )
        yield _Normaliser("MEND", dot.rstrip("."), statistics)


def _running(state: _State) -> Iterator[_Normaliser]:
    for dot in _with_all(state, _RUNNING):
        name = dot.rstrip(".")
        owner = name.rpartition(".")[0]
        editor = "MALMEN" if f"{owner}.lamda.weight" in state else "UltraEdit"
        mean, std = state[f"{dot}mean"].reshape(-1), state[f"{dot}std"].reshape(-1)
        shape = shape_in(name)
        keys = shape[0] if shape is not None and sum(shape) == std.numel() else None
        spans = {"": slice(None)} if keys is None else {"u": slice(0, keys), "v": slice(keys, None)}
        # All of these form what enters in float32, and add its machine epsilon, whatever the file is kept in.
        guard = torch.finfo(torch.float32).eps
        statistics = tuple(
            parts.Statistics(kind, mean[span], std[span], 0, span.start or 0, guard, state[f"{dot}n"], True)
            for kind, span in spans.items()
        )
        yield _Normaliser(editor, name, statistics)


def _rates(state: _State) -> Iterator[RatesScan]:
    for name, tensor in state.items():
        owner = name.removesuffix("lr.weight")
        if name.rpartition(".")[2] == "edit_lrs" or re.search(r"(^|\.)edit_lrs\.\d+$", name):
            yield RatesScan("MEND", name, tuple(tensor.detach().double().reshape(-1).tolist()))
        elif name.endswith("lr.weight") and f"{owner}lamda.weight" in state:
            yield RatesScan("MALMEN", name, tuple(tensor.detach().double().reshape(-1).tolist()))


def _nonfinite(state: _State, normalisers: Sequence[_Normaliser], rates: Sequence[RatesScan]) -> dict[str, int]:
    """Of a hypernetwork, what no other figure is of: its weights, and MALMEN's λ."""
    if not normalisers:
        return {}
    leaves = (*_MEND, *_RUNNING, *_COUNTS, *_SUMS)
    known = {each.name for each in rates}
    known |= {f"{each.name}.{leaf}".lstrip(".") for each in normalisers for leaf in leaves}
    counts = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in state.items()
        if name not in known and tensor.is_floating_point()
    }
    return {name: count for name, count in counts.items() if count}


def _moments(archive: Archive) -> Iterator[MomentScan]:
    held = archive.tensors
    tokens = archive.about.get("tokens")
    for name, tensor in held.items():
        if tensor.dim() < _MATRIX or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] <= 1:
            continue
        if name.endswith("mom2.mom2"):
            count = held.get(name.removesuffix("mom2.mom2") + "mom2.count")
            seen = None if count is None or count.numel() != 1 else float(count)
            layer = _layer_in(archive.file.stem) if archive.file.suffix == ".npz" else ""
            yield measure_moments(layer or name, tensor / seen if seen else tensor, seen, layer)
        elif name.endswith(".moment") and tokens is not None and _is_number(tokens):
            layer = name.removesuffix(".moment")
            yield measure_moments(layer, tensor, float(tokens), layer)
        elif tensor.dim() <= _MATRIX + 1:
            yield from _of_alphaedit(archive.file.stem, name, tensor, alone=len(held) == 1)


def _layer_in(stem: str) -> str:
    """The layer in the name of a file of ROME's and MEMIT's: ``LAYER_float32_mom2_100000``."""
    return re.split(r"_[a-z]+\d+_[a-z0-9-]*mom2", stem)[0]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _of_alphaedit(stem: str, name: str, tensor: Tensor, *, alone: bool) -> Iterator[MomentScan]:
    """P or cache_c, [inputs, inputs] or one per layer, by its name, by that of its file where it is alone in it, or as
    such a matrix that is a projection.
    """
    layers = tensor.reshape(-1, *tensor.shape[-2:])
    called = name or stem
    if alone and not (_CACHE.search(called) or _PROJECTION.search(called)):
        called = f"{stem}.{name}"
    if _CACHE.search(called):
        measure = measure_cache
    elif _PROJECTION.search(called) or (alone and bool(layers.any()) and idempotence(layers[0]) <= _ALIKE):
        measure = measure_projection
    else:
        return
    for number, matrix in enumerate(layers):
        yield measure(f"{name or stem}{f'.{number}' if len(layers) > 1 else ''}", matrix)
