"""Steps up the model's own loss, by what rows say of the objective's weight and of the optimizer."""

from __future__ import annotations

import pytest

from stabilitylab.record.readings import MODEL_SITE, Key
from tests.synthetic_runs import diagnose, row

A = "decoder.layers.1.fc1"


def caused(weight: float, ascends: float | None, growth: float = 1.5) -> str:
    """The first cause of a run that is lost at its end, of which every edit says so much."""
    rows = [row(0, {("canary.kl", MODEL_SITE): 0.0})]
    for edit in range(1, 13):
        readings: dict[Key, float] = {
            ("update.norm", A): 0.1,
            ("update.ratio", A): 0.01,
            ("drift.norm", A): 0.1 * edit,
            ("drift.ratio", A): 0.01 * edit,
            ("logits.loss", MODEL_SITE): growth**edit,
            ("logits.loss_weight", MODEL_SITE): weight,
            ("canary.kl", MODEL_SITE): 9.0 if edit > 9 else 0.1,
        }
        if ascends is not None:
            readings["gradient.ascends", A] = ascends
        rows.append(row(edit, readings))
    return diagnose(rows).cause


@pytest.mark.parametrize(("weight", "ascends"), [(-1.0, None), (-1e-3, 0.0), (1.0, 1.0)])
def test_a_step_up(weight: float, ascends: float | None) -> None:
    assert caused(weight, ascends) == "gradient-ascent"
    assert caused(weight, ascends, growth=1.0) != "gradient-ascent"


@pytest.mark.parametrize(("weight", "ascends"), [(1.0, None), (1.0, 0.0), (-1.0, 1.0), (0.0, None)])
def test_a_step_down(weight: float, ascends: float | None) -> None:
    assert caused(weight, ascends) != "gradient-ascent"
