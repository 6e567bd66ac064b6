"""`stabilitylab tail` and `compare`: following a run from another process, and several side by side."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.thresholds import shipped
from stabilitylab.errors import RunError
from stabilitylab.record.following import Follower
from stabilitylab.record.readings import Alarm, EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import FILE_NAME, RunWriter
from stabilitylab.reports.events import short_places
from stabilitylab.reports.side_by_side import facts, largest_reading, last_reading, side_by_side
from stabilitylab.reports.sparkline import BLOCKS, sparkline
from stabilitylab.reports.tail import follow
from stabilitylab.reports.text import with_short_names
from tests.command_line import command, run_cli
from tests.injections import INJECTIONS, hostile_run
from tests.synthetic import make_run

NORM = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Growing:
    """A run that a test writes while something else reads it."""

    def __init__(self, folder: Path, created: str = "now") -> None:
        self.folder = folder
        self._writer = RunWriter(folder, {"created": created, "closed": False, "sites": ["fc1", "fc2"]}, [NORM])
        self._edit = 0

    def edit(self, size: float = 1.0, status: Any = None, error: str | None = None, label: str = "") -> None:
        read = {("update.norm", site): np.array([size * part]) for site, part in (("fc1", 1.0), ("fc2", 0.5))}
        kind = status or ("applied" if self._edit else "start")
        row = EditRow(self._edit, label, kind, 1e9 + 3.0 * self._edit, 1.0, 0.1, 0.0, error, read)
        self._writer.append(row)
        self._edit += 1

    def dry(self, count: int) -> None:
        read = {("update.norm", site): np.array([1.0 + 0.01 * edit]) for edit in range(2) for site in ("fc1", "fc2")}
        self._writer.append_dry([EditRow(1 + n, "", "applied", 1e9, 1.0, 0.1, 0.0, None, read) for n in range(count)])

    def alarm(self, edit: int) -> None:
        self._writer.alarm(Alarm(edit, "diverging", "update.norm", "fc1", "it grows"))

    def add(self, metric: Metric) -> None:
        self._writer.add_metrics([metric])

    def limits(self) -> None:
        own = replace(shipped(), source="other limits")
        self._writer.set_manifest({"thresholds": own.to_json()})

    def close(self) -> None:
        self._writer.set_manifest({"closed": True})
        self._writer.close()


def shown(console_width: int = 80, terminal: bool = False, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=console_width, force_terminal=terminal, color_system=None)
    follow(console=console, interval=0.01, **options)
    return out.getvalue()


def rows_of(run: Run) -> list[Any]:
    """The edits with the bytes of their readings, so that NaN is equal to itself."""
    return [
        (replace(edit.row, readings={}), edit.outcome, {key: read.tobytes() for key, read in edit.row.readings.items()})
        for edit in run.edits
    ]


def test_a_follower_reads_each_row_once_and_says_what_the_whole_run_says(tmp_path: Path) -> None:
    writer = make_run(tmp_path / "run", edits=20, dies_at=14)
    whole, follower = load(writer), Follower(writer)
    seen = follower.look()
    assert [each.row.edit for each in seen] == [edit.edit for edit in whole.edits]
    assert follower.look() == []
    assert follower.diagnosis().to_json() == whole.diagnosis().to_json()
    assert (follower.edits, follower.failed, follower.complete) == (20, 1, True)
    assert follower.alarms == whole.alarms
    assert [each.diagnosis.edits for each in seen] == list(range(21))
    largest = [each.largest("update.norm") for each in seen]
    expected = np.max([whole.series("update.norm", site) for site in whole.sites_of("update.norm")], axis=0)
    np.testing.assert_array_equal(np.array(largest, dtype=float), expected)


def test_a_follower_sees_a_run_grow(tmp_path: Path) -> None:
    run = Growing(tmp_path / "run")
    follower = Follower(run.folder)
    assert follower.look() == []
    run.edit()
    run.dry(12)
    assert [each.row.edit for each in follower.look()] == [0]
    for _ in range(3):
        run.edit()
    run.edit(status="failed")
    run.alarm(3)
    assert [each.row.edit for each in follower.look()] == [1, 2, 3, 4]
    assert follower.diagnosis().to_json() == load(run.folder).diagnosis().to_json()
    assert "12 dry edits" in follower.diagnosis().baseline
    assert follower.edits_per_minute == pytest.approx(20.0)
    assert (follower.failed, [alarm.says for alarm in follower.alarms]) == (1, ["it grows"])
    run.add(Metric("x.y", "1", "log", "after", "size", "x", "—"))
    run.edit()
    assert [each.row.edit for each in follower.look()] == [5]
    assert follower.diagnosis().to_json() == load(run.folder).diagnosis().to_json()
    assert not follower.complete
    run.close()
    assert follower.look() == []
    assert follower.complete


def test_of_a_long_run_the_last_rows_are_enough(tmp_path: Path) -> None:
    run = Growing(tmp_path / "run")
    for _ in range(30):
        run.edit()
    follower = Follower(run.folder)
    assert [each.row.edit for each in follower.look(4)] == [26, 27, 28, 29]
    assert follower.diagnosis().to_json() == load(run.folder).diagnosis().to_json()


def test_a_follower_that_keeps_rows_has_the_run_that_load_reads_and_looks_at_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = load(make_run(tmp_path / "source", edits=16, dies_at=12)), []
    observe = Analyzer.observe
    monkeypatch.setattr(Analyzer, "observe", lambda self, row: (seen.append(row.edit), observe(self, row)))
    writer = RunWriter(tmp_path / "live", source.manifest, source.metrics)
    follower = Follower(tmp_path / "live", keeps_rows=True)
    with pytest.raises(RunError, match="keeps rows"):
        _ = follower.run
    for edit in source.edits:
        writer.append(edit.row)
        if edit.outcome is not None:
            writer.outcome(edit.edit, edit.outcome)
        before = len(seen)
        follower.look()
        assert len(seen) == before + 1
        whole = load(tmp_path / "live")
        assert rows_of(follower.run) == rows_of(whole)
        assert follower.run.sites == whole.sites
        assert follower.diagnosis().to_json() == whole.diagnosis().to_json()
    writer.close()
    assert follower.diagnosis().verdict == "non-finite"


def test_a_run_that_was_begun_anew_or_has_other_limits_is_followed_from_its_start(tmp_path: Path) -> None:
    run = Growing(tmp_path / "run")
    for _ in range(5):
        run.edit()
    follower = Follower(run.folder, keeps_rows=True)
    follower.look()
    run.limits()
    assert follower.look() == []
    assert follower.diagnosis().to_json() == load(run.folder).diagnosis().to_json()
    assert len(follower.run) == 4
    run.close()
    (run.folder / FILE_NAME).unlink()
    again = Growing(run.folder, created="later")
    for _ in range(7):
        again.edit()
    assert [each.row.edit for each in follower.look()] == list(range(7))
    assert (follower.edits, len(follower.run)) == (6, 6)
    again.close()


def test_once_shows_a_page_and_ends_though_the_run_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", edits=20, dies_at=14, closed=False)
    page, diagnosis = shown(path=folder, once=True), load(folder).diagnosis()
    assert max(map(len, page.splitlines())) <= 80
    assert diagnosis.verdict in page
    assert "20 edits · 1 failed · 60 a minute · took effect: some" in page
    assert len(diagnosis.causes) > 1
    words, places = re.sub(r"\s+", " ", page), short_places(load(folder).sites)
    for link in diagnosis.causes[1:]:
        assert f"{link.role.capitalize()}: {with_short_names(link.says, places)}" in words
    assert diagnosis.first_bad_site is not None
    assert with_short_names(diagnosis.says, places) in words
    assert places[diagnosis.first_bad_site] in words
    assert diagnosis.first_bad_site not in page
    assert re.search(r"largest update\.norm +[▁-█]+∞×+ +NaN", page)
    assert "Last alarms" in page
    assert "ago" in page
    healthy = make_run(tmp_path / "healthy", edits=12, dies_at=None, closed=False)
    assert "forecast: " in shown(path=healthy, once=True)


def test_piped_output_is_a_line_per_new_edit_until_the_run_is_closed(tmp_path: Path) -> None:
    run = Growing(tmp_path / "run")
    for _ in range(15):
        run.edit()

    def go_on() -> None:
        run.edit(size=math.nan)
        run.edit(status="failed", error="RuntimeError: no\nanswer")
        run.close()

    writer = threading.Timer(0.2, go_on)
    writer.start()
    said = shown(path=run.folder).splitlines()
    writer.join()
    assert [line.split("  ")[0] for line in said[:-1]] == [f"edit {edit}" for edit in range(5, 17)]
    assert "update NaN" in said[-3]
    assert "non-finite" in said[-3]
    assert said[-2].endswith("RuntimeError: no answer")
    assert said[-1].startswith("closed after 16 edits: ")


def test_json_is_an_object_per_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", edits=12, dies_at=9)
    found = [
        json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
        for line in shown(path=folder, as_json=True).splitlines()
    ]
    assert [each["last"]["edit"] for each in found] == [*range(3, 13), 12]
    assert [each["edits"] for each in found] == [*range(3, 13), 12]
    assert [each["failed"] for each in found] == [0] * 4 + [1] * 7
    assert found[-1]["complete"]
    assert found[-1]["verdict"] == load(folder).diagnosis().verdict
    assert found[-1]["last"]["readings"]["update.norm"] == "NaN"
    assert all(alarm["edit"] <= each["last"]["edit"] for each in found for alarm in each["alarms"])
    assert [link["cause"] for link in found[-1]["causes"]] == [link.cause for link in load(folder).diagnosis().causes]
    assert (found[-1]["landed"], found[-1]["unwatched"]) == ("some", ["lm_head: tied to the input embedding"])
    (once,) = shown(path=folder, as_json=True, once=True).splitlines()
    assert json.loads(once) == found[-1]


def test_a_watched_page_is_renewed_and_stays(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", edits=12, dies_at=9)
    page = shown(path=folder, terminal=True)
    assert "12 edits" in page
    assert "closed" in page


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    ready = make_run(tmp_path / "ready", edits=8, dies_at=None)
    made = threading.Timer(0.2, lambda: ready.rename(tmp_path / "run"))
    made.start()
    page = shown(path=tmp_path / "run", says=said.append)
    made.join()
    assert "closed after 8 edits" in page
    assert len(said) == 1
    assert "does not exist; expected a run folder" in said[0]
    assert "waiting for it" in said[0]


def test_what_can_never_become_the_run_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        shown(path=tmp_path / "run", once=True)
    make_run(tmp_path / "runs" / "one", edits=1, dies_at=None)
    with pytest.raises(RunError, match="is a folder of runs; expected one of them"):
        shown(path=tmp_path / "runs")
    other = tmp_path / "notes.txt"
    other.write_text("no run" * 100)
    os.utime(other, (1e9, 1e9))
    with pytest.raises(RunError, match="not a run file"):
        shown(path=other)


def test_ctrl_c_ends_it_with_130(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("tail", tmp_path / "run", "--interval", "0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "waiting for it" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in out + err


def test_the_commands(tmp_path: Path) -> None:
    dying, healthy = (make_run(tmp_path / name, edits=12, dies_at=at) for name, at in (("dying", 9), ("healthy", None)))
    for arguments, word in ((("tail", dying), "closed after 12"), (("compare", dying, healthy), "first bad site")):
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
        assert "\x1b" not in done.stdout
    found = json.loads(run_cli("compare", dying, healthy, "--json").stdout)
    assert [each["verdict"] for each in found] == ["non-finite", load(healthy).diagnosis().verdict]
    missing = run_cli("compare", dying, tmp_path / "healhty")
    assert missing.returncode == 2
    assert "runs beside it" in missing.stderr
    assert missing.stderr.count("\n") == 1


def table_of(runs: list[Run], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(side_by_side(runs, width))
    return out.getvalue()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        load(make_run(folder / name, edits=20, dies_at=at, seed=seed))
        for name, at, seed in (("dying", 14, 0), ("healthy", None, 1))
    ]


def test_compared_runs_stand_side_by_side(pair: list[Run]) -> None:
    page, diagnosis = table_of(pair), pair[0].diagnosis()
    lines = {line[:14].strip(): line for line in page.splitlines()}
    assert max(map(len, page.splitlines())) <= 80
    assert "non-finite" in lines["verdict"]
    assert "healthy" in page.splitlines()[0]
    assert f"edit {diagnosis.onset_edit}" in lines["onset"]
    assert f"edit {diagnosis.alarm_edit}" in lines["alarm"]
    assert "1: 7" in lines["failed edits"]
    assert diagnosis.cause in page
    for link in diagnosis.causes[1:]:
        assert f"{link.role}: {link.cause}" in re.sub(r"\s+", " ", table_of(pair, width=200))
    assert "some" in lines["took effect"]
    assert "lm_head: tied" in lines["not watched"]
    assert "with it" not in table_of(pair[1:])
    assert "NaN" in lines["last KL (nats)"]
    more = table_of(pair * 3)
    assert more.count("verdict") > 1
    assert max(map(len, more.splitlines())) <= 80
    assert table_of(pair * 2, width=200).count("verdict") == 1


def test_what_is_compared_is_what_the_runs_hold(pair: list[Run]) -> None:
    run = pair[1]
    agreement, drift = last_reading(run, "canary.agreement"), largest_reading(run, "drift.ratio")
    assert agreement is not None
    assert agreement.value == run.series("canary.agreement")[-1]
    assert drift is not None
    assert drift.value == max(np.nanmax(run.series("drift.ratio", site)) for site in run.sites_of("drift.ratio"))
    found = facts(pair[0])
    drift = largest_reading(pair[0], "drift.ratio")
    assert drift is not None
    assert (drift.edit, math.isfinite(drift.value)) == (14, False)
    assert found["largest_drift"]["edit"] == 14
    assert found["failed_edits"] == [7]
    assert [link["role"] for link in found["causes"]] == [link.role for link in pair[0].diagnosis().causes]
    assert (found["landed"], found["unwatched"]) == ("some", list(pair[0].diagnosis().unwatched))
    json.dumps(found, allow_nan=False)
    assert last_reading(run, "no.such") is largest_reading(run, "no.such") is None


def test_hostile_text_neither_marks_up_nor_steers(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "[red]\x1b[31m\u202e")
    pages = [
        shown(path=run, once=True),
        shown(path=run, once=True, as_json=True),
        table_of([load(run), load(run)]),
    ]
    for page in pages:
        assert not STEERING.search(page)
        assert len(page) < 20_000
        assert "[red]" in page
    writer = Growing(tmp_path / "growing")
    for text in INJECTIONS.values():
        writer.edit(status="failed", error=text.encode("utf-8", "backslashreplace").decode(), label=text)
    writer.close()
    lines = shown(path=writer.folder).splitlines()
    assert len(lines) == 11
    assert not STEERING.search("\n".join(lines))


@pytest.mark.parametrize(
    ("values", "log", "line"),
    [
        ([], False, ""),
        ([0.0, 1.0], False, "▁█"),
        ([1.0, 10.0, 100.0], True, "▁▅█"),
        ([0.0, 1.0, 100.0], True, "▁▁█"),
        ([1.0, None, math.nan, math.inf, -math.inf, 2.0], False, "▁ ×∞∞█"),
        ([5.0, 5.0], False, "▄▄"),
        ([-1.7e308, 0.0, 1.7e308], False, "▁▅█"),
        ([5e-324, 1.7e308], True, "▁█"),
        ([math.nan], True, "×"),
    ],
)
def test_sparklines(values: list[float | None], log: bool, line: str) -> None:
    assert sparkline(values, log=log) == line
    assert len(BLOCKS) == 8
