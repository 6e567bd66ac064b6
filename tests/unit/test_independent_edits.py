"""Editors that return a clone: each made from the unedited model, or each from the one before."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.watching.instruments.transfer import Shipment
from tests.loops import make_model


def edited(folder: Path, *, each_from_the_original: bool, edits: int = 6) -> tuple[sl.Run, list[float]]:
    original = make_model()
    current: nn.Module = original
    true = []
    with sl.attach(original, "0", folder) as monitor:
        for edit in range(edits):
            with monitor.edit() as made:
                new = copy.deepcopy(original if each_from_the_original else current)
                delta = 0.02 * torch.randn(16, 8, generator=torch.Generator().manual_seed(edit))
                with torch.no_grad():
                    new.get_parameter("0.weight").add_(delta)
                true.append(float(delta.double().norm()))
                new(torch.randn(2, 5, 8))
                current = made.returns(new)
    return sl.load(folder), true


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("each_from_the_original", [True, False])
def test_the_update_is_the_edits_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool, each_from_the_original: bool
) -> None:
    if late:
        monkeypatch.setattr(Shipment, "is_here", property(lambda _: False))
    run, true = edited(tmp_path / "run", each_from_the_original=each_from_the_original)
    np.testing.assert_allclose(run.series("update.norm", "0")[1:], true, rtol=1e-5)
    outcomes = {edit.outcome for edit in run.edits[2:]}
    assert outcomes == ({"independent"} if each_from_the_original else {"committed"})


def test_independent_edits_restore_as_far_as_the_diagnosis_goes(tmp_path: Path) -> None:
    run, _ = edited(tmp_path / "run", each_from_the_original=True)
    assert "weights-not-restored" not in [link.cause for link in run.diagnosis().causes]
