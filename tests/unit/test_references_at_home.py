"""Copies of the weights that are kept on the host: a CPU is taken for an accelerator, its memory for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.errors import UsageError
from stabilitylab.probes.weight_pass import WeightPass
from stabilitylab.watching.instruments import references
from stabilitylab.watching.instruments.references import Home, References
from stabilitylab.watching.sites import find_sites


def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no weight counts as one on a CPU, where copies are kept."""
    monkeypatch.setattr(references, "on_cpu", lambda tensor: False)


def measured(home: Home) -> tuple[list[WeightPass], References, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7))
    weight, (site,) = model[0].weight.data, find_sites(model, "0")
    kept = References(home)
    kept.adopt(site, weight)
    found = []
    for edit in range(4):
        if edit != 2:
            weight += 0.1 * torch.randn(7, 5)
        found.append(WeightPass.from_host(kept.measure("0", weight).packed.numpy(), weight.dtype))
    return found, kept, weight


def test_they_say_the_same_wherever_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    beside, _, _ = measured("device")
    away(monkeypatch)
    assert measured("host")[0] == beside


def test_what_is_sent_over_is_a_copy_and_what_is_kept_follows_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch)
    _, kept, weight = measured("host")
    sent = kept.previous("0", weight)
    assert torch.equal(sent, weight)
    sent.zero_()
    assert torch.equal(kept.previous("0", weight), weight)
    assert not kept.moved("0", weight)
    weight[0, 0] += 1
    assert kept.moved("0", weight)


def test_a_cast_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    away(monkeypatch)
    _, kept, weight = measured("host")
    half = weight.bfloat16()
    kept.measure("0", half)
    assert kept.previous("0", half).dtype == torch.bfloat16
    assert not kept.moved("0", half)


@pytest.mark.parametrize("home", ["host", "pinned"])
def test_on_a_cpu_it_makes_no_difference(tmp_path: Path, home: Home) -> None:
    def run(place: Home) -> sl.Run:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6))
        with sl.attach(model, "0", tmp_path / place, announce=False, trace=False, references=place) as monitor:
            for _ in range(3):
                with monitor.edit(), torch.no_grad():
                    model[0].weight += 0.1
        return sl.load(tmp_path / place)

    plain, other = run("device"), run(home)
    np.testing.assert_array_equal(plain.series("drift.norm", "0"), other.series("drift.norm", "0"))


def test_a_place_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="references='disk' is unknown; expected one of 'device', 'pinned', 'host'"):
        sl.attach(nn.Linear(2, 2), "*", tmp_path / "run", references="disk")  # type: ignore[arg-type]
