"""What a hypernetwork's inputs are normalised with: its spreads measured, and the layers that it serves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from stabilitylab.record.scanned import LISTED, Some, StatisticsScan, TensorScan
from stabilitylab.watching.editor_parts import Statistics

TINY: Final = 1e-3
"""Of the median spread: a unit with less turns an input of the usual size into one of a thousand, which no hypernetwork
was trained on."""
_AUTHORS: Final = re.compile(r"\((\d+), ?(\d+)\)")
"""How MEND, MALMEN, UltraEdit and EasyEdit name what serves layers of one shape: ``(inputs, outputs)``."""
_OURS: Final = re.compile(r"(?:^|\.)(\d+)x(\d+)(?:\.|$)")
"""How this package does: ``outputs x inputs``."""
_MATRIX: Final = 2  # dimensions

Shape = tuple[int, int] | int
"""(inputs, outputs) of the layers that are served; or only the sum of both, where no more is known."""


def shape_in(name: str) -> tuple[int, int] | None:
    """The (inputs, outputs) of the layers that a normaliser's name tells."""
    if found := _AUTHORS.search(name):
        return int(found[1]), int(found[2])
    if found := _OURS.search(name):
        return int(found[2]), int(found[1])
    return None


def shape_of(statistics: Sequence[Statistics]) -> Shape:
    """Of the layers that these statistics serve."""
    units = {each.kind: each.std.numel() for each in statistics}
    return (units["u"], units["v"]) if {"u", "v"} <= units.keys() else sum(units.values())


def words_of(shape: Shape) -> str:
    """``256 inputs and 64 outputs``."""
    if isinstance(shape, tuple):
        return f"{shape[0]} inputs and {shape[1]} outputs"
    return f"{shape} inputs and outputs together"


def served(name: str, shape: Shape, tensors: Sequence[TensorScan]) -> tuple[str, ...]:
    """The layers of the model that have this shape: the one that the normaliser is named by, or else those that are
    edited, or else all.
    """
    fit = [tensor for tensor in tensors if _fits(tensor, shape)]
    dotted = f".{name.replace('#', '.')}"  # a module's name may hold no dot
    chosen = (
        [tensor for tensor in fit if dotted.endswith((f".{tensor.name}", f".{tensor.layer}"))]
        or [tensor for tensor in fit if tensor.is_site]
        or fit
    )
    return tuple(tensor.layer for tensor in chosen)


def _fits(tensor: TensorScan, shape: Shape) -> bool:
    if len(tensor.shape) != _MATRIX or tensor.is_buffer:
        return False
    ends = tensor.shape if tensor.inputs_first else tensor.shape[::-1]
    return ends == shape if isinstance(shape, tuple) else sum(ends) == shape


def measure_statistics(
    editor: str, name: str, statistics: Sequence[Statistics], tensors: Sequence[TensorScan]
) -> Iterator[StatisticsScan]:
    """The figures of each kind of input of one normaliser. tensors: of the model that it is for."""
    layers = served(name, shape_of(statistics), tensors)
    for each in statistics:
        mean, std = (held.detach().double().reshape(-1).cpu() for held in (each.mean, each.std))
        finite = torch.isfinite(std)
        positive = std[finite & (std > 0)]
        typical = float(positive.median()) if positive.numel() else None
        tiny = finite & (std > 0) & (std < TINY * (typical or 0.0))
        yield StatisticsScan(
            editor=editor,
            name=name,
            kind=each.kind,
            units=std.numel(),
            rows=_rows(each.rows),
            guard=each.guard,
            typical=typical,
            zero=units_where(finite & (std <= 0), std),
            nan=units_where(~finite, std),
            tiny=units_where(tiny, std, least_first=True),
            nan_means=int((~torch.isfinite(mean)).sum()),
            layers=layers,
            dtype=str(each.std.dtype).removeprefix("torch."),
        )


def _rows(count: Tensor | None) -> float | None:
    if count is None or count.numel() != 1:
        return None
    rows = float(count)
    return 0.0 if math.isnan(rows) else rows  # MEND's count is NaN until the first row


def units_where(which: Tensor, values: Tensor, *, least_first: bool = False) -> Some:
    """The units of a mask, in their order or those with the least value first, each with its value."""
    found = which.nonzero().flatten()
    if least_first:
        found = found[values[found].argsort(stable=True)]
    first = found[:LISTED].tolist()
    return Some(found.numel(), tuple(first), tuple(float(values[each]) for each in first))
