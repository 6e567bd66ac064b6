"""Processes that meet before they exchange anything, as threads over one store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from stabilitylab.watching import rendezvous
from stabilitylab.watching.rendezvous import Rendezvous

if not dist.is_available():
    pytest.skip("needs a torch with torch.distributed", allow_module_level=True)

LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.2)
Does = Callable[[Rendezvous], object]


def told(one: Rendezvous, does: Does) -> object:
    try:
        return does(one)
    except RuntimeError as error:
        return str(error).partition(";")[0]


def at(place: str, figures: int = 3, patience: timedelta = LONG) -> Does:
    return lambda one: one.all_at(place, figures, patience)


class Processes:
    """Several of them, each of which does one thing after the other."""

    def __init__(self, count: int) -> None:
        self.store, self.pool = dist.HashStore(), ThreadPoolExecutor(count)
        self.all = [Rendezvous(self.store, rank, range(count), timedelta(minutes=1)) for rank in range(count)]
        for one in self.all:  # of one program each
            one._name = "here"

    def do(self, *does: Does) -> list[object]:
        """What each of them is told."""
        return list(self.pool.map(told, self.all, does))


def test_all_are_there_and_nothing_is_left_of_what_was_said() -> None:
    three = Processes(3)
    for edit in range(20):
        assert three.do(*[at(f"edit {edit}")] * 3) == [True] * 3
    assert three.store.num_keys() <= 2 * (3 + 1)


def test_one_that_stays_away_keeps_nobody_waiting_and_comes_again() -> None:
    three = Processes(3)
    failed: Does = lambda one: one.stays_away()  # noqa: E731
    assert three.do(at("edit 1"), failed, at("edit 1")) == [False, None, False]
    assert three.do(*[at("edit 2")] * 3) == [True] * 3
    assert three.do(*[failed] * 3) == [None] * 3
    assert three.do(*[at("edit 4")] * 3) == [True] * 3


def test_who_does_not_come_is_named_and_may_not_go_on_alone() -> None:
    three = Processes(3)
    says = "process 1 did not come to edit 1 within 0.2 s"
    assert three.do(at("edit 1", 3, SHORT), lambda _: None, at("edit 1")) == [says, None, says]
    assert three.do(lambda _: None, at("edit 1"), lambda _: None) == [None, says, None]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (at("the end"), "process 0 is at edit 1 with 3 figures, process 1 at the end with 3 figures"),
        (at("edit 1", 4), "process 0 is at edit 1 with 3 figures, process 1 at edit 1 with 4 figures"),
        (lambda one: one.leaves(), "process 1 left the loop before edit 1"),
    ],
)
def test_who_is_elsewhere_is_said(other: Does, says: str) -> None:
    assert Processes(2).do(at("edit 1"), other)[0] == says


def test_who_is_waited_for_is_said_while_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "SAID_AFTER", timedelta(0))
    with caplog.at_level(logging.WARNING, "stabilitylab"):
        Processes(2).do(at("edit 1", 3, SHORT), lambda _: None)
    assert [record.getMessage() for record in caplog.records] == [
        "stabilitylab: waiting for process 1 at edit 1; expected monitor.edit on each process that the weights are "
        "spread over, as often on each"
    ]


def test_nobody_is_waited_for_longer_than_half_of_what_the_loop_allows() -> None:
    one = Rendezvous(dist.HashStore(), 0, (0, 1), timedelta(seconds=0.4))
    assert told(one, at("edit 1")) == "process 1 did not come to edit 1 within 0.2 s"
