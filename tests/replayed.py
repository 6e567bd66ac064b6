"""Loops with a replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.record.operations import Operation
from stabilitylab.record.run import Run, load

BAD = 3
"""The edit that goes wrong."""


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)).to(dtype)


def of_replays(run: Run) -> list[Operation]:
    return [operation for operation in run.operations if operation.phase == "replay"]


def said(run: Run) -> list[str]:
    return [note.says for note in run.notes if note.kind == "replay"]


def watched(
    folder: Path, apply: Callable[[nn.Module, int], object], dtype: torch.dtype = torch.float32, edits: int = 4
) -> Run:
    """A wrapped loop, whose own exceptions are passed over."""
    model = make_model(dtype)
    with sl.attach(model, "[03]", folder, replay=True, announce=False) as monitor:
        step = monitor.wrap(apply)
        for number in range(1, edits + 1):
            try:
                step(model, number)
            except ArithmeticError:
                continue
    return load(folder)


def overflow(model: nn.Module, number: int) -> None:
    weight = model[0].weight
    x = torch.full((2, 8), 300.0 if number == BAD else 1.0, dtype=weight.dtype)
    gradient = x.T @ x
    with torch.no_grad():
        weight[:8] += 1e-6 * gradient
