from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from stabilitylab.analysis import Analyzer, severity
from stabilitylab.analysis.grouping import Group, grouped
from stabilitylab.record.readings import EditRow, Metric, Note
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports.console import ProgressSink, closing_table, diagnosis_page
from stabilitylab.reports.events import event_words, short_places
from stabilitylab.reports.text import with_short_names
from tests.synthetic import HOSTILE, make_run


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "run", edits=20, dies_at=14))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "[red]\x1b[31m"
    return load(make_run(folder, edits=14, dies_at=9, sites=len(HOSTILE), hostile_labels=True, closed=False))


def printed(what: object, *, terminal: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, color_system="standard" if terminal else None).print(what)
    return out.getvalue()


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def play(run: Run, sink: ProgressSink) -> None:
    analyzer = Analyzer(run.metrics)
    for edit in run.edits:
        analyzer.observe(edit.row)
        sink.on_row(edit.row, analyzer.diagnosis())
    sink.close()


def test_the_page_says_all_that_counts_within_80_columns(dying: Run) -> None:
    diagnosis, page = dying.diagnosis(), printed(diagnosis_page(dying))
    assert max(map(len, page.splitlines())) <= 80
    assert "\x1b" not in page
    words = flat(page)
    places = short_places(dying.sites)
    assert with_short_names(diagnosis.says, places) in words
    assert with_short_names(diagnosis.advice, places) in words
    assert f"onset, in hindsight edit {diagnosis.onset_edit}" in words
    assert f"alarm, as it ran edit {diagnosis.alarm_edit}" in words
    short = places[str(diagnosis.first_bad_site)]
    assert f"edit {diagnosis.first_bad_edit}, {short}, {diagnosis.first_bad_metric}" in words
    assert words.count(str(diagnosis.first_bad_site)) == 1
    assert f"{short} is {diagnosis.first_bad_site}" in words
    assert "time in probes 2.1 %" in words
    assert str(dying.path) in words.replace(" ", "") or dying.path.name in words
    for note in dying.notes:
        assert note.says in words


def told(run: Run, event: Group) -> str:
    return event_words(event, short_places(run.sites))


def listed(run: Run) -> str:
    """What stands below the heading of the findings."""
    return flat(printed(diagnosis_page(run), width=300)).split("that of the headline first ")[1]


def test_the_headlines_finding_is_the_first_of_those_shown(dying: Run) -> None:
    diagnosis = dying.diagnosis()
    first = grouped(diagnosis.findings)[0]
    assert diagnosis.findings[0] in first.members
    assert told(dying, first) in listed(dying)[: 40 + len(told(dying, first))]


def test_what_raised_the_alarm_is_among_those_shown(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=40, dies_at=30))
    diagnosis = run.diagnosis()
    raised = [event for event in grouped(diagnosis.findings) if event.edit == diagnosis.alarm_edit]
    grave = next(event for event in raised if severity(event.verdict) >= severity("diverging"))
    assert "more: see the page" in listed(run)
    assert told(run, grave) in listed(run)


def test_of_a_long_dead_run_the_findings_before_its_end_are_shown(dying: Run) -> None:
    events = grouped(dying.diagnosis().findings)
    for verdict in {event.verdict for event in events}:
        first = min((event for event in events if event.verdict == verdict), key=lambda event: event.edit)
        assert told(dying, first) in listed(dying)


def test_what_happened_is_told_apart_from_what_was_not_measured(tmp_path: Path) -> None:
    metric = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
    writer = RunWriter(tmp_path / "run", {}, [metric])
    writer.note(Note(0, "calibrated", "20 dry edits in 1.0 s, each rolled back bit for bit"))
    writer.append(EditRow(0, "", "start", 0.0, 1.0, 0.0, 0.0))
    writer.append(EditRow(1, "", "failed", 0.0, 1.0, 0.0, 0.0, "no"))
    writer.close()
    page = printed(diagnosis_page(load(tmp_path / "run")))
    assert "Not measured" not in page
    assert "Of note\n  calibrated: 20 dry edits" in page
    assert "1, 1 failed" in flat(page)


def test_colour_only_where_a_person_watches(
    dying: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\x1b[" in printed(closing_table(dying, dying.diagnosis()), terminal=True)
    assert "\x1b" not in printed(closing_table(dying, dying.diagnosis()))
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    Console(file=out, force_terminal=True).print(closing_table(dying, dying.diagnosis()))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", out.getvalue())


def test_a_piped_progress_bar_says_nothing(dying: Run) -> None:
    out = io.StringIO()
    play(dying, ProgressSink(20, Console(file=out)))
    assert out.getvalue() == ""


@pytest.mark.parametrize("total", [20, None])
def test_a_watched_progress_bar_shows_edits_and_verdict(dying: Run, total: int | None) -> None:
    out = io.StringIO()
    play(dying, ProgressSink(total, Console(file=out, force_terminal=True, width=100, color_system=None)))
    shown = out.getvalue()
    last = shown.replace("\x1b[?25h", "").rstrip().splitlines()[-1]
    assert f"20/{total or '?'}" in shown
    assert "edits/s" in shown
    assert "✖ non-finite" in last
    assert "edit 7 failed: RuntimeError: no answer token" in shown
    assert shown.count("edit 14: ✖ non-finite") == 1


def test_hostile_text_neither_marks_up_nor_steers(hostile: Run) -> None:
    page = printed(diagnosis_page(hostile), width=200)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    assert r"[red]\x1b[31m" in page
    assert max(map(len, page.splitlines())) <= 200
    assert len(page) < 20_000
    out = io.StringIO()
    play(hostile, ProgressSink(14, Console(file=out, force_terminal=True, width=100, color_system=None)))
    assert "\x07" not in out.getvalue()
    assert "\x1b[31m" not in out.getvalue()


def test_a_run_with_no_edit_has_a_page(tmp_path: Path) -> None:
    page = printed(diagnosis_page(load(make_run(tmp_path / "run", edits=0, dies_at=None))))
    assert "● stable" in page
    assert "time in probes –" in flat(page)
