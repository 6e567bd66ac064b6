"""Steps that a 16-bit dtype rounds away, entry by entry, told from the loop's own gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.probes.absorption import MovedEntries, reduce_moved


def loop(folder: Path, rate: float, dtype: torch.dtype, masked: bool = False) -> sl.Run:
    """Adam, whose every step moves each entry by about `rate`. masked: but for most entries, whose gradient is 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), rate, eps=1e-4)
    with sl.attach(model, "0", folder) as monitor:
        for _ in range(6):
            with monitor.edit():
                x = torch.randn(8, 16).to(dtype)
                if masked:
                    x[:, 1:] = 0
                optimizer.zero_grad()
                model(x).float().pow(2).mean().backward()
                optimizer.step()
    return sl.load(folder)


def said(run: sl.Run) -> bool:
    return "update-swallowed" in [finding.rule for finding in run.diagnosis().findings]


def test_a_rate_that_bfloat16_can_not_hold(tmp_path: Path) -> None:
    run = loop(tmp_path / "run", 1e-5, torch.bfloat16)
    assert said(run)
    assert run.diagnosis().cause == "update-absorbed"


@pytest.mark.parametrize(
    ("rate", "dtype", "masked"),
    [(1e-2, torch.bfloat16, False), (1e-2, torch.bfloat16, True), (1e-5, torch.float32, False)],
    ids=["a larger rate", "few entries have a gradient", "float32"],
)
def test_nothing_is_said_where_entries_move(tmp_path: Path, rate: float, dtype: torch.dtype, masked: bool) -> None:
    assert not said(loop(tmp_path / "run", rate, dtype, masked))


def test_moved_entries_are_counted() -> None:
    before = torch.randn(7, 5).bfloat16()
    after = before.clone()
    after[2, 3] += 1
    after[4, 0] = float("nan")
    assert MovedEntries.from_host(reduce_moved(after, before).numpy()) == MovedEntries(2.0, 35.0)
