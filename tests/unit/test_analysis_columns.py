"""Rows as flat arrays: what they hold is told apart by schema, whichever way a row is kept."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.analysis.columns import MOST_SCHEMAS, SCHEMAS, Before, Columns, First, PerSchema, Schema
from stabilitylab.analysis.trends import medians
from stabilitylab.record.packing import Unpacker, pack
from stabilitylab.record.readings import EditRow

LAYOUT = (("m", "a", 1), ("s", "a", 3), ("m", "b", 1), ("m", "c", 1))


def row(**readings: list[float]) -> EditRow:
    keys = {"a": ("m", "a"), "s": ("s", "a"), "b": ("m", "b"), "c": ("m", "c")}
    arrays = {keys[name]: np.array(values) for name, values in readings.items()}
    return EditRow(1, "", "applied", 0.0, 0.0, 0.0, 0.0, readings=arrays)


ROWS = [
    row(a=[1.0], s=[1.0, np.nan, 3.0], b=[np.inf]),
    row(a=[2.0], s=[np.inf], b=[0.0]),
    row(a=[2.0]),
    row(c=[2.0]),
    row(),
    row(a=[3.0], b=[1.0]),
    row(a=[1.0], s=[1.0, 2.0, 3.0], b=[1.0]),
]


@given(st.lists(st.tuples(st.sampled_from(ROWS), st.booleans()), max_size=12))
def test_a_packed_row_is_flattened_like_the_dict_that_it_stands_for(chosen: list[tuple[EditRow, bool]]) -> None:
    plain, mixed, unpack = Columns([]), Columns([]), Unpacker({1: LAYOUT})
    for one, packs in chosen:
        other = replace(one, readings=unpack(1, *pack(one.readings, LAYOUT))) if packs else one
        expected, found = plain.flatten(one), mixed.flatten(other)
        assert found.schema.keys == expected.schema.keys == tuple(one.readings)
        for name in ("places", "values", "finite"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert plain.keys == mixed.keys


def test_rows_of_the_same_readings_share_a_schema_though_others_come_between() -> None:
    columns = Columns([])
    first, other, again = (columns.flatten(ROWS[at]) for at in (0, 2, 1))
    assert again.schema is first.schema
    assert other.schema is not first.schema
    assert other.schema is not first.schema
    assert again.schema is first.schema is columns.flatten(ROWS[0]).schema


def test_what_follows_from_a_schema_is_worked_out_once_and_forgotten_with_it() -> None:
    columns, seen = Columns([]), []

    def work_out(schema: Schema) -> int:
        seen.append(schema.keys)
        return len(schema.keys)

    many = PerSchema(work_out)
    for _ in range(3):
        assert [many.of(columns.flatten(one).schema) for one in (ROWS[0], ROWS[2])] == [3, 1]
    assert len(seen) == 2
    for number in range(3 * MOST_SCHEMAS):
        many.of(columns.flatten(reading(number)).schema)
    gc.collect()
    assert len(many._known) <= MOST_SCHEMAS + 1


def reading(number: int) -> EditRow:
    return EditRow(1, "", "applied", 0, 0, 0, 0, readings={("m", str(number)): np.ones(1)})


@pytest.mark.parametrize(("keys", "times"), [(1 << 18, 1), (10, 5)])
def test_many_small_sets_that_alternate_are_worked_out_once_and_many_large_ones_are_not_all_kept(
    monkeypatch: pytest.MonkeyPatch, keys: int, times: int
) -> None:
    monkeypatch.setattr(sys.modules[Columns.__module__], "KEYS", keys)
    columns, worked = Columns([]), []

    def work_out(schema: Schema) -> int:
        worked.append(schema)
        return len(worked)

    many = PerSchema(work_out)
    for _ in range(5):
        for number in range(2 * SCHEMAS):
            flat = columns.flatten(reading(number))
            assert columns.keys[flat.places[0]] == ("m", str(number))
            many.of(flat.schema)
    assert len(worked) == times * 2 * SCHEMAS


def test_the_first_value_of_each_place_stays() -> None:
    first = First()
    np.testing.assert_array_equal(first.of(np.array([3, 1]), np.array([7.0, 5.0])), [7.0, 5.0])
    np.testing.assert_array_equal(first.of(np.array([1, 8, 3]), np.array([0.0, 2.0, 0.0])), [5.0, 2.0, 7.0])
    assert first.of(np.array([], dtype=np.intp), np.zeros(0)).size == 0


def test_only_the_row_before_is_remembered() -> None:
    before = Before()
    read, _ = before.swap(np.array([4, 2]), np.array([1.0, np.nan]))
    assert not read.any()
    read, was = before.swap(np.array([2, 9, 4]), np.array([3.0, 5.0, 6.0]))
    assert read.tolist() == [True, False, True]
    np.testing.assert_array_equal(was, [np.nan, np.nan, 1.0])
    read, was = before.swap(np.array([2, 9, 4]), np.zeros(3))
    assert read.all()
    np.testing.assert_array_equal(was, [3.0, 5.0, 6.0])
    before.swap(np.array([], dtype=np.intp), np.zeros(0))
    assert not before.swap(np.array([2]), np.ones(1))[0].any()


@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_medians_are_numpys(points: int) -> None:
    values = np.random.default_rng(points).normal(size=(50, points))
    np.testing.assert_array_equal(medians(values), np.median(values, axis=1))
