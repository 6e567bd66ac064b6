"""Every rule of causes: claimed in its words, at its limits and not beyond them, and never of nothing."""

from __future__ import annotations

from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Evidence, Place
from stabilitylab.analysis.causes.precedence import RULES
from tests.causes import algebra, dtypes, growth, inputs, scaling
from tests.causes.case import BAD, EMPTY, STEP, B, Case, M, bad, check_limits, check_words, claimed, every

CASES = (*algebra.CASES, *inputs.CASES, *dtypes.CASES, *growth.CASES, *scaling.CASES)


@every(CASES)
def test_it_is_claimed_in_these_words(case: Case) -> None:
    check_words(case)


@every(CASES)
def test_it_is_claimed_at_its_limits_and_not_beyond_them(case: Case) -> None:
    check_limits(case)


def test_nothing_is_claimed_of_nothing() -> None:
    assert claimed({}) == {}


def test_each_cause_has_a_case() -> None:
    assert {case.cause for case in CASES} == {rule.name for rule in RULES}


def test_the_whole_models_first_bad_reading_names_the_weight_that_was_furthest() -> None:
    moved = replace(BAD, site=M, metric="canary.kl")
    evidence = Evidence(**{**EMPTY, **bad(moved), "steps": (STEP,)})
    assert evidence.furthest == Place(5, "drift.ratio", B, 0.4)
    assert evidence.step == STEP
    for change in (
        {"steps": (replace(STEP, drift_ratio=0.0),)},
        {"steps": ()},
        {"first_bad": BAD},
        {"first_bad": None},
    ):
        assert Evidence(**{**EMPTY, **bad(moved), "steps": (STEP,), **change}).furthest is None
