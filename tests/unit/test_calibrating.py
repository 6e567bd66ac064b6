"""`stabilitylab calibrate`: limits from runs of one's own, and what uses them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import stabilitylab as sl
from stabilitylab.analysis import Analyzer, thresholds
from stabilitylab.analysis.calibrating import calibrate
from stabilitylab.commands import cli
from stabilitylab.commands.options import EXIT_BAD_VERDICT
from stabilitylab.errors import UsageError
from stabilitylab.record.readings import EditRow
from stabilitylab.record.run import load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports.console import diagnosis_page
from stabilitylab.reports.html import render
from tests.loops import CANARY, edit_once, make_model
from tests.synthetic_runs import METRICS, row

A = "decoder.layers.1.fc1"


def rows(seed: int, rise: float = 0.0, edits: int = 40) -> list[EditRow]:
    draw = np.random.default_rng(seed)
    values = np.exp(0.3 * draw.standard_normal(edits) + rise * (np.arange(edits) > edits // 2))
    return [row(0, {}), *(row(edit, {("activation.rms", A): value}) for edit, value in enumerate(values, start=1))]


def write(folder: Path, those: list[EditRow]) -> Path:
    writer = RunWriter(folder, {}, METRICS)
    for each in those:
        writer.append(each)
    writer.close()
    return folder


@pytest.fixture
def healthy(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"run-{seed}", rows(seed)) for seed in range(20)]


def verdict(those: list[EditRow], limits: thresholds.Thresholds) -> str:
    analyzer = Analyzer(METRICS, limits)
    for each in those:
        analyzer.observe(each)
    return analyzer.diagnosis().verdict


def test_quiet_runs_make_sharper_limits_than_those_that_are_shipped(healthy: list[Path]) -> None:
    own = calibrate(healthy, alpha=0.05)
    assert own.runs == 20
    raised = rows(99, rise=np.log(30.0))
    assert verdict(raised, thresholds.shipped()) != "diverging"
    assert verdict(raised, own) == "diverging"
    assert verdict(rows(98), own) != "diverging"


def test_the_command_writes_what_reads_back(healthy: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    done = CliRunner().invoke(cli.app, ["calibrate", *map(str, healthy), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert thresholds.read(out) == calibrate(healthy, alpha=0.05)
    assert "20 healthy runs" in done.output
    told = CliRunner().invoke(cli.app, ["calibrate", *map(str, healthy), "-o", str(out), "--json"]).output
    assert json.loads(told) == json.loads(out.read_text())


def test_too_few_runs_one_given_twice_and_an_unhealthy_one_are_refused(healthy: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected at least 99"):
        calibrate(healthy, alpha=0.01)
    with pytest.raises(UsageError, match="given twice"):
        calibrate([*healthy, healthy[0]])
    bad = [*rows(5), row(41, {("weight.nonfinite", A): 3.0})]
    with pytest.raises(UsageError, match="is not healthy"):
        calibrate([*healthy, write(tmp_path / "bad", bad)])
    with pytest.raises(UsageError, match="holds no edit"):
        calibrate([*healthy, write(tmp_path / "empty", rows(5)[:1])])


def test_nothing_is_written_when_it_is_refused(healthy: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    done = CliRunner().invoke(cli.app, ["calibrate", *map(str, healthy[:3]), "-o", str(out)])
    assert isinstance(done.exception, UsageError)
    assert not out.exists()
    assert "NaN" not in json.dumps(thresholds.shipped().to_json())


# -- what uses them ---------------------------------------------------------------------------------------------------

STRICT = replace(thresholds.shipped(), score=1e-3, least=0.5, runs=33, source="[b]a test")
"""Far below what any loop shows."""


@pytest.fixture
def strict(tmp_path: Path) -> Path:
    path = tmp_path / "strict.json"
    path.write_text(json.dumps(STRICT.to_json()), encoding="utf-8")
    return path


def drifting(folder: Path, **options: Any) -> sl.Monitor:
    """Each edit is a little larger than the last one."""
    model = make_model()
    with sl.attach(model, "[03]", folder, canary=CANARY, **options) as monitor:
        for number in range(16):
            with monitor.edit():
                edit_once(model, rate=0.01 * 1.3**number)
            assert load(folder).diagnosis() == monitor.diagnosis()
    return monitor


def test_a_run_is_judged_by_the_limits_that_it_was_watched_with(tmp_path: Path, strict: Path) -> None:
    usual = drifting(tmp_path / "usual").diagnosis()
    assert usual.thresholds == str(thresholds.shipped())
    assert "thresholds" not in load(tmp_path / "usual").manifest
    for name, given in {"path": strict, "text": str(strict), "object": STRICT}.items():
        monitor = drifting(tmp_path / name, thresholds=given)
        run = load(tmp_path / name)
        assert monitor.diagnosis() == run.diagnosis()
        assert run.thresholds == STRICT
        assert run.diagnosis().thresholds == str(STRICT)
        assert run.diagnosis().verdict != usual.verdict
        assert [alarm.edit for alarm in run.alarms if alarm.verdict == "diverging"] == [run.diagnosis().alarm_edit]


def test_a_run_can_be_judged_by_others(tmp_path: Path) -> None:
    drifting(tmp_path / "run")
    run = load(tmp_path / "run")
    own = run.diagnosis()
    other = run.diagnosis(STRICT)
    assert other.verdict == "diverging" != own.verdict
    assert other.thresholds == str(STRICT)
    assert run.diagnosis() is own
    assert run.diagnosis(run.thresholds) == own


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("missing.json", r"can't read thresholds from '.*missing\.json'"),
        ("broken.json", r"can't read thresholds from '.*broken\.json'"),
        ("other.json", r"holds no thresholds .*expected what `stabilitylab calibrate` wrote"),
        ("infinite.json", r"holds no thresholds .*expected what `stabilitylab calibrate` wrote"),
        (7, r"thresholds is a int; expected a file that `stabilitylab calibrate` wrote"),
        (replace(STRICT, score=float("nan")), r"thresholds= holds no thresholds \(its score is nan\)"),
    ],
)
def test_thresholds_that_are_none_are_named_and_nothing_is_written(tmp_path: Path, given: Any, says: str) -> None:
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    (tmp_path / "infinite.json").write_text(json.dumps({**STRICT.to_json(), "runs": 1e999}), encoding="utf-8")
    where = tmp_path / given if isinstance(given, str) else given
    with pytest.raises(UsageError, match=says) as raised:
        sl.attach(make_model(), "[03]", tmp_path / "run", thresholds=where)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_manifest_whose_thresholds_are_none_is_named(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"thresholds": {"score": 1}}, METRICS)
    writer.close()
    run = load(tmp_path / "run")
    with pytest.raises(UsageError, match=r"the manifest of '.*run' holds no thresholds"):
        run.diagnosis()
    assert run.diagnosis(STRICT).verdict == "stable"


def test_check_takes_other_limits_and_says_which(tmp_path: Path, strict: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "run"
    drifting(folder)
    shown = [str(folder), "--thresholds", str(strict)]
    usual, other = (CliRunner().invoke(cli.app, ["check", *given]) for given in (shown[:1], shown))
    assert (usual.exit_code, other.exit_code) == (0, EXIT_BAD_VERDICT)
    usual_says, says = (" ".join(done.output.split()) for done in (usual, other))
    assert f"; {thresholds.shipped()}." in usual_says
    assert f"Baseline: each reading's first 8 edits, with the spread that its kind usually has; {STRICT}." in says
    assert max(map(len, other.output.splitlines())) <= 80
    found = json.loads(CliRunner().invoke(cli.app, ["check", "--json", *shown]).output)
    assert (found["verdict"], found["thresholds"]) == ("diverging", str(STRICT))
    missing = CliRunner().invoke(cli.app, ["check", str(folder), "--thresholds", str(tmp_path / "none.json")])
    assert isinstance(missing.exception, UsageError)


def test_console_and_page_say_which_baseline_was_used(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY, thresholds=STRICT) as monitor:
        monitor.calibrate(lambda model, request: edit_once(model, rate=0.01), range(20))
        with monitor.edit():
            edit_once(model, rate=0.01)
    run, out = load(tmp_path / "run"), io.StringIO()
    Console(file=out, width=80).print(diagnosis_page(run))
    assert f"Baseline: 20 dry edits; {STRICT}." in " ".join(out.getvalue().split())
    page = render(run)
    assert "<dt>Baseline</dt><dd>20 dry edits.</dd>" in page
    assert f"<dt>Limits</dt><dd>{str(STRICT).removeprefix('limits ').capitalize()}.</dd>" in page


def test_healthy_runs_with_dry_edits_are_measured_by_those(healthy: list[Path], tmp_path: Path) -> None:
    def far_below(each: EditRow) -> EditRow:
        return replace(each, readings={key: values / 50.0 for key, values in each.readings.items()})

    beside = []
    for seed in range(20):
        start, *edits = rows(seed)
        writer = RunWriter(tmp_path / f"dry-{seed}", {}, METRICS)
        writer.append(start)
        writer.append_dry([far_below(each) for each in edits[:20]])
        for each in edits:
            writer.append(each)
        writer.close()
        beside.append(tmp_path / f"dry-{seed}")
    assert calibrate(beside).score > 2 * calibrate(healthy).score
