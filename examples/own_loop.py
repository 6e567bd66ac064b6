"""A loop of one's own, watched: a small network is edited by gradient descent, and one edit meets a root at zero.

    python examples/own_loop.py runs/own-loop
    stabilitylab check runs/own-loop

The tracer is on in the first edits and where it costs little. To have any edit traced in full, with no change of code:

    STABILITYLAB_TRACE=12 python examples/own_loop.py runs/own-loop-traced
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import stabilitylab as sl

EDITS = 15
SAME = 12
"""The edit whose two inputs are the same: their distance is 0, where a root has no slope."""


class Encoder(nn.Module):
    """Turns 16 numbers into 8."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 32)
        self.out = nn.Linear(32, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [rows, 16]. Returns [rows, 8]."""
        encoded: Tensor = self.out(torch.relu(self.hidden(inputs)))
        return encoded


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean, of each row: [rows]."""
    return (one - other).square().sum(-1).sqrt()


def edit(model: nn.Module, optimizer: torch.optim.Optimizer, one: Tensor, other: Tensor) -> None:
    """Bring the codes of two inputs closer together."""
    optimizer.zero_grad()
    distance(model(one), model(other)).mean().backward()
    optimizer.step()


def main(run: Path) -> None:
    """Make all edits under a monitor that writes the run `run`."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.attach(model, sites="*", run=run, canary=torch.randn(4, 16)) as monitor:
        for number in range(1, EDITS + 1):
            one, other = torch.randn(1, 16), torch.randn(1, 16)
            with monitor.edit(label=f"pair {number}"):
                edit(model, optimizer, one, one if number == SAME else other)
    print(monitor.diagnosis())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/own-loop"))
