"""Online and offline agree on every prefix: the same class is fed, edit by edit or from the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.analysis import Analyzer, Diagnosis, limits
from stabilitylab.analysis.facts import FactRules
from stabilitylab.record.readings import EditRow
from stabilitylab.record.run import load
from stabilitylab.record.store import RunWriter
from tests.synthetic_runs import METRICS, growing, healthy, row


def online(rows: list[EditRow]) -> list[Diagnosis]:
    analyzer, said = Analyzer(METRICS), []
    for each in rows:
        analyzer.observe(each)
        said.append(analyzer.diagnosis())
    return said


def plain(diagnosis: Diagnosis) -> object:
    return diagnosis.to_json()  # NaN is not equal to itself


@pytest.fixture(params=["exponential", "super-exponential", "healthy"])
def rows(request: pytest.FixtureRequest) -> list[EditRow]:
    run = healthy(4) if request.param == "healthy" else growing(11, request.param)
    return run.rows[:90] if request.param == "healthy" else run.rows


def test_asking_for_a_diagnosis_changes_nothing(rows: list[EditRow]) -> None:
    said = online(rows)
    for length in {1, 5, 9, 20, len(rows) // 2, len(rows) - 1, len(rows)}:
        analyzer = Analyzer(METRICS)
        for each in rows[:length]:
            analyzer.observe(each)
        assert plain(analyzer.diagnosis()) == plain(said[length - 1])


def test_the_file_says_the_same_at_every_edit(rows: list[EditRow], tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {}, METRICS)
    said = online(rows)
    for number, (each, diagnosis) in enumerate(zip(rows, said, strict=True)):
        writer.append(each)
        if number % 7 == 0 or number == len(rows) - 1:
            assert plain(load(tmp_path / "run").diagnosis()) == plain(diagnosis)
    writer.close()


def test_sites_that_appear_late_and_empty_readings_keep_their_order_in_the_file(tmp_path: Path) -> None:
    rows = [
        row(0, {("weight.nonfinite", "b"): 0.0}),
        row(1, {("weight.nonfinite", "c"): 0.0, ("weight.nonfinite", "b"): 0.0}),
        row(2, {("weight.nonfinite", "a"): 2.0, ("weight.nonfinite", "c"): 2.0, ("weight.nonfinite", "b"): 2.0}),
    ]
    empty = {("weight.nonfinite", "d"): np.zeros(0), **rows[1].readings}
    rows[1] = replace(rows[1], readings=empty)
    writer = RunWriter(tmp_path / "run", {}, METRICS)
    for each in rows:
        writer.append(each)
    writer.close()
    assert [finding.site for finding in online(rows)[-1].findings] == ["b", "c", "a"]
    assert plain(load(tmp_path / "run").diagnosis()) == plain(online(rows)[-1])


def test_the_alarm_edit_is_the_first_edit_that_said_so(rows: list[EditRow]) -> None:
    said = online(rows)
    first = next((at for at, diagnosis in enumerate(said) if diagnosis.verdict not in {"stable", "drifting"}), None)
    assert said[-1].alarm_edit == (None if first is None else rows[first].edit)
    assert {diagnosis.alarm_edit for diagnosis in said} <= {None, said[-1].alarm_edit}


def test_rules_that_find_nothing_to_look_at_in_a_row_are_skipped_and_nothing_else_changes(
    rows: list[EditRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = online(rows)  # in these rows readings begin late, and have gaps
    monkeypatch.setattr(FactRules, "_may_speak", lambda self, schema: frozenset(range(100)))
    monkeypatch.setattr(limits._Bounds, "reached", lambda self, values: set(range(100)))
    assert [plain(diagnosis) for diagnosis in online(rows)] == [plain(diagnosis) for diagnosis in said]
