"""A loop of edits by fine-tuning on a model whose weights are spread over processes by FSDP2 (`fully_shard`), watched.

    torchrun --nproc-per-node 2 examples/fsdp2.py runs/fsdp2
    stabilitylab check runs/fsdp2

Each process attaches, after `fully_shard`; process 0 writes the run. docs/spread-out.md says what is measured then.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import stabilitylab as sl

EDITS, ROWS, WIDTH = 12, 8, 32


class Block(nn.Module):
    """One residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, WIDTH]. Returns the same shape."""
        found: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


def main(run: str | None) -> None:
    """Make all edits under a monitor that writes the run `run`."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # the same model and the same canary on each process
    model = nn.Sequential(*(Block() for _ in range(3))).to(device)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    canary = {"input": torch.randn(4, WIDTH, device=device)}
    with sl.attach(model, sites="*.down", run=run, canary=canary) as monitor:
        for number in range(1, EDITS + 1):
            batch = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(number)).to(device)
            x, y = batch[:, rank::processes]  # each process has its share of the rows
            with monitor.edit(label=f"batch {number}"):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
    if rank == 0:
        print(monitor.path)
        print(monitor.diagnosis())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
