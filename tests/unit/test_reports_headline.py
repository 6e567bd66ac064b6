"""The first screen in words: the sentence, where to look, the curve, the strip, and that nothing is said twice."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from stabilitylab.analysis.findings import Finding, Verdict
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports import headline, html, verdicts
from stabilitylab.reports.console import diagnosis_text
from stabilitylab.reports.events import short_places
from stabilitylab.reports.verdicts import strip
from tests.synthetic import make_run


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "mend-vqa", edits=60, dies_at=44))


def found(verdict: Verdict, edit: int, site: str = "layers.1.fc2", metric: str = "drift.ratio") -> Finding:
    return Finding("any", metric, site, edit, 1.52, 1.0, "", verdict)


def diagnosis_of(*findings: Finding, onset: int | None = None, nonfinite: int | None = None, **more: Any) -> Any:
    worst = max((finding.verdict for finding in findings), key=verdicts.severity, default="stable")
    told = {"verdict": worst, "findings": findings, "onset_edit": onset, "first_bad_edit": onset}
    return SimpleNamespace(**told, first_nonfinite_edit=nonfinite, nothing_lands=False, says="All well.", **more)


def test_the_headline_says_since_when_until_when_and_where(dying: Run) -> None:
    diagnosis, places = dying.diagnosis(), short_places(dying.sites)
    first, end = diagnosis.findings[0], diagnosis.first_nonfinite_edit
    assert headline.headline(diagnosis, places) == (
        f"The model was diverging from edit {diagnosis.onset_edit} and came to NaN or ∞ at edit {end}."
        f" Look first at the editor's {places[first.site]}: {first.metric} 3.2e5 at edit {diagnosis.first_bad_edit}."
    )
    (linked,) = (part for part in headline.place(diagnosis, places) if part.finding)
    assert (linked.words, linked.finding, linked.title) == (places[first.site], first, first.site)
    named = {part.words: part.finding for part in headline.sentence(diagnosis) if part.finding}
    last = named[f"came to NaN or ∞ at edit {end}"]
    assert last is not None
    assert (last.verdict, last.start) == ("non-finite", end)
    assert end is not None
    assert diagnosis.alarm_edit is not None
    ahead = end - diagnosis.alarm_edit
    assert (headline.lead(diagnosis) or "").startswith(f"{ahead} edit" if ahead > 0 else "none")


@pytest.mark.parametrize(
    ("diagnosis", "says"),
    [
        (diagnosis_of(found("diverging", 2), onset=2), "The model has been diverging since edit 2."),
        (diagnosis_of(found("drifting", 11), onset=11), "The model has been drifting since edit 11."),
        (
            diagnosis_of(found("diverging", 2), found("collapsed", 8), onset=2),
            "The model was diverging from edit 2 and of no use from edit 8 on.",
        ),
        (diagnosis_of(found("collapsed", 3), onset=3), "The model was of no use from edit 3 on."),
        (diagnosis_of(found("non-finite", 1), onset=1, nonfinite=1), "The model came to NaN or ∞ at edit 1."),
        (diagnosis_of(found("diverging", 1)), "The model was bad from the start."),
        (diagnosis_of(), "All well."),
    ],
)
def test_what_comes_at_the_onset_is_said_once(diagnosis: Any, says: str) -> None:
    assert "".join(part.words for part in headline.sentence(diagnosis)) == says


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("layers.1.fc2", "layer 1.fc2"),
        ("model", "the model"),
        ("editor", "the editor"),
        ("editor.256x64.u", "the editor's 256x64.u"),
    ],
)
def test_where_to_look_first_is_named_by_its_kind(site: str, words: str) -> None:
    places = short_places([site, "layers.2.fc1", "editor.64x256.v"])
    told = "".join(part.words for part in headline.place(diagnosis_of(found("diverging", 3, site), onset=2), places))
    assert told == f"Look first at {words}: drift.ratio 1.52 at edit 3."


def test_a_sound_runs_headline_is_the_diagnosis_and_its_curve_one_that_moves(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=20, dies_at=None))
    diagnosis = run.diagnosis()
    assert diagnosis.verdict == "stable"
    assert headline.headline(diagnosis, short_places(run.sites)) == diagnosis.says
    told = headline.telling(run, diagnosis)
    assert told is not None
    assert np.unique(run.series(*told)).size > 2
    page = html.render(run)
    assert page.count(verdicts.LOOKS["stable"].means) == 1
    assert page.index(verdicts.LOOKS["stable"].means) < page.index("How it went</h2>")


def test_of_a_count_of_nan_the_curve_shows_how_large_values_were_before(tmp_path: Path) -> None:
    metrics = [Metric(f"activation.{name}", "1", "log", "during", "", "", "") for name in ("nonfinite", "max_abs")]
    writer = RunWriter(tmp_path / "run", {"closed": True}, metrics)
    for edit in range(1, 7):
        bad = edit > 4
        readings = {
            ("activation.nonfinite", "fc"): np.array([40.0 * edit if bad else 0.0]),
            ("activation.max_abs", "fc"): np.array([np.nan if bad else 10.0**edit]),
        }
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    count = diagnosis_of(found("non-finite", 5, "fc", "activation.nonfinite"), onset=5, nonfinite=5)
    assert headline.telling(load(tmp_path / "run"), count) == ("activation.max_abs", "fc")


def test_a_loop_in_which_every_edit_raises_says_so_once_beside_the_verdict(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"closed": True}, [])
    for edit in range(7):
        error = "KeyError: no subject" if edit else None
        writer.append(EditRow(edit, "", "failed" if edit else "start", 0.0, 1.0, 0.0, 0.0, error=error))
    writer.close()
    run = load(tmp_path / "run")
    assert run.diagnosis().nothing_lands
    page = html.render(run)
    screen = page[page.index("<main>") : page.index("How it went</h2>")]
    assert screen.count("KeyError: no subject") == 1
    assert "No edit takes effect" in screen
    terminal = Console(width=200, record=True, file=io.StringIO())
    terminal.print(diagnosis_text(run, run.diagnosis()))
    shown = terminal.export_text()
    assert shown.count("KeyError: no subject") == 1
    assert "no edit takes effect" in shown
    assert "there is no baseline yet" in page


def test_a_single_cause_that_stands_above_makes_no_chain() -> None:
    def link(cause: str) -> Any:
        return SimpleNamespace(role="trigger", cause=cause, edit=3, says=f"{cause} did it")

    alone = SimpleNamespace(causes=[link("one")], cause="one", operation=None, nothing_lands=False, cause_says="x")
    assert verdicts.causes(alone, {}) == []  # type: ignore[arg-type]
    both = SimpleNamespace(**{**vars(alone), "causes": [link("one"), link("two")]})
    assert [says for _, _, says in verdicts.causes(both, {})] == [  # type: ignore[arg-type]
        "Told above; what to act on first.", "Two did it",
    ]  # fmt: skip


def test_an_operation_without_a_cause_is_told_where_the_cause_would_be() -> None:
    link = SimpleNamespace(role="operation", cause=verdicts.OPERATION, edit=3, says="addmm gave the first NaN.")
    known: Any = SimpleNamespace(
        causes=[link], cause="unknown", operation=object(), nothing_lands=False, cause_says="No rule explains this."
    )
    assert verdicts.why_apart(known) == link.says
    assert verdicts.why(known) == ""
    assert verdicts.chain(known) == []


@pytest.mark.parametrize(
    ("starts", "verdict", "words"),
    [
        ([12, 14], "drifting", "nothing flagged"),
        ([3, 12], "drifting", "before the onset"),  # odd, long before, and no part of what began at 12
        ([3, 12], "stable", "nothing flagged"),  # worth knowing, but no flag
    ],
)
def test_the_strip_calls_nothing_unflagged_that_was_flagged(starts: list[int], verdict: str, words: str) -> None:
    findings = [SimpleNamespace(start=start, verdict=verdict) for start in starts]
    diagnosis = SimpleNamespace(
        verdict=verdict, onset_edit=12, first_bad_edit=15, first_nonfinite_edit=None, findings=findings
    )
    run: Any = SimpleNamespace(edits=[SimpleNamespace(edit=edit) for edit in range(21)], diagnosis=lambda: diagnosis)
    assert [(part.words, part.first, part.last) for part in strip(run)] == [
        (words, 0, 11),
        ("trouble building", 12, 14),
        ("past a limit", 15, 20),
    ]


def test_the_strip_ends_in_what_the_run_ended_in() -> None:
    findings = [found("diverging", 5), found("collapsed", 9), found("non-finite", 9)]
    diagnosis = diagnosis_of(*findings, onset=3, nonfinite=9)
    run: Any = SimpleNamespace(edits=[SimpleNamespace(edit=edit) for edit in range(13)], diagnosis=lambda: diagnosis)
    told = [(part.kind, part.words, part.first, part.last) for part in strip(run)]
    assert told == [
        ("quiet", "nothing flagged", 0, 2),
        ("onset", "trouble building", 3, 4),
        ("bad", "past a limit", 5, 8),
        ("ended", "NaN or ∞", 9, 12),
    ]
