"""Causes: claimed where the evidence shows them, and not where it does not."""

from __future__ import annotations

import math

from synthetic_runs import diagnose, row

from stabilitylab.analysis import Diagnosis
from stabilitylab.readings import Key

A, U = "decoder.layers.1.fc2", "editor.mlp.0.u"
ACTION = ("restore", "batch", "floor", "bfloat16", "check", "go back", "see whether")
Reading = dict[Key, float]


def run(*edits: Reading) -> Diagnosis:
    diagnosis = diagnose(row(edit, readings) for edit, readings in enumerate(edits))
    assert diagnosis.cause == "unknown" or any(word in diagnosis.advice.lower() for word in ACTION)
    return diagnosis


def editor(largest: float, unit: int, std: float, update: float = 4.0) -> Reading:
    return {
        ("editor.input_max", U): largest,
        ("editor.input_unit", U): float(unit),
        ("editor.input_unit_std", U): std,
        ("update.norm", A): update,
    }


def test_the_reported_case() -> None:
    """FINDINGS.md, section 1: 11, 95, 56, and 3.2e5 at the fatal edit, with a unit whose std is 0."""
    dead = {("weight.nonfinite", A): 300.0, ("update.norm", A): math.inf}
    diagnosis = run(
        {},
        editor(11, 4, 0.1),
        editor(50, 4, 0.1),
        editor(95, 4, 0.1),
        editor(60, 4, 0.1),
        editor(56, 4, 0.1),
        editor(3.2e5, 117, 0.0) | dead,
        editor(2.2e8, 200, 0.1) | dead,
    )
    assert diagnosis.cause == "normaliser-zero-std"
    assert (diagnosis.first_bad_edit, diagnosis.first_bad_site, diagnosis.onset_edit) == (6, U, 6)
    assert diagnosis.says == (
        "Non-finite since edit 6: first in editor.mlp.0.u (editor.input_max) — unit 117 of the editor's frozen"
        " normaliser at editor.mlp.0.u was divided by a std of 0: its normalised input reached 3.2e5 at edit 6."
    )


def test_a_large_input_over_an_ordinary_std_is_not_the_normalisers_fault() -> None:
    assert run({}, editor(11, 4, 0.1), editor(5e4, 117, 0.3)).cause == "unknown"


def test_feedback() -> None:
    growing = [editor(5 * math.exp(0.4 * edit), edit, 0.3, math.exp(0.5 * edit)) for edit in range(12)]
    diagnosis = run({}, *growing, {("weight.nonfinite", A): 4.0})
    assert diagnosis.cause == "feedback-growth"
    assert "restore the weights" in diagnosis.advice.lower()


def test_growing_inputs_without_growing_updates_are_no_feedback() -> None:
    growing = [editor(5 * math.exp(0.4 * edit), edit, 0.3, 1.0 + 0.01 * (edit % 3)) for edit in range(12)]
    assert run({}, *growing, {("weight.nonfinite", A): 4.0}).cause == "unknown"


def test_feedback_is_remembered_when_the_run_saturates() -> None:
    growing = [editor(5 * math.exp(0.4 * edit), edit, 0.3, math.exp(0.5 * edit)) for edit in range(20)]
    assert run({}, *growing, *[growing[-1]] * 60).cause == "feedback-growth"


def weights(largest: float, limit: float) -> Reading:
    bits = math.log2(limit / largest) if math.isfinite(largest) else -math.inf
    return {
        ("weight.max_abs", A): largest,
        ("weight.headroom_bits", A): bits,
        ("weight.nonfinite", A): 0.0 if math.isfinite(largest) else 8.0,
    }


def test_overflow_of_float16() -> None:
    for steps in ([0.3, 900.0, 3e4], [0.3, 0.4, math.inf]):
        diagnosis = run(*[weights(largest, 65_504.0) for largest in steps])
        assert (diagnosis.cause, diagnosis.first_bad_site) == ("dtype-overflow", A)


def test_the_dtype_is_not_blamed_without_evidence() -> None:
    wide = [weights(largest, 3.4e38) for largest in (0.3, 900.0, math.inf)]
    assert run(*wide).cause == "unknown"
    nan = weights(0.3, 65_504.0) | {("weight.max_abs", A): math.nan, ("weight.nonfinite", A): 8.0}
    assert run(weights(0.3, 65_504.0), nan).cause == "unknown"  # NaN, not infinite: something else made it
    first = {("activation.nonfinite", A): 3.0} | weights(math.inf, 65_504.0)
    assert run(weights(0.3, 65_504.0), first).cause == "unknown"


def test_a_stable_run_needs_no_cause() -> None:
    diagnosis = run({}, *[editor(5.0, 4, 0.1)] * 20)
    assert (diagnosis.cause, diagnosis.cause_says, diagnosis.advice) == ("unknown", "", "")
