"""What the weights do right now, as far as it sets the canary's pace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from stabilitylab.analysis.pace import ENOUGH, LEAPS, MOVES, WINDOW, Movement, Pace

STILL, MOVING, LEAPING = Movement(False, False), Movement(True, False), Movement(True, True)


def after(updates: Sequence[float], pace: Pace | None = None) -> list[Movement]:
    """What is said at each of one site's updates."""
    pace = pace or Pace()
    return [pace.observe({"w": update}) for update in updates]


def test_before_anything_is_known_all_is_movement() -> None:
    assert Pace().now == MOVING
    assert after([1.0] * (ENOUGH + 2)) == [MOVING] * ENOUGH + [STILL] * 2


def test_an_update_is_compared_with_the_usual_one() -> None:
    usual = [2.0] * ENOUGH
    assert after([*usual, 2 * MOVES])[-1] == STILL
    assert after([*usual, 2.02 * MOVES])[-1] == MOVING
    assert after([*usual, 2 * LEAPS])[-1] == MOVING
    assert after([*usual, 2.02 * LEAPS])[-1] == LEAPING
    assert after([*usual, 0.0])[-1] == STILL


def test_what_is_usual_is_the_median_of_the_last_ones() -> None:
    grown = [1.0] * WINDOW + [4.0] * WINDOW
    assert after(grown)[WINDOW] == MOVING
    assert after([*grown, 4.0])[-1] == STILL
    assert after([*grown, 1.0])[-1] == STILL  # a smaller one is no movement


def test_edits_that_leave_a_weight_alone_do_not_count() -> None:
    """A loop over several layers in turn: each stands still most of the time, and moves as it always does."""
    pace = Pace()
    said = [pace.observe({f"w{i}": float(i == edit % 5) for i in range(5)}) for edit in range(40)]
    assert said[5 * ENOUGH :] == [STILL] * (40 - 5 * ENOUGH)
    assert after([0.0] * 3) == [STILL] * 3


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_weight_that_is_lost_leaps_once(lost: float) -> None:
    assert after([lost, lost, lost]) == [LEAPING, MOVING, MOVING]
    assert after([1.0] * 5 + [lost, lost, 1.0, lost])[5:] == [LEAPING, MOVING, STILL, LEAPING]


def test_growth_without_end_leaps_once_and_is_movement_from_then_on() -> None:
    said = after([10.0**edit for edit in range(20)])
    assert said == [MOVING] * ENOUGH + [LEAPING] + [MOVING] * (20 - ENOUGH - 1)


def test_one_site_is_enough_and_another_one_leaps_anew() -> None:
    pace = Pace()
    for _ in range(ENOUGH):
        pace.observe({"a": 1.0, "b": 100.0})
    assert pace.observe({"a": 1.0, "b": 100.0}) == STILL
    assert pace.observe({"a": 9.0, "b": 100.0}) == LEAPING
    assert pace.observe({"a": 9.0, "b": math.nan}) == LEAPING
    assert pace.now == LEAPING


def test_no_site_is_no_movement() -> None:
    assert Pace().observe({}) == STILL
