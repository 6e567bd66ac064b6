"""What can't be measured is named with the reason, and comes back when it can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.errors import SiteError
from tests.layers import (
    Step,
    assert_weights_read,
    skipped,
    watch,
)
from tests.loops import make_model
from tests.one_layer import LAYER, Net, descend


class Int8Params(nn.Parameter):
    """As bitsandbytes has it: a parameter that holds int8, and never requires a gradient."""

    def __new__(cls, data: Tensor) -> Int8Params:
        return torch.Tensor._make_subclass(cls, data, False)  # type: ignore[return-value]


class Params4bit(Int8Params):
    """Two values to a byte, in one column."""


class Bitsandbytes(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Gptq(nn.Module):
    """No parameter at all: buffers with packed integers and their scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 8, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales.float()


class Sealed(nn.Module):
    """A backend that shows no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def int8_linear() -> nn.Module:
    return Bitsandbytes(Int8Params(torch.ones(8, 8, dtype=torch.int8)))


def four_bit_linear() -> nn.Module:
    return Bitsandbytes(Params4bit(torch.ones(32, 1, dtype=torch.uint8)))


def float8_linear() -> nn.Module:
    return Bitsandbytes(nn.Parameter(torch.ones(8, 8).to(torch.float8_e4m3fn), requires_grad=False))


def dynamic_linear() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and still in use
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))[0]


class Offloaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x


class TwoLayers(Net):
    """The layer in question, and one that can be measured."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__(nn.Linear(8, 6))
        self.other = other

    def data(self) -> Tensor:
        return torch.randn(2, 5, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(self.other(x))


_META = "its values are on the meta device (offloaded?): what an edit writes there is lost; load it to a device"
_FLOATS = "not one of float16, bfloat16, float32, float64 (quantised?)"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (int8_linear, f"its dtype is int8, {_FLOATS}"),
        (four_bit_linear, f"its dtype is uint8, {_FLOATS}"),
        (float8_linear, f"its dtype is float8_e4m3fn, {_FLOATS}"),
        (Gptq, f"its dtype is int32, {_FLOATS}"),
        (dynamic_linear, f"its dtype is qint8, {_FLOATS}"),
        (Offloaded, _META),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weight_that_can_not_be_measured_is_named_with_the_reason(
    tmp_path: Path, other: Callable[[], nn.Module], reason: str
) -> None:
    def train(net: Any) -> Step:
        for parameter in net.other.parameters():
            parameter.requires_grad_(False)
        return descend(net)

    run, loop = watch(tmp_path, lambda: TwoLayers(other()), train, LAYER, sites=["layer", "other"])
    assert skipped(run) == {"other": reason}
    assert run.manifest["sites"] == ["layer"]
    assert_weights_read(run, loop, "layer")
    with pytest.raises(SiteError) as caught:
        sl.attach(TwoLayers(other()), "oth*r", tmp_path / "none")
    assert str(caught.value) == f"none of the 1 matching sites can be measured; 'other': {reason}"
    assert not (tmp_path / "none").exists()


def test_a_layer_that_shows_no_tensor_is_told_apart_from_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"matches 'other', a Sealed that has no parameter \(quantised\?\); expected a"):
        sl.attach(TwoLayers(Sealed()), "other", tmp_path / "run")


class Wrapped(Tensor):
    """A tensor that is made of others, as torchao's quantised and PyTorch's sharded ones are."""

    @staticmethod
    def __new__(cls, packed: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Wrapped:
        return Wrapped(inner["packed"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Wrapped(args[0].packed) if func is torch.ops.aten.detach.default else NotImplemented


def test_a_weight_that_is_made_of_other_tensors_is_skipped(tmp_path: Path) -> None:
    model = make_model()
    model[0].weight = nn.Parameter(Wrapped(torch.ones(16, 8, dtype=torch.int8)), requires_grad=False)
    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        assert monitor.sites == ("3",)
    assert skipped(sl.load(tmp_path / "run")) == {
        "0": "it is a Wrapped, whose values are not held in one plain tensor (quantised? sharded?)"
    }


@pytest.mark.parametrize("becomes", [torch.int8, "meta"], ids=str)
def test_a_weight_that_is_quantised_or_offloaded_during_the_run_is_named_and_comes_back(
    tmp_path: Path, becomes: Any
) -> None:
    kept: list[Tensor] = []

    def edit(net: Any) -> Step:
        weight = net.other.weight
        if weight.is_meta or not weight.is_floating_point():
            net.other.weight = nn.Parameter(kept.pop(), requires_grad=False)
        elif not net.went:
            net.went = True
            kept.append(weight.data)
            net.other.weight = nn.Parameter(weight.data.to(becomes), requires_grad=False)
        return descend(net)

    def make() -> nn.Module:
        net = TwoLayers(Offloaded())
        net.went = False
        net.other.weight = nn.Parameter(torch.full((8, 8), 2.0), requires_grad=False)
        return net

    run, loop = watch(tmp_path, make, edit, LAYER, sites=["layer", "other"])
    reason = "its values are on the meta device" if becomes == "meta" else "its dtype is int8"
    assert skipped(run)["other"].startswith(reason)
    assert run.present("weight.norm", "other").tolist() == [True, False, True, True]
    assert run.series("drift.norm", "other")[2] == 0
    assert_weights_read(run, loop, "layer")
