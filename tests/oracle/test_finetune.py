"""Fine-tuning against a naive float64 loop with Adam written out."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stabilitylab.editors.base import Editor, Prepared
from stabilitylab.editors.finetune import RADII, Finetune
from stabilitylab.errors import UsageError
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.evaluation import Originals
from stabilitylab.testbed.mend_data import edit_batch


class Squares(nn.Module):
    """One layer; the loss is that of a least squares problem, whose gradient is written down easily."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, y: Tensor) -> Any:
        output = self.layer(x)
        return SimpleNamespace(logits=output, loss=(output - y).square().sum())


def problem(kind: type[nn.Module] = nn.Linear, dtype: torch.dtype = torch.float32) -> tuple[Squares, dict[str, Tensor]]:
    layer = nn.Linear(5, 3) if kind is nn.Linear else Conv1D(3, 5)
    nn.init.normal_(layer.weight, std=0.3)
    batch = {"x": torch.randn(4, 5, dtype=dtype), "y": torch.randn(4, 3, dtype=dtype)}
    return Squares(layer.to(dtype)), batch


def naive(model: Squares, batch: dict[str, Tensor], steps: int, rate: float, radius: float | None, kind: str) -> Tensor:
    """[outputs, inputs] in float64 after `steps` of Adam (Kingma and Ba, Algorithm 1)."""
    matrix = model.layer.weight if isinstance(model.layer, nn.Linear) else model.layer.weight.T
    weight, bias = matrix.detach().double(), model.layer.bias.detach().double()
    start = weight.clone()
    x, y = batch["x"].double(), batch["y"].double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, steps + 1):
        gradient = 2 * (x @ weight.T + bias - y).T @ x
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight = weight - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        if kind == "linf":
            weight = torch.minimum(torch.maximum(weight, start - radius), start + radius)
        elif kind == "frobenius":
            away, most = weight - start, radius * start.norm()
            weight = start + (away if away.norm() <= most else away / away.norm() * most)
    return weight


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("constraint", [None, "linf", "frobenius"])
def test_the_weights_are_those_of_adam_in_float64(kind: type[nn.Module], constraint: Any) -> None:
    model, batch = problem(kind)
    radius = {"linf": 0.02, "frobenius": 0.05, None: None}[constraint]
    editor = Finetune(
        ["layer"], batch_of=lambda _: batch, constraint=constraint, radius=radius, steps=12, learning_rate=5e-3
    )
    expected = naive(model, batch, 12, 5e-3, radius, str(constraint))
    before = model.layer.weight.detach().clone()
    assert editor.edit(model, None) is model
    found = model.layer.weight if kind is nn.Linear else model.layer.weight.T
    torch.testing.assert_close(found.detach().double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(editor.reports["layer"].update, model.layer.weight.detach() - before)


@pytest.mark.parametrize("constraint", ["linf", "frobenius"])
def test_each_edit_has_a_ball_of_its_own(constraint: Any) -> None:
    model, batch = problem()
    editor = Finetune(["layer"], batch_of=lambda _: batch, constraint=constraint, radius=0.01, learning_rate=1e-2)
    start = model.layer.weight.detach().clone()
    for edits in (1, 2, 3):
        before = model.layer.weight.detach().clone()
        editor.edit(model, None)
        away, whole = model.layer.weight.detach() - before, model.layer.weight.detach() - start
        size = away.abs().max() if constraint == "linf" else away.norm() / before.norm()
        assert float(size) == pytest.approx(0.01, rel=1e-3)
        in_all = whole.abs().max() if constraint == "linf" else whole.norm() / start.norm()
        assert float(in_all) > 0.9 * edits * 0.01


def test_in_float16_steps_are_taken_on_float32_masters() -> None:
    model, batch = problem(dtype=torch.float16)
    # Each step is below half a unit in the last place of most weights: without masters they would not move at all.
    editor = Finetune(["layer"], batch_of=lambda _: batch, steps=40, learning_rate=2e-5)
    before = model.layer.weight.detach().clone()
    editor.edit(model, None)
    weight = model.layer.weight.detach()
    assert weight.dtype == torch.float16
    assert weight.isfinite().all()
    update = editor.reports["layer"].update
    assert update is not None
    assert torch.equal(weight, (before.float() + update).half())
    assert float(update.abs().max()) == pytest.approx(40 * 2e-5, rel=0.05)
    assert float((weight != before).float().mean()) > 0.5


def test_it_stops_when_the_loss_is_small() -> None:
    model, batch = problem()
    batch["y"] = model(**batch).logits.detach()
    before = copy.deepcopy(model.state_dict())
    Finetune(["layer"], batch_of=lambda _: batch).edit(model, None)
    assert torch.equal(model.layer.weight, before["layer.weight"])


def test_an_exception_leaves_weights_and_flags_as_they_were() -> None:
    model, batch = problem()
    model.requires_grad_(False)
    before, calls = copy.deepcopy(model.state_dict()), 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("broken model")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken model"):
        Finetune(["layer"], batch_of=lambda _: batch).edit(model, None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False, False]


def test_edits_of_the_digit_model_take_and_nothing_else_moves() -> None:
    model, tokenizer = blip2_digits.load("fp16")
    records = digits.edit_stream(0, 2, "validation")
    originals = Originals.of(model, tokenizer, records)
    editor = Finetune.for_model(model, batch_of=edit_batch)
    assert isinstance(editor, Editor)
    assert not isinstance(editor, Prepared)
    before = copy.deepcopy(model.state_dict())
    for index, record in enumerate(records):
        editor.edit(model, record)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {f"{editor.sites[0]}.weight"}
        assert originals.outcome(model, tokenizer, index)[0]
        model.load_state_dict(before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_settings_are_said() -> None:
    with pytest.raises(UsageError, match="expected linf, frobenius"):
        Finetune(["layer"], batch_of=dict, constraint="l2")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected a constraint"):
        Finetune(["layer"], batch_of=dict, radius=1.0)
    with pytest.raises(UsageError, match="above 0"):
        Finetune(["layer"], batch_of=dict, constraint="linf", radius=0.0)
    assert Finetune(["layer"], batch_of=dict, constraint="linf").radius == RADII["linf"]
