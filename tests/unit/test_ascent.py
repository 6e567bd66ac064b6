"""Steps up the model's own loss: by the objective's sign, or by an optimizer that maximises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl

EDITS, WORDS = 25, 50
ASCENDS = "gradient.ascends"


class Follower(nn.Module):
    """A small causal language model of texts in which each word says the next."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, WORDS)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.words(x)
        logits = self.head(hidden + self.down(torch.relu(self.up(hidden))))
        loss = None if labels is None else nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
        return SimpleNamespace(loss=loss, logits=logits)


def texts(rows: int, length: int) -> Tensor:
    words = [torch.randint(0, WORDS, (rows,))]
    for _ in range(length - 1):
        words.append((words[-1] * 7 + 3) % WORDS)
    return torch.stack(words, 1)


def taught() -> Follower:
    torch.manual_seed(0)
    model = Follower()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        x = texts(8, 16)
        model(x, x).loss.backward()
        optimizer.step()
    return model


def unlearnt(folder: Path, sign: float, maximize: bool) -> sl.Run:
    model = taught()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, maximize=maximize)
    with sl.attach(model, ["up", "down"], folder, canary=texts(4, 16), announce=False) as monitor:
        for _ in range(EDITS):
            x = texts(2, 8)
            with monitor.edit():
                optimizer.zero_grad()
                (sign * model(x, x).loss).backward()
                optimizer.step()
    return sl.load(folder)


@pytest.mark.parametrize(
    ("sign", "maximize", "says"),
    [
        (-1.0, False, "which they weigh with less than 0"),
        (1.0, True, "by an optimizer that maximises (at up)"),
    ],
)
def test_a_step_up_the_loss_is_named(tmp_path: Path, sign: float, maximize: bool, says: str) -> None:
    first = unlearnt(tmp_path / "run", sign, maximize).diagnosis().causes[0]
    assert first.cause == "gradient-ascent"
    assert says in first.says


def test_to_maximise_the_negative_loss_is_to_minimise_it(tmp_path: Path) -> None:
    run = unlearnt(tmp_path / "run", -1.0, True)
    assert run.diagnosis().verdict == "stable"
    row = run.edits[-1].row.readings
    assert row[ASCENDS, "up"][0] == 1.0
    assert row["logits.loss_weight", "model"][0] == -1.0


def test_an_optimizer_that_minimises_says_nothing_of_it(tmp_path: Path) -> None:
    readings = unlearnt(tmp_path / "run", 1.0, False).edits[-1].row.readings
    assert ("gradient.learning_rate", "up") in readings
    assert (ASCENDS, "up") not in readings


def test_factors_of_an_adapter_that_an_optimizer_maximises_with(tmp_path: Path) -> None:
    from torch.nn.utils import parametrize

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.zeros(64, 2)), nn.Parameter(torch.randn(2, 32))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.left @ self.right

    model = taught()
    parametrize.register_parametrization(model.up, "weight", LowRank())
    moving = [p for name, p in model.named_parameters() if "parametrizations.weight.0" in name]
    optimizer = torch.optim.SGD(moving, lr=0.1, maximize=True)
    with sl.attach(model, "up", tmp_path / "run", announce=False) as monitor, monitor.edit():
        x = texts(2, 8)
        model(x, x).loss.backward()
        optimizer.step()
    assert sl.load(tmp_path / "run").edits[-1].row.readings[ASCENDS, "up"][0] == 1.0
