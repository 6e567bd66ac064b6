"""A plain PyTorch loop with all that it may have: autocast, a loss scaler, accumulation, clipping, checkpointing.

    python examples/plain_torch.py runs/plain
    stabilitylab check runs/plain

An edit is one step of the optimizer, with the batches that it accumulates. Readings are without the loss scale,
whatever it does in between, and a step that the scaler skips is an edit that does not land. Started again, as after a
crash, the loop goes on in the next free folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stabilitylab as sl

WIDTH, ACCUMULATED, STEPS = 32, 4, 16


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, WIDTH] in and out."""
        hidden: Tensor = self.down_proj(nn.functional.gelu(self.up_proj(self.norm(x))))
        return x + hidden


class Net(nn.Module):
    """Blocks whose activations are computed anew in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, WIDTH] in, logits [batch, 10] out."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits: Tensor = self.head(x)
        return logits


def main(run: Path) -> None:
    """Make all steps under a monitor that writes the run `run`."""
    torch.manual_seed(0)
    model, device = Net(), "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20, growth_interval=3)
    canary = torch.randn(8, WIDTH)

    watched = {"sites": "blocks.*_proj", "canary": canary, "editor": {"scaler": scaler}, "resume": True}
    with sl.attach(model, run=run, **watched) as monitor:  # 1
        for step in range(1, STEPS + 1):
            with monitor.edit(f"step {step}"):  # 2
                for _ in range(ACCUMULATED):
                    x, labels = torch.randn(16, WIDTH), torch.randint(10, (16,))
                    with torch.autocast(device, torch.float16):
                        loss = nn.functional.cross_entropy(model(x), labels) / ACCUMULATED
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    print(monitor.diagnosis())  # 3


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/plain"))
