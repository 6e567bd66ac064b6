"""accelerate's loops: an edit spans what is accumulated, by the two lines that docs/hosts.md gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import stabilitylab as sl
from stabilitylab.integrations.accelerate import Watched, watch
from tests.loops import hooks_on

WIDTH, BATCHES, ACCUMULATED = 12, 10, 3


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Made anew: its settings are those of the process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(accelerator: Accelerator, run: Path | None, epochs: int = 1, stop: int = 0) -> tuple[nn.Module, list[float]]:
    """The loop of accelerate's own guide, watched or not; the norms of its gradients when they are clipped.

    stop: leave each epoch after so many batches.
    """
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    data = torch.utils.data.TensorDataset(*torch.randn(2, 4 * BATCHES, WIDTH))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.01), torch.utils.data.DataLoader(data, batch_size=4)
    )
    norms = []
    watched = (lambda batches: batches) if run is None else watch(accelerator, model, run, sites="0")  # 1
    for _ in range(epochs):
        for number, (x, y) in enumerate(watched(loader), start=1):  # 2
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                if accelerator.sync_gradients:
                    unscaled = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
                    norms.append(float(accelerator.unwrap_model(model)[0].weight.grad.norm()) / unscaled)
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
            if number == stop:
                break
    if isinstance(watched, Watched):
        watched.close()
    return accelerator.unwrap_model(model), norms


@pytest.mark.parametrize("scaled", [False, True])
def test_an_edit_is_a_step_with_the_batches_that_it_accumulates(
    tmp_path: Path, accelerator: Accelerator, scaled: bool
) -> None:
    if scaled:  # as `mixed_precision="fp16"` has it on an accelerator
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**12), True
    model, norms = train(accelerator, tmp_path / "run")
    bare, _ = train(accelerator, None)
    for one, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)
    run = sl.load(tmp_path / "run")
    assert run.series("gradient.passes", "0")[1:].tolist() == [3, 3, 3, 1]
    np.testing.assert_allclose(run.series("gradient.norm", "0")[1:], norms, rtol=1e-4)
    assert (run.series("gradient.norm_stepped", "0")[1:] <= 0.05).all()
    assert (run.series("update.norm", "0")[1:] > 0).all()
    assert [edit.label for edit in run.edits][1:] == ["step 1", "step 2", "step 3", "step 4"]
    assert hooks_on(model) == 0


def test_a_step_goes_on_where_an_epoch_is_left_and_ends_where_it_was_made(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    train(accelerator, tmp_path / "run", epochs=3, stop=ACCUMULATED)
    assert sl.load(tmp_path / "run").series("gradient.passes", "0")[1:].tolist() == [3, 3, 3]
    accelerator.step = 0
    train(accelerator, tmp_path / "run", epochs=3, stop=2)  # started again: in the next free folder
    assert sl.load(tmp_path / "run-2").series("gradient.passes", "0")[1:].tolist() == [3, 3]


def test_an_exception_in_the_loop_is_that_of_its_edit(tmp_path: Path, accelerator: Accelerator) -> None:
    model = accelerator.prepare(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(ZeroDivisionError), watch(accelerator, model, tmp_path / "run", sites="0") as watched:
        for number in watched([1, 0]):
            1 / number
    assert [(edit.label, edit.status) for edit in sl.load(tmp_path / "run").edits][1:] == [
        ("step 1", "applied"),
        ("step 2", "failed"),
    ]
    assert hooks_on(model) == 0


def test_a_process_that_is_not_the_first_watches_nothing(tmp_path: Path) -> None:
    class Second:
        is_main_process, sync_gradients, scaler = False, True, None

        def unwrap_model(self, model: nn.Module) -> nn.Module:
            return model

    watched = watch(Second(), nn.Linear(2, 2), tmp_path / "run")
    assert (list(watched([1, 2])), watched.monitor, (tmp_path / "run").exists()) == ([1, 2], None, False)
    watched.close()
