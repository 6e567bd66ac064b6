"""Every way to write a weight, each seen as what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.layers import (
    Read,
    Step,
    assert_gradients_read,
    assert_outputs_read,
    assert_weights_read,
    close,
    watch,
)
from tests.one_layer import LAYER, Net, descend


class Stack(nn.Module):
    """Several wide layers, so that most of them are not read in full after an edit that seems to leave them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(100, 64, bias=False) for _ in range(4))


STACK: Read = {f"layers.{at}": lambda model, at=at: model.layers[at].weight for at in range(4)}


def replace_parameter(layer: nn.Module, new: Tensor) -> None:
    layer.weight = nn.Parameter(new)


def data_is(layer: nn.Module, new: Tensor) -> None:
    layer.weight.data = new


def data_copy(layer: nn.Module, new: Tensor) -> None:
    layer.weight.data.copy_(new)


def data_add(layer: nn.Module, new: Tensor) -> None:
    layer.weight.data += new - layer.weight.data


def in_place(layer: nn.Module, new: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(new)


def dense(weight: Tensor, _: int) -> Tensor:
    return weight + 0.1 * torch.outer(*map(torch.randn, weight.shape))


def one_row(weight: Tensor, edit: int) -> Tensor:
    new = weight.clone()
    new[5 + edit] += torch.randn(weight.shape[1])
    return new


def one_column(weight: Tensor, edit: int) -> Tensor:
    new = weight.clone()
    new[:, 95 + edit] += torch.randn(weight.shape[0])
    return new


@pytest.mark.parametrize("how", [dense, one_row, one_column], ids=lambda how: how.__name__)
@pytest.mark.parametrize(
    "write", [replace_parameter, data_is, data_copy, data_add, in_place], ids=lambda write: write.__name__
)
def test_each_way_to_write_a_weight(tmp_path: Path, write: Callable[..., None], how: Callable[..., Tensor]) -> None:
    edits = iter([*range(5)] * 2)

    def edit(model: Any) -> Step:
        layer, at = model.layers[2], next(edits)
        write(layer, how(layer.weight.detach(), at))
        return Step(model, layer(torch.randn(2, 100)).detach())

    run, loop = watch(tmp_path, Stack, edit, STACK, edits=5)
    for site in STACK:
        assert_weights_read(run, loop, site)


def test_a_row_that_was_written_through_data_is_seen_at_once_whichever_it_is(tmp_path: Path) -> None:
    """In-place writes through .data leave no trace in the version counter."""
    edits = iter([*range(64)] * 2)

    def edit(model: Any) -> Step:
        model.layers[1].weight.data[next(edits)] += 1.0
        return Step(model, torch.zeros(1))

    run, _ = watch(tmp_path, Stack, edit, STACK, edits=64)
    close(run, "update.norm", "layers.1", [0.0, *[10.0] * 64])
    close(run, "drift.norm", "layers.1", np.sqrt(100.0 * np.arange(65)))


def test_a_model_that_is_cast_between_edits(tmp_path: Path) -> None:
    read: Read = {**LAYER, "layer.bias": lambda model: model.layer.bias}
    dtypes = (torch.float32, torch.float16, torch.float64, torch.bfloat16)

    def cast(net: Any) -> None:
        net.to(dtypes[dtypes.index(net.layer.weight.dtype) + 1])

    batch = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
    run, loop = watch(
        tmp_path,
        lambda: Net(nn.Linear(8, 6)),
        descend,
        read,
        edits=4,
        between=cast,
        canary=lambda model: model(batch.to(model.layer.weight.dtype)),
    )
    assert_weights_read(run, loop, "layer")
    assert_weights_read(run, loop, "layer.bias")
    assert_gradients_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    largest = [torch.finfo(dtype).max for dtype in dtypes]
    bits = np.log2(largest) - np.log2([np.abs(w).max() for w in loop.weights["layer"][1:]])
    close(run, "weight.headroom_bits", "layer", [*run.series("weight.headroom_bits", "layer")[:1], *bits])
    assert run.present("canary.kl").all()
