"""Every rule of causes has cases, and none claims anything of nothing."""

from __future__ import annotations

from stabilitylab.analysis.causes.precedence import RULES
from tests.cause_cases import claimed
from tests.unit import (
    test_analysis_causes_algebra,
    test_analysis_causes_dtypes,
    test_analysis_causes_growth,
    test_analysis_causes_inputs,
)


def test_nothing_is_claimed_of_nothing() -> None:
    assert claimed({}) == {}


def test_each_cause_has_a_case() -> None:
    files = (
        test_analysis_causes_algebra,
        test_analysis_causes_dtypes,
        test_analysis_causes_growth,
        test_analysis_causes_inputs,
    )
    assert {case.cause for file in files for case in file.CASES} == {rule.name for rule in RULES}
