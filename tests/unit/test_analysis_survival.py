"""The survival of runs, against the product that Kaplan and Meier define."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import CensoredData, ecdf

from stabilitylab.analysis.survival import survival


def by_hand(last: list[int], failed: list[bool], edit: int) -> Fraction:
    """∏ (1 − failed there / at risk there) over the edits at which runs failed, up to `edit`."""
    share = Fraction(1)
    for at in sorted({time for time, bad in zip(last, failed, strict=True) if bad and time <= edit}):
        there = sum(bad and time == at for time, bad in zip(last, failed, strict=True))
        share *= 1 - Fraction(there, sum(time >= at for time in last))
    return share


def _of(last: list[int], failed: list[bool], which: bool) -> list[int]:
    return [time for time, bad in zip(last, failed, strict=True) if bad == which]


@pytest.mark.parametrize(
    ("last", "failed"),
    [
        ([26, 49, 100], [True, True, False]),
        ([5, 5, 5, 9, 12], [True, True, False, False, True]),
        ([7, 7], [False, False]),
        ([1], [True]),
        ([0, 3], [True, False]),
    ],
)
def test_the_share_that_holds_is_the_product_of_the_shares_that_did_not_fail(
    last: list[int], failed: list[bool]
) -> None:
    curve = survival(last, failed)
    assert curve.edits == tuple(sorted({0, *last}))
    assert curve.share == pytest.approx([float(by_hand(last, failed, edit)) for edit in curve.edits])
    known = ecdf(CensoredData(uncensored=_of(last, failed, True), right=_of(last, failed, False))).sf
    assert curve.share == pytest.approx(known.evaluate(np.array(curve.edits, dtype=float)))
    assert curve.at_risk == tuple(sum(time >= edit for time in last) for edit in curve.edits)
    assert sum(curve.failed) == sum(failed)
    assert sum(curve.ended) == len(failed) - sum(failed)


def test_a_run_that_ended_while_it_held_lowers_nothing() -> None:
    assert survival([10, 20], [False, True]).share == (1.0, 1.0, 0.0)


def test_between_two_steps_it_is_what_it_was_and_those_count_that_are_still_watched() -> None:
    curve = survival([26, 49, 100], [True, True, False])
    told = [curve.at(edit) for edit in (0, 25, 26, 27, 49, 60, 100, 101)]
    assert [risk for risk, _ in told] == [3, 3, 3, 2, 2, 1, 1, 0]
    assert [share for _, share in told] == pytest.approx([1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_of_no_run_there_is_no_curve() -> None:
    assert survival([], []).edits == ()
