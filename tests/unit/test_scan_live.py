"""What the canary shows of a live model: extremes with their place, dead units, headroom; and a run that carries it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.errors import UsageError
from stabilitylab.record.scanned import ActivationScan, scan_from_json

WORDS, WIDTH = 11, 6


class Tiny(nn.Module):
    """Embeds, widens, activates, narrows, normalises, and answers with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(4, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.fc2(self.act(self.fc1(self.embed(input_ids))))))
        return out


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def seen(model: nn.Module, layer: str, what: str = "output", batch: Any = IDS) -> ActivationScan:
    found = [
        each for each in sl.scan(model, canary=batch).figures.activations if (each.layer, each.what) == (layer, what)
    ]
    assert len(found) == 1
    return found[0]


def test_the_largest_activation_is_named_with_its_row_position_unit_and_token() -> None:
    model = Tiny()
    with torch.no_grad():
        model.embed.weight[5, 2] = 77.0
    found = seen(model, "embed")
    assert (found.row, found.position, found.unit, found.token) == (1, 1, 2, 5)
    assert found.largest == 77.0
    assert found.typical == pytest.approx(float(model.embed(IDS).detach().abs().median()))
    assert found.headroom_bits == pytest.approx(math.log2(torch.finfo(torch.float32).max / 77.0))


def test_a_massive_activation_is_told_and_an_ordinary_one_is_not() -> None:
    model = Tiny()
    assert not [caution for caution in sl.scan(model, canary=IDS).cautions if caution.rule == "massive-activation"]
    with torch.no_grad():
        model.embed.weight[5, 2] = 5e4
    (told,) = [caution for caution in sl.scan(model, canary=IDS).cautions if caution.rule == "massive-activation"]
    assert "token 5" in told.says
    assert told.urgency == "note"


def test_what_enters_a_normalisation_ends_where_its_square_does() -> None:
    found = seen(Tiny(), "norm", "input")
    assert found.limit == pytest.approx(math.sqrt(torch.finfo(torch.float32).max))
    half = seen(Tiny().to(torch.bfloat16), "norm", "input")
    assert half.limit == pytest.approx(math.sqrt(torch.finfo(torch.float32).max))
    assert seen(Tiny().half(), "norm", "input").limit == 65504.0


def test_units_that_never_fire_are_dead_and_are_told_with_their_number() -> None:
    model = Tiny()
    with torch.no_grad():
        model.fc1.bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))
    found = seen(model, "act")
    assert found.dead is not None
    assert (found.dead.count, found.dead.first, found.units) == (2, (1, 3), 4)
    (told,) = [caution for caution in sl.scan(model, canary=IDS).cautions if caution.rule == "dead-units"]
    assert "units 1 and 3" in told.says
    assert seen(model, "fc1").dead is None


def test_an_answer_that_is_not_finite_is_fatal_and_names_the_first_layer() -> None:
    model = Tiny()
    with torch.no_grad():
        model.fc2.weight[0, 0] = math.inf
    scanned = sl.scan(model, canary=IDS)
    told = {caution.rule: caution.place for caution in scanned.of_urgency("fatal")}
    assert told == {"nonfinite-weight": "fc2.weight", "nonfinite-activation": "fc2"}


def test_an_activation_near_the_end_of_float16_is_a_risk() -> None:
    model = Tiny().half()
    with torch.no_grad():
        model.embed.weight[5, 2] = 30_000.0
    (told, *_) = [caution for caution in sl.scan(model, canary=IDS).cautions if "near-overflow" in caution.rule]
    assert "1.1 bits" in told.says


def test_the_model_is_left_as_it_was() -> None:
    model = Tiny().train()
    model.fc1.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sl.scan(model, "fc[12]", canary=IDS)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert len(hooks) == 1


def test_a_canary_that_can_t_be_forwarded_is_one_line_and_leaves_no_hook() -> None:
    model = Tiny()
    for wrong, says in ((torch.full((1, 2), 99), "can't be forwarded"), ("replay", "needs an edit to replay")):
        with pytest.raises(UsageError, match=says):
            sl.scan(model, canary=wrong)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_scan_goes_through_json_unchanged() -> None:
    model = Tiny().half()
    with torch.no_grad():
        model.fc2.weight[0, 0] = math.nan
        model.fc1.weight[1] = 0.0
    figures = sl.scan(model, "fc[12]", canary=IDS).figures
    for brief in (False, True):
        again = scan_from_json(figures.to_json(brief=brief))
        assert again.to_json() == figures.to_json()
    for broken in (None, [], {"model": 3}, {"model": "m", "kind": "live", "tensors": [{"name": "a"}]}, {"what": 1}):
        with pytest.raises(ValueError, match="no scan"):
            scan_from_json(broken)


def test_a_run_that_was_attached_with_it_carries_the_scan(tmp_path: Path) -> None:
    model = Tiny()
    attached = sl.attach(model, "fc2", run=tmp_path / "run", canary=IDS, scan=True, announce=False)
    with attached as monitor, monitor.edit(), torch.no_grad():
        model.fc2.weight.mul_(1.01)
    kept = scan_from_json(sl.load(tmp_path / "run").manifest["scan"])
    assert kept.sites == ("fc2",)
    assert {each.layer for each in kept.activations} >= {"fc1", "norm"}
    with sl.attach(model, "fc2", run=tmp_path / "other", announce=False):
        pass
    assert "scan" not in sl.load(tmp_path / "other").manifest
