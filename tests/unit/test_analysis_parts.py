"""Small parts of the analysis, by value: words, what is put back, what holds still, what gives reason to look."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stabilitylab.analysis import Finding
from stabilitylab.analysis.alertness import gives_reason
from stabilitylab.analysis.columns import Before, First, Once
from stabilitylab.analysis.grouping import grouped
from stabilitylab.analysis.pace import Movement, Pace
from stabilitylab.analysis.restoring import Restoring, means_single_edits
from stabilitylab.analysis.steadiness import Steadiness
from stabilitylab.analysis.survival import survival
from stabilitylab.analysis.words import listed, number, place_name
from stabilitylab.record.readings import EditRow
from tests.synthetic_runs import diagnose, row

A, B = "decoder.layers.1.fc1", "decoder.layers.1.fc2"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "NaN"),
        (math.inf, "infinite"),
        (-math.inf, "minus infinity"),
        (0.0, "0"),
        (300.0, "300"),
        (-12.0, "-12"),
        (99_999.0, "99,999"),
        (1e5, "1e5"),
        (-1e5, "-1e5"),
        (0.0321, "0.0321"),
        (3.2e5, "3.2e5"),
        (3.2e-5, "3.2e-5"),
        (1e-10, "1e-10"),
        (1.5e120, "1.5e120"),
        (1234.5, "1.23e3"),
    ],
)
def test_a_number_for_a_reader(value: float, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("indices", "count", "words"),
    [
        ([17.0], 1, "unit 17"),
        ([17.0, 80.0], 2, "units 17 and 80"),
        ([1.0, 2.0, 3.0], 3, "units 1, 2 and 3"),
        ([17.0, 80.0], 5, "units 17, 80 and 3 more"),
        ([17.0], 2, "units 17 and 1 more"),
        ([], 4, "units 4 more"),
    ],
)
def test_some_of_many(indices: list[float], count: int, words: str) -> None:
    assert listed("unit", indices, count) == words
    assert place_name("model") == "the model"
    assert place_name(A) == A


@pytest.mark.parametrize(("more", "words"), [(0, ""), (1, ", and at 1 more site"), (2, ", and at 2 more sites")])
def test_other_sites_are_counted(more: int, words: str) -> None:
    found = Finding("growth", "update.norm", A, 3, 3.0, 1.0, "x", "diverging", usual=1.0, more_sites=more)
    (group,) = grouped([found])
    assert group.says == f"update 3 times usual, growing faster than edits add up{words}"


@pytest.mark.parametrize(("sites", "words"), [(3, ""), (4, " (And at 1 more site.)"), (5, " (And at 2 more sites.)")])
def test_three_sites_are_named_and_the_others_counted(sites: int, words: str) -> None:
    bad = {("weight.nonfinite", f"layer.{site}"): 5.0 for site in range(sites)}
    found = diagnose([row(0, {}), row(1, bad)]).findings
    assert [finding.site for finding in found] == ["layer.0", "layer.1", "layer.2"]
    assert found[-1].says == f"5 weights of layer.2 are NaN or infinite at edit 1.{words}"
    assert [finding.more_sites for finding in found] == [0, 0, sites - 3]


def test_an_updates_pace_by_numbers() -> None:
    """More than one and a half times the median of the last eight moves, more than five times leaps."""

    def last(*updates: float) -> Movement:
        pace = Pace()
        return [pace.observe({"w": update}) for update in updates][-1]

    assert last(1.0, 1.0, 1.0) == Movement(True, False)  # until three edits were seen
    assert last(1.0, 1.0, 1.0, 1.5) == Movement(False, False)
    assert last(1.0, 1.0, 1.0, 1.51) == Movement(True, False)
    assert last(1.0, 1.0, 1.0, 5.0) == Movement(True, False)
    assert last(1.0, 1.0, 1.0, 5.01) == Movement(True, True)
    assert last(*[9.0] * 4, *[1.0] * 4, 7.5) == Movement(False, False)  # the median of eight is 5
    assert last(*[9.0] * 4, *[1.0] * 5, 1.51) == Movement(True, False)
    assert last(1.0, 1.0, 1.0, -1.0) == Movement(False, False)


@pytest.mark.parametrize(
    ("config", "single"),
    [
        ({"sequential_edit": False}, True),
        ({"sequential_edit": True}, False),
        ({"sequential_edit": 0}, False),
        ({}, False),
    ],
)
def test_a_configuration_that_means_single_edits(config: dict[str, object], single: bool) -> None:
    assert means_single_edits(config) == single


class TestRestoring:
    """Edits of size 1 at two layers, and how far from their originals that left them."""

    @staticmethod
    def after(*drifts: tuple[float, float]) -> Restoring:
        restoring = Restoring()
        for edit, pair in enumerate(drifts, start=1):
            restoring.follow(edit, (A, B), np.ones(2), np.array(pair))
        return restoring

    def test_the_last_that_was_restored_once_three_were_and_three_were_not(self) -> None:
        back, on = (1.0, 1.0), (3.0, 3.0)
        assert self.after(back, back, back, back, on, on, on).until == 4
        assert self.after(back, back, back, back, on, on).until is None
        assert self.after(back, back, back, on, on, on).until is None  # of the first edit it says nothing
        assert self.after(back, *[back] * 3, on, on, back, on, on, on).until == 7
        assert self.after(back, *[back] * 3, on, on, on, back, on, on, on).until == 4
        assert self.after(back, back, back, back).restored == 3

    def test_how_many_built_on_those_before_as_long_as_all_did(self) -> None:
        back, on = (1.0, 1.0), (3.0, 3.0)
        assert self.after(back, on, on).carried == 2
        assert self.after(on).carried == 0
        assert self.after(back, on, back, on, on).carried == 0

    def test_a_hundredth_of_the_way_is_the_same(self) -> None:
        assert self.after((1.0, 1.0), (1.0101, 1.0)).restored == 1
        assert self.after((1.0, 1.0), (1.0102, 1.0)).restored == 0
        assert self.after((1.0, 1.0), (0.9902, 1.0)).restored == 1
        assert self.after((1.0, 1.0), (0.99, 1.0)).restored == 0
        assert self.after((1.0, 1.0), (math.inf, 1.0)).restored == 0
        assert self.after((1.0, 1.0), (math.nan, 1.0)).restored == 0

    def test_a_layer_is_forgotten_when_at_five_edits_in_a_row_another_is_put_back(self) -> None:
        edits = [(1.0, 1.0 + edit) for edit in range(7)]
        found = self.after(*edits[:6]).forgotten
        assert found is not None
        assert (found.edit, found.site, found.since) == (6, B, 2)
        assert self.after(*edits[:5]).forgotten is None
        assert self.after(*edits[:4], (1.0, 1.0), *edits[:4]).forgotten is None
        assert self.after(*edits[:4], (9.0, 9.0), *edits[1:5]).forgotten is None
        assert self.after(*edits).forgotten == found

    def test_an_edit_that_moves_nothing_is_none(self) -> None:
        restoring = self.after(*[(1.0, 1.0)] * 3)
        restoring.follow(4, (A, B), np.zeros(2), np.zeros(2))
        assert (restoring.restored, restoring.carried) == (2, 0)


class TestSteadiness:
    """The least spread of one place, edit by edit."""

    @staticmethod
    def after(*stds: float, rows: tuple[float, ...] = ()) -> tuple[str, list[bool]]:
        steadiness, at = Steadiness(), np.array([0])
        said = []
        for edit, std in enumerate(stds):
            counted = np.array([rows[edit] if rows else math.nan])
            runs, first, seen = steadiness.observe(at, np.array([std]), counted)
            said.append(bool(runs[0]))
            assert first[0] == stds[0]
            assert np.array_equal(seen, np.array([rows[0] if rows else math.nan]), equal_nan=True)
        return steadiness.of(0), said

    def test_a_hundredth_is_a_cast_and_more_than_that_is_running(self) -> None:
        assert self.after() == ("", [])
        assert self.after(1.0) == ("", [False])
        assert self.after(1.0, 1.0099) == ("frozen", [False, False])
        assert self.after(1.0, 0.9901, 1.0) == ("frozen", [False, False, False])
        assert self.after(1.0, 1.011, 1.0, 2.0) == ("running", [False, True, False, False])
        assert self.after(0.0, 0.0) == ("frozen", [False, False])
        assert self.after(0.0, 1e-9) == ("running", [False, True])

    def test_rows_that_were_added_are_running_whatever_the_spread(self) -> None:
        assert self.after(1.0, 1.0, rows=(9.0, 10.0)) == ("running", [False, True])
        assert self.after(1.0, 1.0, rows=(9.0, 9.0)) == ("frozen", [False, False])
        assert self.after(1.0, 1.0, rows=(9.0, math.nan)) == ("frozen", [False, False])


@pytest.mark.parametrize(
    ("metric", "value", "speaks"),
    [
        ("weight.nonfinite", 1.0, True),
        ("weight.nonfinite", 0.0, False),
        ("weight.headroom_bits", 3.99, True),
        ("weight.headroom_bits", 4.0, False),
        ("weight.headroom_bits", 17.0, False),
        ("weight.headroom_bits", -math.inf, True),
        ("activation.rms", math.nan, True),
        ("activation.rms", math.inf, True),
        ("activation.rms", 1e30, False),
        ("activation.norm_headroom_bits", 3.9, True),
        ("activation.norm_headroom_bits", 4.0, False),
    ],
)
def test_what_gives_reason_to_look_closer(metric: str, value: float, speaks: bool) -> None:
    calm = diagnose([row(0, {})])
    assert gives_reason(row(3, {(metric, A): value}), calm.findings) == speaks


def test_a_failed_edit_and_a_finding_give_reason_too() -> None:
    here = row(3, {})
    empty = EditRow(3, "", "applied", 0.0, 1.0, 0.0, 0.0, None, {("activation.rms", A): np.zeros(0)})

    def with_finding(edit: int, verdict: str, site: str = A) -> tuple[Finding, ...]:
        return (Finding("x", "m", site, edit, 1.0, 1.0, "", verdict),)  # type: ignore[arg-type]

    assert not gives_reason(here, ())
    assert not gives_reason(empty, ())
    assert gives_reason(row(3, {}, "failed"), ())
    assert gives_reason(here, with_finding(3, "drifting"))
    assert not gives_reason(here, with_finding(2, "drifting"))
    assert not gives_reason(here, with_finding(3, "stable"))
    assert gives_reason(here, with_finding(3, "stable", "editor.mlp.0.u"))


@pytest.mark.parametrize(("away", "undone"), [(20.0, True), (19.0, False)])
def test_a_step_is_undone_where_what_was_before_it_would_show(away: float, undone: bool) -> None:
    """Three large steps, each from the original: the last distance must be a thousandth of the next one to tell."""

    def edit(update: float, drift: float) -> dict[tuple[str, str], float]:
        return {
            ("update.norm", A): update,
            ("drift.norm", A): drift,
            ("drift.ratio", A): drift,
            ("weight.nonfinite", A): 0.0,
        }

    rows = [edit(0.0, 0.0), edit(away, away), edit(2e4, 2e4)]
    rules = [finding.rule for finding in diagnose(row(at, each) for at, each in enumerate(rows)).findings]
    assert ("large-step-undone" in rules) == undone


def test_first_before_and_once() -> None:
    at = np.array
    first = First()
    assert first.of(at([2]), at([5.0])).tolist() == [5.0]
    assert first.of(at([0, 2]), at([7.0, 6.0])).tolist() == [7.0, 5.0]
    assert first.of(at([], dtype=int), at([])).tolist() == []
    before = Before()
    assert before.swap(at([0, 3]), at([1.0, 2.0]))[0].tolist() == [False, False]
    read, was = before.swap(at([3, 4]), at([8.0, 9.0]))
    assert (read.tolist(), was[0], math.isnan(was[1])) == ([True, False], 2.0, True)
    once = Once()
    assert once.new("a", at([1])).tolist() == [True]
    assert once.said("a", at([0, 1, 9])).tolist() == [False, True, False]
    assert once.new("a", at([1, 5])).tolist() == [False, True]
    assert once.new("b", at([1])).tolist() == [True]
    once.forget("a", 1)
    once.forget("a", 99)
    once.forget("c", 0)
    assert once.new("a", at([1, 5])).tolist() == [True, False]


def test_how_long_runs_last_by_hand() -> None:
    """Of five runs two failed at 3, one ended at 3, one failed at 7, one ended at 9."""
    found = survival([3, 3, 3, 7, 9], [True, True, False, True, False])
    assert found.edits == (0, 3, 7, 9)
    assert found.at_risk == (5, 5, 2, 1)
    assert (found.failed, found.ended) == ((0, 2, 1, 0), (0, 1, 0, 1))
    assert found.share == pytest.approx((1.0, 0.6, 0.3, 0.3))
    assert [found.at(edit)[0] for edit in (0, 1, 3, 4, 7, 9, 10)] == [5, 5, 5, 2, 2, 1, 0]
    assert [found.at(edit)[1] for edit in (0, 2, 3, 6, 7, 50)] == pytest.approx([1.0, 1.0, 0.6, 0.6, 0.3, 0.3])
    assert survival([], []).edits == ()
