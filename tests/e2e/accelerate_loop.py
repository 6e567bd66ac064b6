"""accelerate's loop over two processes, one process of them: run by `test_accelerate_processes.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stabilitylab.integrations.accelerate import watch


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    loader: Any = DataLoader(TensorDataset(*torch.randn(2, 48, 6)), batch_size=4)
    model: Any
    model, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.01), loader)
    watched = watch(accelerator, model, folder / "run", sites="[02]", announce=False)  # 1
    norms = []
    for x, y in watched(loader):  # 2
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            if accelerator.sync_gradients:
                norms.append(float(net[0].weight.grad.norm()))  # type: ignore[operator,union-attr]
            optimizer.step()
            optimizer.zero_grad()
    watched.close()
    accelerator.wait_for_everyone()
    rank = accelerator.process_index
    torch.save((watched.monitor is None, type(model).__name__, norms), folder / f"rank{rank}.pt")
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # the teardown of gloo aborts in one of a dozen runs, also of a loop that nobody watches


if __name__ == "__main__":
    main(Path(sys.argv[1]))
