"""What was put back is no verdict about the model: real loops that undo an edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.probes import catalogue
from stabilitylab.record.readings import EditRow
from tests.loops import CANARY, make_model

LAYER = "0"


def loop(
    folder: Path,
    size: Callable[[int], float],
    *,
    restored: bool,
    edits: int = 12,
    canary: bool = False,
    dry: int = 0,
) -> sl.Run:
    """Each edit adds `size` times the weight's norm in a random direction; restored: it is put back before the next."""
    model = make_model()
    weight = model[0].weight
    original = weight.detach().clone()
    generator = torch.Generator().manual_seed(2)

    def one(edit: int) -> None:
        model(torch.randn(2, 5, 8, generator=generator))
        step = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight.add_(step * (size(edit) * original.norm() / step.norm()))

    options = {"canary": CANARY} if canary else {}
    with sl.attach(model, LAYER, folder, **options) as monitor:  # type: ignore[arg-type]
        if dry:
            monitor.calibrate(lambda _, edit: one(edit), range(1, dry + 1), n=dry)
        for edit in range(1, edits + 1):
            with monitor.edit():
                one(edit)
            if restored:
                with torch.no_grad():
                    weight.copy_(original)
    return sl.load(folder)


def test_a_weight_that_was_put_back_is_no_verdict(tmp_path: Path) -> None:
    found = loop(tmp_path / "run", lambda edit: float("inf") if edit == 7 else 1e-3, restored=True).diagnosis()
    assert found.verdict == "drifting"
    assert found.alarm_edit is None
    assert found.first_bad_edit is None
    assert any("edit 7" in finding.says and "put back" in finding.says for finding in found.findings)


def test_one_that_stays_is(tmp_path: Path) -> None:
    found = loop(tmp_path / "run", lambda edit: float("inf") if edit == 7 else 1e-3, restored=False).diagnosis()
    assert (found.verdict, found.alarm_edit) == ("non-finite", 7)


def test_one_that_stays_after_one_that_was_put_back(tmp_path: Path) -> None:
    """What was claimed and withdrawn can be claimed again, at the same place."""
    found = loop(tmp_path / "run", lambda edit: float("inf") if edit in (7, 12) else 1e-3, restored=True).diagnosis()
    assert (found.verdict, found.alarm_edit) == ("non-finite", 12)


def test_until_the_next_edit_shows_it_the_alarm_stands(tmp_path: Path) -> None:
    run = loop(tmp_path / "run", lambda edit: float("inf") if edit == 7 else 1e-3, restored=True, edits=7)
    assert run.diagnosis().alarm_edit == 7


@pytest.mark.parametrize("restored", [True, False])
def test_a_large_step_that_is_undone_is_drift_at_most(tmp_path: Path, restored: bool) -> None:
    found = loop(tmp_path / "run", lambda edit: 5.0, restored=restored).diagnosis()
    assert (found.verdict in ("stable", "drifting")) == restored
    assert (found.alarm_edit is None) == restored


def test_a_large_step_that_dry_edits_have_made_is_usual(tmp_path: Path) -> None:
    usual = loop(tmp_path / "usual", lambda _: 20.0, restored=False, edits=1, dry=8)
    new = loop(tmp_path / "new", lambda _: 20.0, restored=False, edits=1)
    assert "large-step" not in [finding.rule for finding in usual.diagnosis().findings]
    assert "large-step" in [finding.rule for finding in new.diagnosis().findings]


def test_only_weights_are_put_back(tmp_path: Path) -> None:
    """A model that answers NaN to one request and not to the next has not been put back."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with sl.attach(model, LAYER, tmp_path / "run") as monitor:
        for edit in range(1, 9):
            with monitor.edit(), torch.no_grad():
                model(torch.full((2, 4), float("nan") if edit == 5 else 1.0))
                model[0].weight.mul_(1.001)
    assert sl.load(tmp_path / "run").diagnosis().verdict == "non-finite"


def test_steps_that_dwarf_those_before_them_are_not_undone(tmp_path: Path) -> None:
    """Each is a thousand times the one before, so that it is nearly all of the distance from the original."""
    found = loop(tmp_path / "run", lambda edit: 1e-3 * 1e3**edit, restored=False, edits=5).diagnosis()
    assert found.verdict == "diverging"
    assert found.alarm_edit is not None


def test_readings_that_became_fewer_while_the_weights_were_lost_are_looked_up_anew() -> None:
    analyzer = Analyzer(catalogue())
    for edit in range(6):
        analyzer.observe(read(edit, **MANY, weight_nonfinite=3.0 if edit == 5 else 0.0))
    analyzer.observe(read(6, weight_nonfinite=3.0))
    analyzer.observe(read(7, weight_nonfinite=0.0))
    assert analyzer.diagnosis().verdict == "drifting"


def test_readings_that_dry_edits_had_first_are_looked_up_too() -> None:
    analyzer = Analyzer(catalogue())
    analyzer.observe(read(0, **MANY))
    analyzer.observe_dry(read(1, weight_nonfinite=0.0))
    analyzer.observe(read(1, weight_nonfinite=0.0))
    assert analyzer.diagnosis().verdict == "stable"


MANY = {"weight_max_abs": 1.0, "weight_norm": 1.0, "drift_norm": 0.1, "update_norm": 0.1}


def read(edit: int, **readings: float) -> EditRow:
    """A row with these readings of the layer."""
    held = {(name.replace("_", ".", 1), LAYER): np.array([value]) for name, value in readings.items()}
    return EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, None, held)
