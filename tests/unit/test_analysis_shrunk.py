"""A weight that edits wear down to a tenth of its norm: said, and told from one that a single edit emptied."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import stabilitylab as sl
from stabilitylab.analysis import Diagnosis
from stabilitylab.record.readings import Key
from tests.loops import CANARY, make_model
from tests.synthetic_runs import diagnose, row

A = "decoder.layers.1.fc2"
Reading = dict[Key, float]


def weight(norm: float, update: float, first: float = 10.0) -> Reading:
    drift = first - norm
    readings = {("weight.norm", A): norm, ("update.norm", A): update, ("drift.norm", A): drift}
    return readings | {("update.ratio", A): update / norm, ("drift.ratio", A): drift / first}


def diagnosis_of(*norms: float) -> Diagnosis:
    edits = [weight(now, before - now, norms[0]) for before, now in pairwise(norms)]
    rows = [weight(norms[0], 0.0, norms[0]), *edits]
    return diagnose(row(edit, readings) for edit, readings in enumerate(rows))


def shares(share: float, edits: int) -> list[float]:
    return [10.0 * share**edit for edit in range(edits + 1)]


def test_edits_that_each_take_a_share_wear_a_weight_down() -> None:
    found = diagnosis_of(*shares(0.88, 24))
    assert (found.verdict, found.cause, found.confidence) == ("drifting", "weights-decayed", "medium")
    assert (found.first_bad_metric, found.first_bad_site) == ("weight.norm", A)
    assert found.first_bad_edit == 19  # 0.88 ** 19 is the first below a tenth


@pytest.mark.parametrize("left", [1.01, 4.0])
def test_more_than_a_tenth_left_is_no_finding(left: float) -> None:
    last = shares((left / 10.0) ** (1 / 24), 24)
    assert not any(finding.rule == "weight-shrunk" for finding in diagnosis_of(*last).findings)


def test_one_edit_that_empties_a_weight_is_no_decay() -> None:
    found = diagnosis_of(*[10.0] * 5, *[0.5 - edit / 1000 for edit in range(15)])
    assert "weight-shrunk" in {finding.rule for finding in found.findings}
    assert found.cause != "weights-decayed"


def test_a_weight_that_was_zero_cannot_shrink() -> None:
    rows = [{("weight.norm", A): norm} for norm in (0.0, 0.0, 1.0, 0.9)]
    assert not diagnose(row(edit, readings) for edit, readings in enumerate(rows)).findings


def test_a_loop_with_a_weight_decay_that_eats_the_weights(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=10.0)
    with sl.attach(model, "3", tmp_path / "run", canary=CANARY, announce=False) as monitor:
        for _ in range(40):
            with monitor.edit():
                optimizer.zero_grad()
                model(torch.randn(2, 5, 8)).square().mean().backward()
                optimizer.step()
    found = sl.load(tmp_path / "run").diagnosis()
    assert "weights-decayed" in {found.cause, *(link.cause for link in found.causes)}
