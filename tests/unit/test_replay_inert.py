"""A replay leaves the loop as if it had not been: bit for bit, random numbers and the editor's state included."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.record.run import load
from tests.replayed import BAD, make_model, of_replays, overflow, said, watched


class Editor:
    """Keeps an optimiser with momentum, a generator, an array, a tensor that it replaces, and counts."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        self.generator = torch.Generator().manual_seed(7)
        self.array = np.zeros(3)
        self.mean = torch.zeros(4)
        self.steps = 0

    def edit(self, model: nn.Module, number: int) -> Tensor:
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=number % 2 == 1)
        self.array += np.random.rand(3)  # noqa: NPY002 -- what an editor may draw from
        x = torch.randn(4, 8) * torch.rand((), generator=self.generator) + random.random()
        logits: Tensor = model(x.to(model[0].weight.dtype))
        self.mean += logits.detach().mean(0)
        self.mean = 0.9 * self.mean
        loss = logits.pow(2).mean()
        if number == BAD:  # the loss is lost, and the step skipped, as a loss scaler does it
            loss = loss * torch.tensor(0.0).log()
            model[3].bias.requires_grad_(False)
        loss.backward()
        if bool(loss.isfinite()):
            self.optimizer.step()
        return loss.detach()


def course(folder: Path | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The whole course of a loop, watched or not; all that it leaves."""
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    model = make_model(dtype)
    editor, heard, answers, let_go, called = Editor(model), [], [], [], 0
    model[0].weight.register_hook(lambda gradient: heard.append(float(gradient.float().sum())))
    model[3].weight.register_post_accumulate_grad_hook(lambda weight: heard.append(float(weight.float().sum())))

    def apply(model: nn.Module, number: int) -> Tensor:
        nonlocal called
        called += 1
        return editor.edit(model, number)

    def loop(step: Callable[[nn.Module, int], Tensor]) -> None:
        for number in range(1, 8):
            let_go.append(editor.mean)
            answers.append(step(model, number))

    if folder is None:
        loop(apply)
    else:
        with sl.attach(model, "[03]", folder, editor=editor, replay=True, announce=False) as monitor:
            loop(monitor.wrap(apply))
        (found,) = of_replays(load(folder))
        assert (found.edit, found.deterministic, found.kind) == (BAD, True, "algebra")
        assert said(load(folder)) == []
        heard = heard_in_the_loop(heard, len(found.precisions))
    drawn = np.random.rand()  # noqa: NPY002
    state = [tensor for slots in editor.optimizer.state.values() for tensor in slots.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        "model": [*model.state_dict().values()],
        "gradients": [torch.zeros(0) if gradient is None else gradient for gradient in gradients],
        "editor": [editor.mean, torch.from_numpy(editor.array), torch.tensor([editor.steps, called])],
        "optimizer": state,
        "answers": answers,
        "let go": let_go,
        "requires_grad": torch.tensor([parameter.requires_grad for parameter in model.parameters()]),
        "generators": [torch.get_rng_state(), editor.generator.get_state(), torch.tensor([random.random(), drawn])],
        "heard": [torch.tensor(heard, dtype=torch.float64)],
    }


def heard_in_the_loop(heard: list[float], wider: int) -> list[float]:
    """Without what the user's hooks heard in the replays: two things in each."""
    at = 2 * BAD
    return heard[:at] + heard[at + 2 * (1 + wider) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_goes_on_as_without_a_monitor(tmp_path: Path, dtype: torch.dtype) -> None:
    one, other = course(tmp_path / "run", dtype), course(None, dtype)
    for what, tensors in one.items():
        assert len(tensors) == len(other[what]), what
        for left, right in zip(tensors, other[what], strict=True):
            assert left.dtype == right.dtype, what
            as_bytes = [
                each.contiguous().view(-1).view(torch.uint8) if each.numel() else each for each in (left, right)
            ]
            assert torch.equal(*as_bytes), what


def test_an_edit_that_is_stopped_by_hand_is_not_made_once_more(tmp_path: Path) -> None:
    made = [0]

    def apply(model: nn.Module, number: int) -> None:
        count(made)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path / "run", apply)
    assert made == [1]
    assert said(load(tmp_path / "run")) == []


def count(made: list[int]) -> None:
    made[0] += 1


def test_what_stops_the_replay_passes_on_when_all_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the row of the edit lost."""
    model, number = make_model(torch.float16), 0
    phases = []

    def apply(model: nn.Module) -> None:
        overflow(model, number)
        if model[0].weight.dtype is torch.float32:  # in the middle of the wider replay
            raise KeyboardInterrupt

    with sl.attach(model, "[03]", tmp_path / "run", replay=True, announce=False) as monitor:
        step = monitor.wrap(apply)
        step(model)
        number = BAD
        alone = copy.deepcopy(model)
        overflow(alone, BAD)
        with pytest.raises(KeyboardInterrupt):
            step(model)
        phases = [parameter.dtype for parameter in model.parameters()]
        left = [each.detach().view(torch.int16) for each in model.parameters()]
        assert all(map(torch.equal, left, (each.detach().view(torch.int16) for each in alone.parameters())))
    assert set(phases) == {torch.float16}
    assert [edit.edit for edit in load(tmp_path / "run").edits] == [0, 1, 2]


def test_each_edit_may_hand_over_a_copy(tmp_path: Path) -> None:
    def apply(model: nn.Module, number: int) -> tuple[nn.Module, str]:
        edited = copy.deepcopy(model)
        overflow(edited, number)
        return edited, "done"

    original = make_model(torch.float16)
    untouched = copy.deepcopy(original.state_dict())
    with sl.attach(original, "[03]", tmp_path / "run", replay=True, announce=False) as monitor:
        step, model = monitor.wrap(apply), original
        for number in range(1, BAD + 1):
            model, _ = step(model, number)
    assert all(torch.equal(untouched[name], tensor) for name, tensor in original.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    run = load(tmp_path / "run")
    (found,) = of_replays(run)
    assert (found.edit, found.deterministic, found.kind) == (BAD, True, "range")
    assert said(run) == []
