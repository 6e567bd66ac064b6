from __future__ import annotations

import json
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stabilitylab.analysis import severity
from stabilitylab.commands.cli import app
from stabilitylab.record.run import Run, load
from stabilitylab.reports import comparison, interactive
from stabilitylab.reports.events import event_words, short_places, telling
from stabilitylab.reports.payload import shown
from tests.synthetic import HOSTILE, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        load(make_run(folder / "healthy", edits=30, dies_at=None)),
        load(make_run(folder / "dying", edits=40, dies_at=30)),
        load(make_run(folder / "again" / "dying", edits=30, dies_at=20)),
    ]


def test_a_run_is_cut_into_the_verdicts_that_its_findings_establish(runs: list[Run]) -> None:
    for run in runs:
        parts = comparison.stretches(run)
        assert (parts[0]["first"], parts[-1]["last"]) == (0, run.edits[-1].edit)
        assert all(one["last"] + 1 == other["first"] for one, other in pairwise(parts))
        assert parts[-1]["verdict"] == run.diagnosis().verdict
        ranks = [severity(part["verdict"]) for part in parts]
        assert ranks == sorted(set(ranks))


def test_of_several_layers_the_one_furthest_along_is_compared(runs: list[Run]) -> None:
    dying = runs[1]
    for metric, extreme in (("update.norm", np.max), ("weight.headroom_bits", np.min)):
        along = comparison.furthest(dying, metric)
        assert along is not None
        every = np.array([dying.series(metric, site) for site in dying.sites_of(metric)])
        assert along.tolist()[5] == extreme(every[:, 5])
    assert comparison.furthest(dying, "gradient.spectrum") is None
    along = comparison.furthest(dying, "update.norm")
    assert along is not None
    assert np.isnan(along[-1])


def test_the_data_of_a_comparison_names_runs_apart_and_is_plain_json(runs: list[Run]) -> None:
    plain = comparison.compared(runs)
    assert [run["name"] for run in plain["runs"]] == ["healthy", "dying", "dying (2)"]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    agreement = plain["runs"][1]["series"]["canary.agreement"]
    true, there = runs[1].series("canary.agreement"), runs[1].present("canary.agreement")
    assert agreement["edit"] == list(range(41))
    assert agreement["value"] == [
        shown(value) if taken else None for value, taken in zip(true.tolist(), there, strict=True)
    ]


def test_a_comparison_is_one_command(runs: list[Run], tmp_path: Path) -> None:
    out = tmp_path / "all.html"
    done = CliRunner().invoke(app, ["report", *(str(run.path) for run in runs), "-o", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    data = json.loads(out.with_suffix(".json").read_text())
    assert data == {"written_by": "stabilitylab", **comparison.compared(runs)}
    assert text.count('<tr><th scope="row"') == len(runs)
    dying = runs[1].diagnosis()
    assert len(dying.causes) > 1
    said = unescape(text)
    for link in dying.causes[1:]:
        assert link.says in said
    for run in runs:
        first = telling(run.diagnosis(), 1)[0]
        assert event_words(first, short_places(run.sites)) in said
        assert f"Not watched: {run.diagnosis().unwatched[0]}" in said
    assert said.count("Took effect: ") == len(runs)
    assert "'unsafe" not in text[: text.index("<title>")]


def test_hostile_runs_are_compared_as_text(tmp_path: Path) -> None:
    made = [make_run(tmp_path / HOSTILE[4], edits=9, dies_at=6, hostile_labels=True), make_run(tmp_path / "b", edits=9)]
    out = comparison.write_comparison([load(path) for path in made], tmp_path / "c.html")
    text = out.read_text()
    assert "<img" not in text.partition("<script>")[0]
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert len(re.findall(r"<script", text)) == len(re.findall(r"</script>", text)) == 6


def test_runs_have_colours_of_their_own_which_are_no_verdicts() -> None:
    charts = interactive.comparison_charts()
    ranges = {
        name: [layer["encoding"]["color"]["scale"]["range"] for layer in _layers(charts[name]) if _coloured(layer)]
        for name in ("trade", "lines.log", "lines.linear")
    }
    assert all(each == [*interactive.RUNS] for found in ranges.values() for each in found)
    assert all(ranges.values())
    (of_verdicts,) = (layer["encoding"]["color"]["scale"]["range"] for layer in _layers(charts["lanes"]))
    assert not {*interactive.RUNS} & {*of_verdicts}


def _layers(chart: dict[str, Any]) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = chart.get("layer", [chart])
    return layers


def _coloured(layer: dict[str, Any]) -> bool:
    return layer["encoding"].get("color", {}).get("field") in {"run", "site"}
