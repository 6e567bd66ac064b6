"""The reliability benchmark sees what it is there to see; and runs of every schema are read."""

from __future__ import annotations

import io
import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import stabilitylab as sl
from benchmarks.reliability import __main__ as reliability
from benchmarks.reliability import concurrent_loops, faults, hostile_text, inert, lost, mutants, old_files, table
from benchmarks.reliability.forks import Forks
from benchmarks.reliability.promise import Effort, Result, counted
from benchmarks.reliability.states import differences, state_of
from stabilitylab.record.store import FILE_NAME, SCHEMA_VERSION
from stabilitylab.testbed.digits_bed import DigitsBed
from tests.synthetic import make_run


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_a_run_of_each_schema_is_read_as_it_was(tmp_path: Path, version: int) -> None:
    assert old_files.what_is_wrong(old_files.RUNS / f"schema-{version}", tmp_path) == ""


def test_a_state_shows_what_a_monitor_might_leave() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = state_of(model, None)
    assert differences(before, state_of(model, None)) == []
    handle = model[1].register_forward_hook(lambda *_: None)
    assert differences(before, state_of(model, None)) == ["module 1"]
    handle.remove()
    model[0].bias.requires_grad_(False)
    torch.rand(1)
    assert differences(before, state_of(model, None)) == ["random", "tensor 0.bias"]


@pytest.mark.parametrize("disturbance", inert.DISTURBANCES)
def test_a_disturbed_loop_is_the_same_when_it_is_watched(tmp_path: Path, disturbance: str) -> None:
    beds: dict[str, DigitsBed] = {}
    assert inert.compare(inert.Case("mend", "light", "fp32", disturbance), 1, tmp_path, beds) is None
    seen = inert.stream(inert.Case("mend", "light", "fp32", "exception"), beds["fp32"], 1, None)
    assert seen[1]["error"].startswith("Interrupted: ")


def test_a_sample_has_each_part_about_as_often() -> None:
    chosen = inert.sample(16, random.Random(0))
    assert len({*chosen}) == 16
    for part in ("editor", "tier", "dtype", "disturbance"):
        counts = [sum(getattr(case, part) == value for case in chosen) for value in {getattr(c, part) for c in chosen}]
        assert max(counts) - min(counts) <= 1


def test_what_is_lost_is_seen(tmp_path: Path) -> None:
    run = sl.load(make_run(tmp_path / "run", edits=5, sites=1, dies_at=None))
    truth = lost.readings_of(run)
    assert lost.what_is_wrong(tmp_path / "run", 5, truth) == "complete, with 6 of 25 rows"
    assert "are missing, unsaid" in lost.what_is_wrong(tmp_path / "run", 7, truth)
    assert "not as they were" in lost.what_is_wrong(tmp_path / "run", 5, truth | {3: {}})
    (tmp_path / "run" / FILE_NAME).write_bytes(b"no run")
    assert lost.what_is_wrong(tmp_path / "run", 5, truth).startswith("can't be read")
    assert lost.what_is_wrong(tmp_path / "free", 0, truth) == ""


def test_a_process_that_is_killed_or_fails_is_told() -> None:
    with Forks() as forks:
        task = "benchmarks.reliability.concurrent_loops:write"
        assert "has no attribute 'no_such'" in forks.run("builtins:no_such", {}).error.replace("\\", "")
        ended = forks.run(task, {"run": "/nowhere/at/all", "seconds": 30.0, "wal": True}, kill_after=0.01)
        assert (ended.by, ended.said) == (9, ())


def test_a_torn_row_is_seen(tmp_path: Path) -> None:
    rows = [edit.row for edit in sl.load(make_run(tmp_path / "run", edits=2, sites=1, dies_at=None)).edits]
    assert concurrent_loops.torn(rows[:1], 0) == ""
    assert concurrent_loops.torn(rows[1:], 0).startswith("row 0 is of edit 1")


def test_a_fault_is_put_in_place_and_counted() -> None:
    fault = next(each for each in faults.of_sinks() if each.what == "raises")
    with fault.put(), pytest.raises(ValueError, match=faults.MARK):
        faults.Sink().on_row(None, None)
    assert fault.hit == [1]
    faults.Sink().on_row(None, None)
    assert fault.hit == [1]


def test_a_mutant_is_its_number_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "sound" / "run", edits=3, sites=1, dies_at=None)
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        path = mutants.run_file(folder, tmp_path / "sound", random.Random(3), tmp_path / "mark")
        made.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert made[0] == made[1]
    assert made[0][FILE_NAME] != (tmp_path / "sound" / "run" / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("page", "sound"),
    [
        ("<p>text</p><a href='#edit=1'>x</a>", True),
        ("<img src=x onerror=a>", False),
        ("<a href='javascript:a'>x</a>", False),
        ("<script>window.stabilitylab_owned=1</script>", False),
        ("<iframe></iframe>", False),
        ("a\u202eb", False),
    ],
)
def test_what_gets_through_to_a_page_is_seen(page: str, sound: bool) -> None:
    assert (hostile_text.of_page(page) == []) is sound


def test_the_table_fits_80_columns_and_the_page_says_what_was_not_run() -> None:
    results = {
        "lost": [counted("kill -9 | at close", "edits lost", 300, ["edit 3: gone"]), Result("x", "y", "z", None, 1)]
    }
    out = Console(file=io.StringIO(), width=80)
    out.print(table.table(results))
    assert max(map(len, out.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]
    assert table.breaks(results) == ["lost: edit 3: gone"]
    machine = {"cpu": "c", "cores": 2, "python": "3", "torch": "2"}
    found = {"promises": table.document(results, {"lost": 1.0}), "machine": machine, "when": "today", "seed": 0}
    page = table.page([("make reliability", found)], ["lost", "long"])
    assert "| lost | kill -9 \\| at close | 0 edits lost | 1 of 300 | no | `make reliability` |" in page
    assert "| long | | | not run | | |" in page


@pytest.mark.parametrize(
    ("wrong", "clocks", "fails"),
    [("time", True, True), ("time", False, False), ("count", False, True), ("", True, False)],
)
def test_a_time_fails_where_it_is_judged_and_what_is_counted_fails_anywhere(
    wrong: str, clocks: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def promise(effort: Effort) -> Iterator[Result]:
        yield Result("an edit", "under 1 s", "2 s", wrong != "time", 1, clock=True)
        yield counted("edits", "lost", 10, ["edit 3"] if wrong == "count" else [])

    monkeypatch.setattr(reliability, "promise_of", lambda name: promise)
    options = Namespace(only=["lost"], long=False, seed=0, json=None, clocks=clocks)
    results = reliability.run(options, Console(file=io.StringIO()))
    assert reliability.missed(results) is fails
    assert results["lost"][0].measured == ("2 s" if clocks else "2 s; not judged here")
