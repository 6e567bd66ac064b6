"""Attached without sites: what can't be compared is named, and not passed over as unmoved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import stabilitylab as sl


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def test_quantised_and_offloaded_weights_are_named_together(tmp_path: Path) -> None:
    model = nn.Sequential(*[Quantised() for _ in range(3)], nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor, monitor.edit(), torch.no_grad():
        model[0].weight += 1
    run = sl.load(tmp_path / "run")
    skipped = [note.says for note in run.notes if note.kind == "skipped-site"]
    assert [says.partition(":")[0] for says in skipped] == ["0 and 2 more", "4 and 1 more"]
    assert "int8" in skipped[0]
    assert "meta" in skipped[1]
    assert "0 and 2 more" in run.diagnosis().says


def test_nothing_is_named_where_all_can_be_compared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    with sl.attach(model, run=tmp_path / "run", announce=False):
        pass
    assert not [note for note in sl.load(tmp_path / "run").notes if note.kind == "skipped-site"]
