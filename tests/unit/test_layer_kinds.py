"""Every kind of layer in a real little edit loop: what is read, what is not, and that nothing changes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.layers import (
    Read,
    assert_gradients_read,
    assert_outputs_read,
    assert_weights_read,
    close,
    read_at,
    watch,
)
from tests.one_layer import DTYPES, LAYER, Net, descend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), Conv1D(6, 8)], ids=repr)
def test_linear_layers(tmp_path: Path, layer: nn.Module, dtype: torch.dtype) -> None:
    run, loop = watch(tmp_path, lambda: Net(copy.deepcopy(layer)).to(dtype), descend, LAYER)
    conv1d = isinstance(layer, Conv1D)
    assert run.manifest["site_details"]["layer"]["kind"] == ("conv1d" if conv1d else "linear")
    assert_weights_read(run, loop, "layer")
    assert_gradients_read(run, loop, "layer", transposed=conv1d)
    assert_outputs_read(run, loop, "layer", sequence=True)
    bits = np.log2(torch.finfo(dtype).max) - np.log2([np.abs(w).max() for w in loop.weights["layer"]])
    close(run, "weight.headroom_bits", "layer", bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(tmp_path: Path, dtype: torch.dtype) -> None:
    run, loop = watch(tmp_path, lambda: Net(nn.Embedding(20, 8), (2, 5), tokens=20).to(dtype), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    assert not read_at(run, "layer", "gradient.", "activation.dead_share", "feedback.share")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {"layer.bias": lambda model: model.layer.bias}
    run, loop = watch(tmp_path, lambda: Net(nn.Linear(8, 6)).to(dtype), descend, read)
    assert_weights_read(run, loop, "layer.bias")
    assert not read_at(run, "layer.bias", "gradient.", "activation.", "weight.spectral", "weight.stable_rank")


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=repr)
def test_normalisation(tmp_path: Path, norm: nn.Module) -> None:
    run, loop = watch(tmp_path, lambda: Net(copy.deepcopy(norm)), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    assert not read_at(run, "layer", "gradient.", "weight.spectral", "weight.stable_rank")


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(3, 4, 3), (2, 3, 6, 6)), (nn.Conv1d(3, 4, 3), (2, 3, 7))], ids=["4-d", "3-d"]
)
def test_convolution(tmp_path: Path, layer: nn.Module, shape: tuple[int, ...]) -> None:
    run, loop = watch(tmp_path, lambda: Net(copy.deepcopy(layer), shape), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=False)
    assert not read_at(run, "layer", "gradient.")


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 4000), (4000, 2)], ids=str)
def test_very_small_and_very_flat_matrices(tmp_path: Path, size: tuple[int, int]) -> None:
    run, loop = watch(tmp_path, lambda: Net(nn.Linear(*size), (2, 3, size[0])), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_gradients_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)


class Scales(nn.Module):
    """Parameters with no or one entry to a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.zero_d = nn.Parameter(torch.tensor(1.5))
        self.single = nn.Parameter(torch.tensor([0.5]))
        self.cube = nn.Parameter(torch.full((1, 1, 1), -0.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.zero_d + self.single - self.cube


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_a_single_entry(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {f"layer.{name}": lambda model, name=name: getattr(model.layer, name) for name in ("zero_d", "single")}
    read = {**read, "layer.cube": lambda model: model.layer.cube}
    run, loop = watch(tmp_path, lambda: Net(Scales()).to(dtype), descend, read)
    for site in read:
        assert_weights_read(run, loop, site)
        assert not read_at(run, site, "gradient.", "activation.")


def strided_linear(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(8, 6).to(dtype)
    layer.weight = nn.Parameter(torch.randn(8, 6, dtype=dtype).T)
    layer.bias = nn.Parameter(torch.randn(12, dtype=dtype)[::2])
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_contiguous(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {**LAYER, "layer.bias": lambda model: model.layer.bias}
    run, loop = watch(tmp_path, lambda: Net(strided_linear(dtype)), descend, read)
    assert_weights_read(run, loop, "layer")
    assert_weights_read(run, loop, "layer.bias")
    assert_gradients_read(run, loop, "layer")
    assert [edit.outcome for edit in run.edits[1:]] == ["committed"] * 3


def packed_linear(dtype: torch.dtype) -> nn.Linear:
    """All in one buffer, as flattened parameters are, and so at odd places in it."""
    layer, buffer = nn.Linear(8, 6).to(dtype), torch.randn(1 + 48 + 6, dtype=dtype)
    layer.weight = nn.Parameter(buffer[1:49].view(6, 8))
    layer.bias = nn.Parameter(buffer[49:])
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_at_odd_places_of_one_buffer(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {**LAYER, "layer.bias": lambda model: model.layer.bias}
    run, loop = watch(tmp_path, lambda: Net(packed_linear(dtype)), descend, read)
    assert_weights_read(run, loop, "layer")
    assert_weights_read(run, loop, "layer.bias")
