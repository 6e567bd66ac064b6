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

WIDTH, BATCHES, ACCUMULATED = 12, 10, 3


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Made anew: its settings are those of the process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(accelerator: Accelerator, run: Path | None) -> tuple[nn.Module, list[float]]:
    """The loop of accelerate's own guide, watched or not; the norms of its gradients when they are clipped."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    data = torch.utils.data.TensorDataset(*torch.randn(2, 4 * BATCHES, WIDTH))
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.01), torch.utils.data.DataLoader(data, batch_size=4)
    )
    norms = []
    monitor = None if run is None else sl.attach(accelerator.unwrap_model(model), sites="0", run=run)
    for x, y in loader:
        if monitor is not None and accelerator.sync_gradients:
            monitor.step()
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            if accelerator.sync_gradients:
                unscaled = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
                norms.append(float(accelerator.unwrap_model(model)[0].weight.grad.norm()) / unscaled)
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
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
