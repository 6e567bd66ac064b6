"""What an editor divides by, how fast it learned to write, and what it inverts: of its file, or of the live object.

| editor | known by |
|---|---|
| MEND, its authors' and EasyEdit's | ``….u_mean``, ``….u_std``, ``….v_mean``, ``….v_std``, ``….k``; ``edit_lrs`` |
| MALMEN | ``….n``, ``….mean``, ``….var``, ``….std``; ``….lr.weight`` beside ``….lamda.weight`` |
| UltraEdit, RLEdit | ``….n``, ``….mean``, ``….var``, ``….std`` |
| ROME, MEMIT | ``mom2.mom2`` with ``mom2.count``, as their ``.npz`` files have it; ``….moment`` of this package |
| AlphaEdit | square matrices, one or one per layer, that are projections or are called so |
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from stabilitylab.acting.scanning.archives import Archive
from stabilitylab.errors import UsageError
from stabilitylab.record.scanned import LISTED, MomentScan, RatesScan, Some, StatisticsScan, TensorScan
from stabilitylab.watching import editor_parts as parts

TINY: Final = 1e-3
"""Of the median spread: a unit with less turns an input of the usual size into one of a thousand, which no hypernetwork
was trained on."""
WIDEST: Final = 8192
"""The widest matrix whose eigenvalues are formed: minutes on a CPU, and the time grows with the cube."""
_MEND: Final = ("u_mean", "u_std", "v_mean", "v_std")
_RUNNING: Final = ("n", "mean", "var", "std")
_COUNTS: Final = ("k", "rows")
_PROJECTION: Final = ("project", "null_space", "P")
_MATRIX: Final = 2  # dimensions
_KNOWN: Final = "MEND, MALMEN, UltraEdit, second moments of ROME or MEMIT, projections of AlphaEdit"


@dataclass(frozen=True)
class EditorScan:
    """What was found of an editor."""

    statistics: tuple[StatisticsScan, ...] = ()
    rates: tuple[RatesScan, ...] = ()
    moments: tuple[MomentScan, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.statistics or self.rates or self.moments)


@torch.no_grad()
def scan_archive(archive: Archive, tensors: Sequence[TensorScan] = ()) -> EditorScan:
    """What a file of an editor's state holds. tensors: of the model that it is for.

    Raises:
        UsageError: nothing in it is known, or it is of layers that the model lacks.
    """
    held = archive.tensors
    statistics = (*_mend(held, tensors), *_running(held, tensors))
    moments = tuple(_moments(archive))
    rates = tuple(_rates(held))
    if not (statistics or moments or rates):
        first = ", ".join(list(held)[:3]) or "no tensor"
        raise UsageError(f"{archive.file} holds the state of no editor that is known ({first}); expected {_KNOWN}")
    if tensors:
        stray = next((each for each in statistics if not each.layers), None)
        if stray is not None:
            raise UsageError(
                f"{archive.file} is of another model: its statistics {stray.name} are of {stray.units} units, and no"
                " layer of the model has as many"
            )
    return EditorScan(statistics, rates, moments)


@torch.no_grad()
def scan_editor(editor: object, tensors: Sequence[TensorScan] = ()) -> EditorScan:
    """What a live editor holds, found as the probes find it."""
    name = type(editor).__name__
    statistics = [
        _statistics(name, each, kind.kind, (kind.mean, kind.std), kind.rows, kind.guard, tensors)
        for each, normaliser in parts.find_normalisers(editor).items()
        for kind in normaliser.statistics
    ]
    rates = [
        RatesScan(name, each or "edit_lrs", tuple(values.double().tolist()))
        for each, values in parts.find_learning_rates(editor).items()
    ]
    moments = [
        *(_moment(each, matrix, None) for each, matrix in parts.find_covariances(editor).items()),
        *(_projection(each, matrix) for each, matrix in parts.find_projections(editor).items()),
    ]
    return EditorScan(tuple(statistics), tuple(rates), tuple(moments))


# -- what is normalised with --------------------------------------------------------------------------------------


_State = Mapping[str, Tensor]


def _with_all(names: Collection[str], leaves: Sequence[str]) -> Iterator[str]:
    """The prefixes, with their dot, under which all of these are."""
    for name in sorted(names):
        prefix, _, leaf = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        if leaf == leaves[0] and all(f"{dot}{each}" in names for each in leaves):
            yield dot


def _mend(state: _State, tensors: Sequence[TensorScan]) -> Iterator[StatisticsScan]:
    for dot in _with_all(state, _MEND):
        rows = next((state[f"{dot}{name}"] for name in _COUNTS if f"{dot}{name}" in state), None)
        for kind in "uv":
            pair = (state[f"{dot}{kind}_mean"], state[f"{dot}{kind}_std"])
            yield _statistics("MEND", dot.rstrip("."), kind, pair, rows, parts.MEND_GUARD, tensors)


def _running(state: _State, tensors: Sequence[TensorScan]) -> Iterator[StatisticsScan]:
    for dot in _with_all(state, _RUNNING):
        owner = dot.rstrip(".").rpartition(".")[0]
        editor = "MALMEN" if any(name.startswith(f"{owner}.l") and "lamda" in name for name in state) else "UltraEdit"
        mean, std = state[f"{dot}mean"].reshape(-1), state[f"{dot}std"].reshape(-1)
        guard = torch.finfo(std.dtype).eps if std.is_floating_point() else 0.0
        keys = _keys_of(owner, std.numel())
        spans = {"u": slice(0, keys), "v": slice(keys, None)} if keys else {"": slice(None)}
        for kind, span in spans.items():
            yield _statistics(editor, dot.rstrip("."), kind, (mean[span], std[span]), state[f"{dot}n"], guard, tensors)


def _keys_of(owner: str, units: int) -> int | None:
    """How many of the units are a layer's inputs, where the name tells its shape: ``64x256``, ``(64, 256)``."""
    found = re.search(r"(\d+)\s*[x,]\s*(\d+)", owner)
    if found is None or int(found[1]) + int(found[2]) != units:
        return None
    return int(found[2])


def _statistics(
    editor: str,
    name: str,
    kind: str,
    pair: tuple[Tensor, Tensor],
    rows: Tensor | None,
    guard: float,
    tensors: Sequence[TensorScan],
) -> StatisticsScan:
    mean, std = (each.detach().double().reshape(-1).cpu() for each in pair)
    finite = torch.isfinite(std)
    spread = std[finite & (std > 0)]
    typical = float(spread.median()) if spread.numel() else None
    tiny = finite & (std > 0) & (std < TINY * (typical or 0.0))
    return StatisticsScan(
        editor=editor,
        name=name,
        kind=kind,
        units=std.numel(),
        rows=float(rows.reshape(-1)[0]) if rows is not None and rows.numel() == 1 else None,
        guard=guard,
        typical=typical,
        zero=_some(finite & (std <= 0), std),
        nan=_some(~finite, std),
        tiny=_some(tiny, std),
        nan_means=int((~torch.isfinite(mean)).sum()),
        layers=tuple(_served(name, kind, std.numel(), tensors)),
    )


def _some(which: Tensor, values: Tensor) -> Some:
    found = which.nonzero().flatten()
    first = found[:LISTED].tolist()
    return Some(found.numel(), tuple(first), tuple(float(values[each]) for each in first))


def _served(name: str, kind: str, units: int, tensors: Sequence[TensorScan]) -> Iterator[str]:
    """The layers of the model that have so many inputs (or outputs); of those that are edited, where that is known.

    One that is named by its layer's shape is of such layers alone.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) == _MATRIX and not tensor.is_buffer]
    sites = [tensor for tensor in matrices if tensor.is_site] or matrices
    shape = re.search(r"(\d+)\s*[x,]\s*(\d+)", name)
    for tensor in sites:
        outputs, inputs = tensor.shape
        fits = {"u": {inputs}, "v": {outputs}}.get(kind, {inputs, outputs, inputs + outputs})
        named = shape is None or sorted(map(int, shape.groups())) == sorted(tensor.shape)
        if units in fits and named:
            yield tensor.layer


def _rates(state: _State) -> Iterator[RatesScan]:
    for name, tensor in state.items():
        owner = name.removesuffix("lr.weight")
        if name.rpartition(".")[2] == "edit_lrs" or re.search(r"(^|\.)edit_lrs\.\d+$", name):
            yield RatesScan("MEND", name, tuple(tensor.detach().double().reshape(-1).tolist()))
        elif name.endswith("lr.weight") and f"{owner}lamda.weight" in state:
            yield RatesScan("MALMEN", name, tuple(tensor.detach().double().reshape(-1).tolist()))


# -- what is inverted ---------------------------------------------------------------------------------------------


def _moments(archive: Archive) -> Iterator[MomentScan]:
    held = archive.tensors
    tokens = archive.about.get("tokens")
    for name, tensor in held.items():
        if name.endswith("mom2.mom2"):
            count = held.get(name.removesuffix("mom2.mom2") + "mom2.count")
            seen = None if count is None or count.numel() != 1 else float(count)
            layer = re.split(r"_(?:float|mom2)", archive.file.stem)[0] if archive.file.suffix == ".npz" else ""
            yield _moment(layer or name, tensor / seen if seen else tensor, seen, layer)
        elif name.endswith(".moment") and tokens is not None:
            layer = name.removesuffix(".moment")
            yield _moment(layer, tensor, float(tokens), layer)
        elif tensor.dim() in (_MATRIX, _MATRIX + 1) and tensor.shape[-1] == tensor.shape[-2] > 1:
            called = f"{archive.file.stem}.{name}"
            if any(word in called for word in _PROJECTION[:-1]) or name.rpartition(".")[2] == _PROJECTION[-1]:
                layers = tensor.reshape(-1, *tensor.shape[-2:])
                for number, matrix in enumerate(layers):
                    suffix = f".{number}" if len(layers) > 1 else ""
                    yield _projection(f"{name or archive.file.stem}{suffix}", matrix)


def _measured(matrix: Tensor) -> tuple[Tensor, int, Some, float | None]:
    """(float64 symmetrised, entries that are not finite, rows of zeros, ‖C − Cᵀ‖ / ‖C‖)."""
    wide = matrix.detach().double().cpu()
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        return wide, bad, Some(), None
    zero = (wide == 0).all(dim=1)
    norm = float(torch.linalg.matrix_norm(wide))
    apart = float(torch.linalg.matrix_norm(wide - wide.T)) / norm if norm > 0 else 0.0
    return (wide + wide.T) / 2, 0, _some(zero, wide.diagonal()), apart


def _moment(name: str, matrix: Tensor, tokens: float | None, layer: str = "") -> MomentScan:
    wide, bad, zero, apart = _measured(matrix)
    size, dtype = wide.shape[0], str(matrix.dtype).removeprefix("torch.")
    rank = condition = least = greatest = None
    if not bad and size <= WIDEST:
        values = torch.linalg.eigvalsh(wide)
        least, greatest = float(values[0]), float(values[-1])
        eps = torch.finfo(matrix.dtype if matrix.is_floating_point() else torch.float64).eps
        rank = int((values > greatest * size * eps).sum()) if greatest > 0 else 0
        condition = greatest / least if least > 0 else math.inf
    return MomentScan(
        "moments", name, size, dtype, tokens, rank, condition, least, greatest, bad, zero, apart, layer=layer
    )


def _projection(name: str, matrix: Tensor) -> MomentScan:
    """rank: of the projection, its trace: the directions that it leaves free."""
    wide, bad, zero, apart = _measured(matrix)
    away = rank = None
    if not bad:
        norm = float(torch.linalg.matrix_norm(wide))
        away = float(torch.linalg.matrix_norm(wide @ wide - wide)) / norm if norm > 0 else 0.0
        rank = round(float(wide.diagonal().sum()))
    return MomentScan(
        "projection",
        name,
        wide.shape[0],
        str(matrix.dtype).removeprefix("torch."),
        rank=rank,
        nonfinite=bad,
        zero_rows=zero,
        asymmetry=apart,
        idempotence=away,
    )
