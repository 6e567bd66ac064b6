"""The look at everything beside the watched weights: against a naive count, and in loops where something breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.probes.state_pass import NAMED, BadTensor, StatePass, count_bad, state_of
from stabilitylab.record.readings import MODEL_SITE
from tests.numbers import DTYPES, seeds

BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6), bad=st.integers(0, 4))
def test_full_looks_count_each_entry(dtype: torch.dtype, seed: int, sizes: list[int], bad: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    for at in range(bad):
        tensor = tensors[at % len(tensors)]
        tensor[int(torch.randint(tensor.numel(), (), generator=generator))] = BAD[at % 3]
    naive = [sum(not np.isfinite(value) for value in tensor.double().tolist()) for tensor in tensors]
    assert count_bad(tensors, []).tolist() == naive
    # A look at a sample never sees what is not there, and sees what is everywhere.
    assert all(some <= every for some, every in zip(count_bad([], tensors).tolist(), naive, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 1024, 5000])
def test_a_sample_sees_a_tensor_that_is_lost(dtype: torch.dtype, size: int) -> None:
    lost, sound = torch.full((size,), float("nan"), dtype=dtype), torch.full((size,), 60_000.0, dtype=dtype)
    found = count_bad([], [sound, lost]).tolist()
    assert found[0] == 0
    assert found[1] > 0


def test_the_first_bad_ones_are_told_by_name() -> None:
    values = np.array([0.0, *range(1, NAMED + 3)])
    parts = state_of(values, [f"t{at}" for at in range(values.size)]).parts
    assert parts[MODEL_SITE] == StatePass(NAMED + 2)
    assert parts["t1"] == BadTensor(1.0)
    assert len(parts) == 1 + NAMED


class Net(nn.Module):
    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.zeros(64, 512))
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -float("inf")), 1) if mask else torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(torch.tanh(self.first(x))))
        return logits


def run(folder: Path, net: Net, spoil: int | None, what: str, edits: int = 8) -> sl.Run:
    """Small edits of the first layer; at one another tensor is overwritten, or most of it, behind torch's back."""
    net.eval()
    with sl.attach(net, sites="first", run=folder) as monitor:
        for edit in range(1, edits + 1):
            with monitor.edit(), torch.no_grad():
                net(torch.ones(4, 8))
                net.first.weight.mul_(1.0001)
                if edit == spoil:
                    tensor = net.get_parameter(what).data if what == "table" else net.get_buffer(what)
                    tensor.view(-1)[3:].fill_(float("nan"))
    return sl.load(folder)


@pytest.mark.parametrize("what", ["norm.running_var", "table"])
def test_what_broke_is_named_though_nobody_watches_it(tmp_path: Path, what: str) -> None:
    found = run(tmp_path / "run", Net(), 5, what).diagnosis()
    assert found.verdict == "non-finite"
    assert (found.first_bad_edit, found.first_bad_site, found.first_bad_metric) == (5, what, "state.nonfinite")
    assert found.cause == "state-spoilt"


def test_a_mask_is_meant(tmp_path: Path) -> None:
    found = run(tmp_path / "run", Net(mask=True), None, "")
    assert found.diagnosis().verdict == "stable"
    assert set(found.series("state.bad_tensors")) == {0.0}


def test_a_buffer_that_nobody_has_written_yet_is_none_of_the_models(tmp_path: Path) -> None:
    net = Net()
    net.register_buffer("cache", torch.full((3, 5), float("nan")))
    found = run(tmp_path / "run", net, None, "")
    assert found.diagnosis().verdict == "stable"
    assert [note.says for note in found.notes if note.kind == "state-before"]


@pytest.mark.parametrize(("what", "verdict"), [("cache", "drifting"), ("norm.running_var", "non-finite")])
def test_a_canary_says_whether_it_matters(tmp_path: Path, what: str, verdict: str) -> None:
    """A scratch buffer may hold anything, and the model be sound; a statistic is read by each answer."""
    net = Net().eval()
    net.register_buffer("cache", torch.zeros(3, 5))
    with sl.attach(net, sites="first", run=tmp_path / "run", canary=torch.ones(2, 8)) as monitor:
        for edit in range(1, 9):
            with monitor.edit(), torch.no_grad():
                net(torch.ones(4, 8))
                net.first.weight.mul_(1.0001)
                if edit == 5:
                    net.get_buffer(what).fill_(float("nan"))
    found = sl.load(tmp_path / "run").diagnosis()
    assert (found.verdict, found.cause) == (verdict, "state-spoilt")


def test_what_was_broken_before_the_first_edit(tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.table[5, 7] = float("nan")
    found = run(tmp_path / "run", net, None, "").diagnosis()
    assert (found.first_bad_edit, found.first_bad_site, found.cause) == (0, "table", "broken-before")
