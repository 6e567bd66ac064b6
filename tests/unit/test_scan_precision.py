"""What a dtype would cost: what it can't hold, what it rounds away, and the canary's answer in it; all put back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.acting.scanning.answers import Distance, original_of
from stabilitylab.acting.scanning.precision import PrecisionCount, dtype_called, precision_of_tensors, try_cast
from stabilitylab.errors import UsageError
from stabilitylab.probes.logits_pass import reduce_canary

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])


class Small(nn.Module):
    """Words in, logits out; a buffer of floats and one of integers on the way."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 16)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.tensor([scale]))
        self.register_buffer("order", torch.arange(8))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.hidden(self.embed(input_ids)) * self.scale
        logits: Tensor = self.head(hidden / self.scale)[..., self.order]
        return logits


def test_what_does_not_fit_and_what_vanishes_is_counted() -> None:
    weight = torch.tensor([[1.0, 65504.0, 65520.0, -1e30], [1e-8, -1e-8, 0.0, math.inf]])
    half = precision_of_tensors([weight, torch.arange(3)], torch.float16)
    assert (half.dtype, half.entries, half.overflowing, half.vanishing) == ("float16", 8, 2, 2)
    assert half.headroom_bits == pytest.approx(math.log2(65504 / 1e30))
    brain = precision_of_tensors([weight], torch.bfloat16)
    assert (brain.overflowing, brain.vanishing) == (0, 0)
    assert brain.headroom_bits == pytest.approx(math.log2(torch.finfo(torch.bfloat16).max / 1e30))
    assert (brain.updates, brain.swallowed, brain.swallowed_share, brain.kl_nats) == (None, None, None, None)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_counted_too(name: str) -> None:
    found = precision_of_tensors([torch.tensor([1.0, 1e6, 1e-9])], dtype_called(name))
    assert (found.overflowing, found.vanishing) == (1, 1)


def test_counts_do_not_depend_on_how_the_weights_are_cut() -> None:
    weight = torch.randn(700, 900, generator=torch.Generator().manual_seed(0)) * 1e-6  # several pieces
    whole = precision_of_tensors([weight], torch.float16)
    assert whole == precision_of_tensors(weight.split(123), torch.float16)
    assert whole == precision_of_tensors([weight.T], torch.float16)
    assert whole.vanishing == int((weight.half() == 0).sum())


def test_an_update_below_the_weight_is_swallowed_and_one_of_its_size_is_not() -> None:
    weight = torch.ones(4)
    update = torch.tensor([1.0, 1e-3, 1e-9, 0.0])
    swallowed = {}
    for name in ("bfloat16", "float16", "float32", "float64"):
        count = PrecisionCount(dtype_called(name))
        count.add_update(weight, update)
        found = count.result()
        assert found.updates == 3
        swallowed[name] = found.swallowed
    assert swallowed == {"bfloat16": 2, "float16": 1, "float32": 1, "float64": 0}


def test_no_update_is_told_apart_from_updates_that_moved_nothing() -> None:
    count = PrecisionCount(torch.float16)
    assert count.result().updates is None
    count.add_update(torch.ones(3), torch.zeros(3))
    assert (count.result().updates, count.result().swallowed, count.result().swallowed_share) == (0, 0, None)


def test_the_activation_has_headroom_of_its_own() -> None:
    count = PrecisionCount(torch.float16)
    assert count.result(largest_activation=65504.0 / 4).activation_headroom_bits == pytest.approx(2.0)
    assert count.result().activation_headroom_bits is None
    assert count.result().headroom_bits is None  # no weight was looked at


def bits_of(model: nn.Module) -> dict[str, tuple[torch.dtype, int, bytes]]:
    return {
        name: (tensor.dtype, tensor.data_ptr(), tensor.cpu().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cast_is_tried_and_put_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = Small().train()
    with torch.no_grad():
        model.embed.weight[0, 0] = 1 + 2**-23
    model.head.weight.grad = gradient = torch.ones_like(model.head.weight)
    before, parameters, state = bits_of(model), dict(model.named_parameters()), torch.get_rng_state()
    original = original_of(model, IDS)
    found = try_cast(model, original, dtype)
    assert isinstance(found, Distance)
    assert bits_of(model) == before
    assert dict(model.named_parameters()) == parameters
    assert model.head.weight.grad is gradient
    assert gradient.dtype == torch.float32
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert original.distance_of(model) == Distance(0.0, 1.0, is_finite=True)
    if dtype == torch.float32:
        assert found == Distance(0.0, 1.0, is_finite=True)
    else:
        assert found.is_finite
        assert found.kl_nats < 0.1


def test_the_distance_is_the_one_that_the_probes_measure() -> None:
    model = Small()
    original = original_of(model, IDS)
    other = Small().to(torch.bfloat16)
    with torch.no_grad():
        other.head.bias[2] += 3.0
        packed = reduce_canary(other(IDS), None, original.places)
    found = original.distance_of(other)
    assert (found.agreement, found.kl_nats) == (float(packed[-2]), float(packed[-1]))
    assert found.kl_nats > 0


def test_an_activation_that_overflows_makes_the_answer_nan() -> None:
    model = Small(scale=1e6)
    found = try_cast(model, original_of(model, IDS), torch.float16)
    assert isinstance(found, Distance)
    assert not found.is_finite
    told = PrecisionCount(torch.float16).result(cast=found)
    assert told.kl_nats is not None
    assert math.isnan(told.kl_nats)
    assert told.error is None


def test_what_a_dtype_can_not_run_is_one_line_and_the_model_is_as_before() -> None:
    model = Small()
    before = bits_of(model)
    found = try_cast(model, original_of(model, IDS), torch.float8_e5m2)
    assert isinstance(found, str)
    assert found
    assert "\n" not in found
    assert bits_of(model) == before
    told = PrecisionCount(torch.float8_e5m2).result(cast=found)
    assert (told.error, told.kl_nats, told.agreement) == (found, None, None)


def test_floats_among_the_arguments_are_cast_with_the_model() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.head(pixels)
            return logits

    model = Pixels()
    given = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    batches: list[Any] = [{"pixels": given}, given]
    for batch in batches:
        assert isinstance(try_cast(model, original_of(model, batch), torch.bfloat16), Distance)
    said = try_cast(model, original_of(model, lambda model: model(given)), torch.bfloat16)
    assert isinstance(said, str)  # a function has to see to it itself


def test_a_dtype_by_its_name() -> None:
    assert dtype_called("bf16") == dtype_called("bfloat16") == torch.bfloat16
    with pytest.raises(UsageError, match=r"'float61' is not known; expected one of .*did you mean 'float64'"):
        dtype_called("float61")


def test_a_canary_that_can_not_be_forwarded_is_told() -> None:
    with pytest.raises(UsageError, match="needs an edit to replay"):
        original_of(Small(), "replay")
    with pytest.raises(UsageError, match="the canary can't be forwarded: index out of range"):
        original_of(Small(), torch.tensor([[99]]))
