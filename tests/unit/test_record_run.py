"""What is read of a run, and by a follower of one that grows, against what was written: every field, by value."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabilitylab.errors import RunError, UsageError
from stabilitylab.record import run as run_module
from stabilitylab.record.acknowledged import acknowledge
from stabilitylab.record.following import Follower
from stabilitylab.record.note_kinds import LOST_ROWS
from stabilitylab.record.readings import Alarm, EditRow, Metric, Note
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import FILE_NAME, LABEL_LIMIT, RunWriter, plain_text

NORM = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
SPECTRUM = Metric("gradient.spectrum", "1", "log", "during", "values", "σ", "—", 4)
NEVER = Metric("drift.norm", "1", "log", "after", "size", "‖Δ‖", "—")
SITES = ["fc2", "fc1", "fc3"]
"""In dataflow order, which is not that of the readings."""


def row(edit: int, read: dict[tuple[str, str], list[float]], **more: Any) -> EditRow:
    readings = {key: np.array(values, dtype=np.float64) for key, values in read.items()}
    known: dict[str, Any] = {"status": "applied" if edit else "start", "started": 100.0 + 3.0 * edit, "seconds": 2.0}
    known |= {"probe_seconds": 0.5, "canary_seconds": 0.25, "trace_seconds": 0.125, "error": None, **more}
    return EditRow(edit, f"edit {edit}", readings=readings, **known)


def writer(folder: Path, **manifest: Any) -> RunWriter:
    return RunWriter(folder, {"sites": SITES, "created": "now", "closed": False, **manifest}, [NORM, SPECTRUM, NEVER])


N1, N2, LM, S1 = ("update.norm", "fc1"), ("update.norm", "fc2"), ("update.norm", "lm"), ("gradient.spectrum", "fc1")
ROWS = [
    row(0, {N1: [0.0]}, seconds=50.0),
    row(1, {N1: [1.0], S1: [3.0, 2.0]}),
    row(2, {N2: [math.nan], S1: [5.0]}, status="failed", error="KeyError: x"),
    row(3, {N1: [3.0], N2: [math.inf], LM: [7.0]}, seconds=4.0),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    held = writer(tmp_path / "run")
    for each in ROWS:
        held.append(each)
    held.outcome(1, "committed")
    held.outcome(1, "rolled_back")
    held.alarm(Alarm(3, "diverging", "update.norm", "fc1", "it grows"))
    held.note(Note(2, "probe-off", "why"))
    held.set_manifest({"closed": True})
    held.close()
    return load(tmp_path / "run")


def test_each_row_is_read_as_it_was_written(run: Run) -> None:
    for edit, written in zip(run.edits, ROWS, strict=True):
        assert replace(edit.row, readings={}) == replace(written, readings={})
        assert {*edit.row.readings} == {*written.readings}
        for key, values in written.readings.items():
            np.testing.assert_array_equal(edit.row.readings[key], values)
        assert (edit.edit, edit.label, edit.status) == (written.edit, written.label, written.status)
    assert [edit.outcome for edit in run.edits] == [None, "rolled_back", None, None]
    assert run.alarms == (Alarm(3, "diverging", "update.norm", "fc1", "it grows"),)
    assert run.notes == (Note(2, "probe-off", "why"),)
    assert [metric.name for metric in run.metrics] == ["update.norm", "gradient.spectrum", "drift.norm"]
    assert (len(run), run.closed, run.complete) == (3, True, True)


def test_sites_are_in_dataflow_order_and_those_that_it_lacks_come_first(run: Run) -> None:
    assert run.sites == ("lm", "fc2", "fc1")
    assert run.sites_of("update.norm") == ("lm", "fc2", "fc1")
    assert run.sites_of("gradient.spectrum") == ("fc1",)
    assert run.sites_of("drift.norm") == run.sites_of("other") == ()


def test_a_series_has_a_value_per_edit_and_nan_where_none_was_taken(run: Run) -> None:
    series, present = run.series("update.norm", "fc1"), run.present("update.norm", "fc1")
    np.testing.assert_array_equal(series, [0.0, 1.0, math.nan, 3.0])
    assert present.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(run.series("update.norm", "fc2"), [math.nan, math.nan, math.nan, math.inf])
    assert run.present("update.norm", "fc2").tolist() == [False, False, True, True]
    vectors = run.series("gradient.spectrum")  # read at one site alone
    assert vectors.shape == (4, 4)
    np.testing.assert_array_equal(vectors[1], [3.0, 2.0, math.nan, math.nan])
    np.testing.assert_array_equal(vectors[2], [5.0, math.nan, math.nan, math.nan])
    assert np.isnan(vectors[[0, 3]]).all()
    assert run.edit_numbers.tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="read-only"):
        run.edit_numbers[0] = 5.0


def test_a_series_that_would_be_wider_than_memory_is_as_wide_as_its_readings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "MOST_SHOWN", 4 * 4)
    assert run.series("gradient.spectrum").shape == (4, 4)
    monkeypatch.setattr(run_module, "MOST_SHOWN", 4 * 4 - 1)
    assert run.series("gradient.spectrum").shape == (4, 2)
    monkeypatch.setattr(run_module, "MOST_SERIES", 8)
    assert run.series("gradient.spectrum").shape == (4, 2)
    monkeypatch.setattr(run_module, "MOST_SERIES", 7)
    with pytest.raises(RunError, match=r"'gradient.spectrum' at 'fc1' is 4 edits of 2 values, which is too much"):
        run.series("gradient.spectrum")


def test_what_is_asked_for_and_is_not_there_is_named(run: Run) -> None:
    with pytest.raises(UsageError, match=r"'update.norm' has 3 sites; expected one of lm, fc2, fc1$"):
        run.series("update.norm")
    with pytest.raises(UsageError, match=r"'drift.norm' was never read in this run"):
        run.series("drift.norm", "fc1")
    with pytest.raises(UsageError, match=r"'update.norm' has no site 'fc9'; did you mean"):
        run.present("update.norm", "fc9")
    with pytest.raises(UsageError, match=r"no metric 'update.nrm' in this run; did you mean"):
        run.metric("update.nrm")
    assert run.metric("drift.norm") == NEVER


def test_shares_of_time_are_of_the_edits_alone(run: Run) -> None:
    assert run.probe_time_share == pytest.approx(1.5 / 8.0)
    assert run.canary_time_share == pytest.approx(0.75 / 8.0)
    assert run.trace_time_share == pytest.approx(0.375 / 8.0)


def test_a_run_of_edit_zero_alone_has_no_shares(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    held.append(ROWS[0])
    held.close()
    found = load(tmp_path / "run")
    assert (found.probe_time_share, len(found), found.closed, found.complete) == (None, 0, False, False)


def test_a_run_that_ends_before_what_was_acknowledged_says_which_edits_are_missing(tmp_path: Path) -> None:
    held = writer(tmp_path / "run", lost_rows=2)
    for each in ROWS:
        held.append(each)
    held.close()
    follower = Follower(tmp_path / "run", keeps_rows=True)
    for known, lost in ((2, 2), (3, 2), (4, 3), (9, 8)):
        acknowledge(tmp_path / "run" / FILE_NAME, known)
        found = load(tmp_path / "run")
        assert found.manifest["lost_rows"] == lost
        assert [note.kind for note in found.notes] == ([LOST_ROWS] if known > 3 else [])
        assert not found.complete
        follower.look()
        assert follower.manifest == found.manifest
        assert follower.run.notes == found.notes
    assert found.notes[-1].edit == 9
    assert found.notes[-1].says.startswith("edits 4 to 9 ")


@pytest.mark.parametrize(
    ("text", "limit", "held"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("", 3, ""), ("a\ud800", 9, "a\\ud800"), ("é" * 4, 3, "éé…")],
)
def test_text_is_cut_with_a_mark(text: str, limit: int, held: str) -> None:
    assert plain_text(text, limit) == held


def test_a_label_may_have_four_thousand_characters(tmp_path: Path) -> None:
    held = writer(tmp_path / "run")
    for edit, length in ((1, 4_000), (2, 4_001)):
        held.append(replace(row(edit, {}), label="x" * length))
    held.close()
    labels = [edit.label for edit in load(tmp_path / "run").edits]
    assert labels == ["x" * 4_000, "x" * 3_999 + "…"]
    assert LABEL_LIMIT == 4_000


class TestFollower:
    """Looks at a run between its edits."""

    def test_it_counts_what_was_tried_and_says_how_fast(self, tmp_path: Path) -> None:
        held, follower = writer(tmp_path / "run"), Follower(tmp_path / "run")
        assert (follower.last_started, follower.edits_per_minute, follower.edits) == (None, None, 0)
        for number, each in enumerate(ROWS):
            held.append(each)
            (seen,) = follower.look()
            assert seen.row.edit == number
            assert seen.failed == (1 if number >= 2 else 0)
            assert (follower.edits, follower.failed) == (number, seen.failed)
            assert follower.last_started == (None if number == 0 else 100.0 + 3.0 * number)
            assert follower.edits_per_minute == (None if number < 2 else 20.0)
        assert (follower.closed, follower.complete) == (False, False)
        held.set_manifest({"closed": True})
        held.close()
        assert follower.look() == []
        assert (follower.closed, follower.complete) == (True, True)
        assert follower.sites == ("lm", "fc2", "fc1")

    def test_its_pace_is_that_of_the_last_twenty_edits(self, tmp_path: Path) -> None:
        held, follower = writer(tmp_path / "run"), Follower(tmp_path / "run")
        for edit in range(31):
            held.append(replace(row(edit, {}), started=1_000.0 * edit if edit < 11 else 10_000.0 + 6.0 * (edit - 10)))
        follower.look()
        assert follower.edits_per_minute == pytest.approx(10.0)
        held.append(replace(row(31, {}), started=0.0))  # a clock that was set back
        follower.look()
        assert follower.edits_per_minute is None
        held.close()

    def test_it_shows_the_last_few_and_each_once(self, tmp_path: Path) -> None:
        held, follower = writer(tmp_path / "run"), Follower(tmp_path / "run")
        for each in ROWS:
            held.append(each)
        assert [seen.row.edit for seen in follower.look(keep=2)] == [2, 3]
        assert follower.look() == []
        held.append(row(4, {}))
        held.append(row(5, {}))
        assert [seen.row.edit for seen in follower.look(keep=0)] == []
        held.append(row(6, {}))
        assert [seen.row.edit for seen in follower.look(keep=9)] == [6]
        assert follower.edits == 6
        held.close()

    def test_the_largest_over_all_sites(self, tmp_path: Path) -> None:
        held, follower = writer(tmp_path / "run"), Follower(tmp_path / "run")
        for each in ROWS:
            held.append(each)
        seen = follower.look()
        assert [each.largest("update.norm") for each in (seen[0], seen[1], seen[3])] == [0.0, 1.0, math.inf]
        assert math.isnan(seen[2].largest("update.norm") or 0.0)
        assert [each.largest("gradient.spectrum") for each in seen] == [None, 3.0, 5.0, None]
        held.close()

    def test_what_it_keeps_is_what_a_reader_reads(self, tmp_path: Path) -> None:
        held, follower = writer(tmp_path / "run"), Follower(tmp_path / "run", keeps_rows=True)
        with pytest.raises(RunError, match="was not looked at by a follower that keeps rows"):
            _ = follower.run
        held.append(ROWS[0])
        held.append_dry([row(1, {("update.norm", "fc1"): [1.0]}), row(2, {("update.norm", "fc1"): [2.0]})])
        for each in ROWS[1:]:
            follower.look()
            held.append(each)
        held.note(Note(2, "probe-off", "why"))
        held.outcome(1, "committed")
        follower.look()
        held.close()
        ours, theirs = follower.run, load(tmp_path / "run")
        assert [edit.outcome for edit in ours.edits] == [edit.outcome for edit in theirs.edits]
        assert [repr(edit.row) for edit in ours.edits] == [repr(edit.row) for edit in theirs.edits]
        assert [repr(dry) for dry in ours.dry_edits] == [repr(dry) for dry in theirs.dry_edits]
        assert (ours.notes, ours.sites, ours.metrics) == (theirs.notes, theirs.sites, theirs.metrics)
        assert ours.diagnosis().to_json() == theirs.diagnosis().to_json()

    def test_a_run_that_was_begun_anew_is_followed_from_its_start(self, tmp_path: Path) -> None:
        held, follower = writer(tmp_path / "run"), Follower(tmp_path / "run")
        for each in ROWS:
            held.append(each)
        follower.look()
        held.set_manifest({"created": "later"})
        assert [seen.row.edit for seen in follower.look()] == [0, 1, 2, 3]
        assert (follower.edits, follower.failed) == (3, 1)
        held.add_metrics([replace(NEVER, name="mine.size")])  # it is judged anew, and nothing is shown twice
        assert follower.look() == []
        assert (follower.edits, follower.failed) == (3, 1)
        held.close()
