"""What is said of edits without effect: from how many on, and in which words."""

from __future__ import annotations

import pytest

from stabilitylab.analysis.landing import Landing


def lost(tried: int, landed: int, lost: int, **more: object) -> Landing:
    return Landing(tried=tried, landed=landed, lost=lost, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("landing", "kind"),
    [(lost(0, 0, 0), None), (lost(3, 3, 0), "all"), (lost(3, 1, 1), "some"), (lost(3, 0, 3), "none")],
)
def test_all_some_or_none_of_the_edits(landing: Landing, kind: str | None) -> None:
    assert landing.kind == kind


@pytest.mark.parametrize(
    ("landing", "nothing"),
    [
        (lost(3, 0, 3), True),
        (lost(2, 0, 2), False),  # an edit that moves nothing may have had nothing to do
        (lost(2, 0, 2, failed=2), True),
        (lost(2, 0, 2, failed=1), False),
        (lost(0, 0, 0), False),
        (lost(30, 20, 10), True),
        (lost(29, 20, 9), False),
        (lost(12, 9, 3), False),
        (lost(9, 0, 9, gap=5), False),  # it waits for its step
        (lost(10, 0, 10, gap=5), True),
        (lost(9, 0, 9, gap=5, failed=1), True),
        (lost(9, 0, 9, gap=5, written=1), True),
        (lost(9, 0, 9, gap=1), True),
    ],
)
def test_nothing_lands_when_none_of_the_last_ten_did_or_of_fewer_all_did_not(landing: Landing, nothing: bool) -> None:
    assert landing.nothing_lands == nothing


@pytest.mark.parametrize(
    ("landing", "mostly"),
    [
        (lost(10, 4, 1), True),
        (lost(10, 5, 1), False),
        (lost(9, 4, 1), False),
        (lost(10, 4, 1, gap=2), False),
        (lost(10, 4, 4, gap=2), True),
        (lost(3, 0, 3), True),
    ],
)
def test_mostly_lost_is_not_even_half_of_ten_or_more(landing: Landing, mostly: bool) -> None:
    assert landing.mostly_lost == mostly


@pytest.mark.parametrize(
    ("landing", "says"),
    [
        (lost(10, 10, 0), ""),
        (lost(4, 0, 4), "None of 4 edits moved a watched layer"),
        (lost(4, 0, 4, whole=True), "None of 4 edits moved any parameter of the model"),
        (lost(30, 20, 10), "None of the last 10 edits moved a watched layer"),
        (lost(10, 4, 1), "Only 4 of 10 edits moved a watched layer"),
        (
            lost(10, 4, 1, failed=6, words="KeyError: x"),
            "Only 4 of 10 edits were carried out, the others raised (KeyError: x)",
        ),
        (lost(10, 4, 1, failed=5), "Only 4 of 10 edits moved a watched layer"),
        (lost(1, 0, 1, failed=1), "The only edit raised an exception"),
        (lost(2, 0, 2, failed=2), "None of 2 edits was carried out: each raised an exception"),
        (
            lost(30, 20, 10, failed=10, words="KeyError: x"),
            "None of the last 10 edits was carried out: each raised an exception (KeyError: x)",
        ),
        (lost(30, 19, 10, failed=10), "None of the last 10 edits moved a watched layer"),
    ],
)
def test_it_is_said_in_one_sentence(landing: Landing, says: str) -> None:
    assert landing.says == says
