"""`stabilitylab calibrate`: limits from runs of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import METRICS, row
from typer.testing import CliRunner

from stabilitylab import cli
from stabilitylab.analysis import Analyzer, thresholds
from stabilitylab.calibrating import calibrate
from stabilitylab.errors import UsageError
from stabilitylab.readings import EditRow
from stabilitylab.store import RunWriter

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
