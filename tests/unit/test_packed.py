"""A packed row behaves like the dict of arrays that it stands for, and rows of one file share their frames."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.record.packed import Frame, PackedReadings
from stabilitylab.record.packing import Unpacker, pack
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import load
from stabilitylab.record.store import RunWriter

KEYS = (("update.norm", "a"), ("gradient.spectrum", "a"), ("update.norm", "b"))
PLAIN = {KEYS[0]: np.array([1.0]), KEYS[1]: np.array([3.0, 2.0]), KEYS[2]: np.array([np.inf])}


def packed(
    *values: float, keys: tuple[tuple[str, str], ...] = KEYS, sizes: tuple[int, ...] = (1, 2, 1)
) -> PackedReadings:
    return PackedReadings(Frame(keys, np.array(sizes, dtype=np.intp)), np.array(values))


def test_it_reads_like_the_dict_that_it_stands_for() -> None:
    found = packed(1.0, 3.0, 2.0, np.inf)
    assert list(found) == list(PLAIN)
    assert len(found) == 3
    assert found == PLAIN
    assert PLAIN == found  # noqa: SIM300 - a dict asks first
    assert repr(found) == repr(PLAIN)
    assert KEYS[1] in found
    assert ("update.norm", "c") not in found
    assert found.get(("update.norm", "c")) is None
    with pytest.raises(KeyError):
        found["update.norm", "c"]


def test_equality_heeds_every_value_and_not_the_order() -> None:
    found = packed(1.0, 3.0, 2.0, np.inf)
    assert found == packed(np.inf, 1.0, 3.0, 2.0, keys=(KEYS[2], KEYS[0], KEYS[1]), sizes=(1, 1, 2))
    assert found != packed(1.0, 3.0, 9.0, np.inf)
    assert found != packed(1.0, 3.0, 2.0, keys=KEYS[:2], sizes=(1, 2))
    assert found != packed(1.0, 3.0, 2.0, np.inf, sizes=(1, 1, 2))
    assert found != 3
    unsure = packed(np.nan, 3.0, 2.0, np.inf)
    assert unsure == unsure  # noqa: PLR0124
    assert unsure != packed(np.nan, 3.0, 2.0, np.inf)


def test_what_was_read_can_not_be_changed_by_a_reader() -> None:
    found = packed(1.0, 3.0, 2.0, np.inf)
    with pytest.raises(ValueError, match="read-only"):
        found[KEYS[1]][0] = 7.0
    with pytest.raises(TypeError):
        found[KEYS[1]] = np.zeros(2)  # type: ignore[index]
    with pytest.raises(TypeError):
        hash(found)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_it_is_copied_and_sent_whole(clone: object) -> None:
    found = packed(1.0, 3.0, 2.0, np.inf)
    assert callable(clone)
    assert clone(found) == found


def test_rows_with_the_same_readings_share_a_frame_and_no_others_do() -> None:
    layout = (("update.norm", "a", 1), ("gradient.spectrum", "a", 3), ("update.norm", "b", 1))
    unpack = Unpacker({1: layout, 2: layout[:2]})

    def frame(number: int, **readings: list[float]) -> Frame:
        keys = {"a": layout[0][:2], "s": layout[1][:2], "b": layout[2][:2]}
        given = {keys[name]: np.array(values) for name, values in readings.items()}
        found = unpack(number, *pack(given, layout if number == 1 else layout[:2]))
        assert found == given
        return found.frame

    whole = frame(1, a=[1.0], s=[1.0, 2.0, 3.0], b=[0.0])
    assert frame(1, a=[7.0], s=[np.inf, 2.0, 3.0], b=[1.0]) is whole
    sparse = frame(1, a=[1.0])
    assert frame(1, a=[1.0], s=[1.0, 2.0], b=[0.0]) is not whole
    assert frame(2, a=[1.0], s=[1.0, 2.0, 3.0]) is not whole
    assert frame(1, a=[2.0]) is sparse


def test_a_row_whose_values_do_not_fit_its_layout_holds_those_that_do() -> None:
    layout = (("m", "a", 1), ("m", "b", 2))
    present, data = pack({("m", "a"): np.array([1.0]), ("m", "b"): np.array([2.0, 3.0])}, layout)
    unpack = Unpacker({1: layout, 2: layout[:1]})
    assert unpack(1, present, data[:16]) == {("m", "a"): np.array([1.0]), ("m", "b"): np.array([2.0])}
    assert unpack(1, present, data) == {("m", "a"): np.array([1.0]), ("m", "b"): np.array([2.0, 3.0])}
    assert unpack(2, present, data) == {("m", "a"): np.array([1.0])}


def test_a_layout_that_names_a_reading_twice_is_refused() -> None:
    layout = (("m", "a", 1), ("m", "a", 1))
    with pytest.raises(ValueError, match="twice"):
        Unpacker({1: layout})(1, b"\xff", np.ones(2).tobytes())


def test_series_of_readings_that_alternate(tmp_path: Path) -> None:
    metrics = [Metric("n", "", "log", "after", "", "", ""), Metric("s", "", "log", "after", "", "", "", 3)]
    writer = RunWriter(tmp_path / "run", {}, metrics)
    for edit in range(6):
        readings = {("n", "a"): np.array([float(edit)])}
        if edit % 3 == 1:
            readings = {("s", "a"): np.arange(edit, dtype=np.float64)[:4], **readings}
        writer.append(EditRow(edit, "", "applied", 0.0, 0.0, 0.0, 0.0, None, readings))
    writer.close()
    run = load(tmp_path / "run")
    np.testing.assert_array_equal(run.series("n"), np.arange(6.0))
    np.testing.assert_array_equal(run.present("s"), [False, True, False, False, True, False])
    missing = [np.nan] * 4
    expected = [missing, [0.0, np.nan, np.nan, np.nan], missing, missing, [0.0, 1.0, 2.0, 3.0], missing]
    np.testing.assert_array_equal(run.series("s"), expected)


def test_sites_are_those_of_the_edits_and_not_of_dry_edits_alone(tmp_path: Path) -> None:
    metrics = [Metric("n", "", "log", "after", "", "", "")]
    writer = RunWriter(tmp_path / "run", {}, metrics)

    def row(edit: int, *sites: str) -> EditRow:
        readings = {("n", site): np.ones(1) for site in sites}
        return EditRow(edit, "", "applied", 0.0, 0.0, 0.0, 0.0, None, readings)

    writer.append_dry([row(1, "a", "dry")])
    for edit, sites in enumerate(["b", "ba", "bc", "b"]):
        writer.append(row(edit, *sites))
    writer.close()
    run = load(tmp_path / "run")
    assert run.sites == run.sites_of("n") == ("b", "a", "c")
