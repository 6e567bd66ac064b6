"""Each defect that is planted in a folder of weights is found, and a sound folder is warned of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stabilitylab as sl
from stabilitylab.acting.scanning.entries import PIECE
from tests.folders import HIDDEN, WIDTH, weights, write

Held = dict[str, Tensor]
DOWN, UP = "model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight"
MODEL: str = ""


def rules(folder: Path, sites: str | None = None) -> list[tuple[str, str, str]]:
    """(rule, urgency, place) of each warning."""
    return [(caution.rule, caution.urgency, caution.place) for caution in sl.scan(folder, sites).cautions]


def test_a_sound_model_in_float32_is_warned_of_nothing(tmp_path: Path) -> None:
    assert rules(write(tmp_path / "m", weights()), "*.mlp.*") == []


def plant(name: str, change: Callable[[Tensor], object]) -> Callable[[Held], None]:
    return lambda held: change(held[name]) and None  # type: ignore[func-returns-value]


def nan(held: Held) -> None:
    held[DOWN][3, 5] = math.nan


def infinity(held: Held) -> None:
    held["model.layers.0.norm.weight"][2] = math.inf


def mask(held: Held) -> None:
    held["model.mask"] = torch.full((1, 1, 4, 4), -math.inf).triu(1)


def dead_outputs(held: Held) -> None:
    held[UP][[7, 9]] = 0.0


def dead_inputs(held: Held) -> None:
    held[DOWN][:, [7, 9]] = 0.0


def nothing(held: Held) -> None:
    held[DOWN].zero_()


def large(held: Held) -> None:
    held[DOWN] *= 30.0


def destroyed(held: Held) -> None:
    held[DOWN] *= 1e20


def variance(held: Held) -> None:
    held["bn.running_var"] = torch.tensor([1.0, -1e-3])


def loud_output(held: Held) -> None:
    held[DOWN][4] *= 40.0


def loud_input(held: Held) -> None:
    held[DOWN][:, 4] *= 40.0


def singular(held: Held) -> None:
    held[DOWN][1] = held[DOWN][0]


def as_float16(held: Held) -> None:
    for name, tensor in held.items():
        held[name] = tensor.half()


def near_the_end(held: Held) -> None:
    as_float16(held)
    held[DOWN][0, 0] = 20_000.0


def below_normal(held: Held) -> None:
    held[DOWN] *= 1e-4
    as_float16(held)


def wide_rows(held: Held) -> None:
    as_float16(held)
    held[DOWN][3] = 3_000.0


def float_mask(held: Held) -> None:
    held["model.bias"] = torch.full((4, 4), -math.inf).triu(1)


def as_bfloat16(held: Held) -> None:
    for name, tensor in held.items():
        held[name] = tensor.bfloat16()


PLANTED: dict[str, tuple[Callable[[Held], None], tuple[str, str, str]]] = {
    "a NaN": (nan, ("nonfinite-weight", "fatal", DOWN)),
    "an infinity": (infinity, ("nonfinite-weight", "fatal", "model.layers.0.norm.weight")),
    "a mask": (mask, ("masks", "note", "model.mask")),
    "a mask of two dimensions": (float_mask, ("masks", "note", "model.bias")),
    "an output past 65,504": (wide_rows, ("output-overflows", "risk", DOWN)),
    "outputs of zero": (dead_outputs, ("zero-outputs", "note", UP)),
    "inputs of zero": (dead_inputs, ("zero-inputs", "note", DOWN)),
    "a matrix of zeros": (nothing, ("zero-weight", "risk", DOWN)),
    "a layer out of line": (large, ("out-of-line", "risk", DOWN)),
    "weights of a lost model": (destroyed, ("norm-overflows", "fatal", DOWN)),
    "a negative variance": (variance, ("negative-variance", "fatal", "bn.running_var")),
    "a loud output": (loud_output, ("loud-output", "note", DOWN)),
    "a loud input": (loud_input, ("loud-input", "note", DOWN)),
    "a lost direction": (singular, ("weight-singular", "note", DOWN)),
    "float16": (as_float16, ("float16", "risk", MODEL)),
    "a weight near 65,504": (near_the_end, ("near-overflow", "risk", DOWN)),
    "subnormal weights": (below_normal, ("subnormal", "note", DOWN)),
    "bfloat16": (as_bfloat16, ("bfloat16", "note", MODEL)),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_found(tmp_path: Path, defect: str) -> None:
    change, expected = PLANTED[defect]
    held = weights()
    change(held)
    found = rules(write(tmp_path / "m", held), "*.mlp.down_proj")
    assert expected in found
    # Nothing is said of any other place, but of float16 as a whole.
    assert {place for _, _, place in found} <= {expected[2], MODEL}


def test_weights_in_eight_bits_are_scaled_to_the_end_of_their_range_and_not_warned_of(tmp_path: Path) -> None:
    held = weights()
    held[DOWN] = (held[DOWN] * 448 / held[DOWN].abs().max()).to(torch.float8_e4m3fn)
    found = sl.scan(write(tmp_path / "m", held))
    assert not found.cautions
    seen = next(tensor for tensor in found.figures.tensors if tensor.name == DOWN)
    assert seen.dtype == "float8_e4m3fn"
    assert seen.headroom_bits == pytest.approx(0.0, abs=0.2)


def test_the_most_urgent_comes_first_and_says_what_to_do(tmp_path: Path) -> None:
    held = weights()
    dead_outputs(held)
    near_the_end(held)
    held[UP][0, 0] = math.nan
    found = sl.scan(write(tmp_path / "m", held))
    assert [caution.urgency for caution in found.cautions] == sorted(
        (caution.urgency for caution in found.cautions), key=["fatal", "risk", "note"].index
    )
    assert all(caution.says.endswith(".") and caution.advice.endswith(".") for caution in found.cautions)
    assert f"{DOWN} is 1.7 bits from overflow" in str(found)
    assert found.of_urgency("fatal") == found.cautions[:1]


def test_rows_of_a_table_of_tokens_may_be_zero_and_so_may_what_is_not_trained_yet(tmp_path: Path) -> None:
    held = weights()
    held["model.embed_tokens.weight"][3] = 0.0
    held["model.layers.0.mlp.down_proj.lora_B.default.weight"] = torch.zeros(WIDTH, 4)
    assert rules(write(tmp_path / "m", held)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (700, 300), (2, 3, 4, 5), (1, PIECE + 3), (PIECE + 3,)])
def test_figures_are_those_of_a_naive_pass(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 0.02).to(dtype)
    module = torch.nn.Module()
    module.register_buffer("weight", tensor)
    (seen,) = sl.scan(module).figures.tensors
    wide = tensor.double()
    assert seen.norm == pytest.approx(float(wide.norm()), rel=1e-5)
    assert (seen.least, seen.greatest) == (float(wide.min()), float(wide.max()))
    assert seen.zeros == int((wide == 0).sum())
    assert (seen.nonfinite, seen.first_bad, seen.shape) == (0, None, shape)
    if dtype == torch.float16:
        assert seen.subnormal == int(((wide.abs() < 2.0**-14) & (wide != 0)).sum())
    if len(shape) == 2 and min(shape) > 1:
        assert seen.worst_output == pytest.approx(float(wide.norm(dim=1).max()) * shape[1] ** 0.5, rel=1e-5)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-30, 1e25, 1e150, 1e300])
def test_norms_neither_over_nor_underflow(size: float) -> None:
    dtype = torch.float32 if 1e-37 < size < 1e38 else torch.float64
    module = torch.nn.Module()
    plain = torch.randn(60, 40, dtype=torch.float64)
    module.register_buffer("weight", (plain * size).to(dtype))
    (seen,) = sl.scan(module).figures.tensors
    assert seen.norm / size == pytest.approx(float(plain.norm()), rel=1e-5)
    assert seen.worst_output is not None
    assert seen.worst_output / size == pytest.approx(float(plain.norm(dim=1).max()) * 40**0.5, rel=1e-5)


def test_pieces_of_very_different_size_add_up() -> None:
    module = torch.nn.Module()
    tensor = torch.ones(2 * PIECE // 8, 8)
    tensor[: PIECE // 16] = 1e-25
    tensor[-1] = 1e30
    module.register_buffer("weight", tensor)
    (seen,) = sl.scan(module).figures.tensors
    assert seen.norm == pytest.approx(float(tensor.double().norm()), rel=1e-6)
    assert seen.loud_rows.count == 1
    assert seen.loud_rows.first == (tensor.shape[0] - 1,)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    module = torch.nn.Module()
    tensor = torch.randn(HIDDEN, WIDTH)
    tensor[4, 1], tensor[2, 3], tensor[9, 9] = math.nan, -math.inf, 0.0
    module.register_buffer("weight", tensor)
    (seen,) = sl.scan(module).figures.tensors
    finite = tensor[tensor.isfinite()].double()
    assert (seen.nonfinite, seen.masking, seen.first_bad, seen.zeros) == (2, 1, (2, 3), 1)
    assert (seen.least, seen.greatest) == (float(finite.min()), float(finite.max()))
    assert seen.norm == pytest.approx(float(finite.norm()), rel=1e-6)


def test_a_live_model_is_left_as_it_was_and_a_tied_weight_is_read_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6))
    model[1].weight = model[0].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    names = [tensor.name for tensor in sl.scan(model, "0").figures.tensors]
    assert names.count("0.weight") == 1
    assert "1.weight" not in names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
