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
from stabilitylab.reports import comparison, comparison_charts, html, spec_parts
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
    assert text.count('<tr><th scope="row" class="site"') == len(runs)
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


def test_runs_have_colours_of_their_own_which_are_far_from_those_of_verdicts() -> None:
    charts = comparison_charts.comparison_charts()
    looks = [
        (layer["encoding"]["color"]["scale"]["range"], layer["encoding"].get("strokeDash", {}).get("scale"))
        for name in ("trade", "lines.log", "lines.linear")
        for layer in charts[name].get("layer", [charts[name]])
        if layer["encoding"].get("color", {}).get("field") in {"run", "site"}
    ]
    colours, dashes = [[each[at] for each in comparison_charts.RUNS] for at in (0, 1)]
    assert len(looks) == 9  # the path; and line, lone points, what lies above and below, on either axis
    assert all(found == colours for found, _ in looks)
    assert [each["range"] for _, each in looks if each] == [[[*dash] for dash in dashes]] * 3
    assert len(set(comparison_charts.RUNS)) == len(comparison_charts.RUNS)
    sheet = html.source("report.css")
    verdicts = {*re.findall(r"--(?:green|yellow|orange|purple|red): (#\w{6})", sheet), *spec_parts.VERDICT_COLOURS}
    assert len(verdicts) == 15
    nearest = min(np.linalg.norm(lab(run) - lab(verdict)) for run in colours for verdict in verdicts)
    assert nearest > 25  # of a scale on which 2 is just seen


def lab(colour: str) -> np.ndarray[Any, Any]:
    """CIE L*a*b* of an sRGB colour, under D65."""
    linear = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    rows = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(rows) @ linear / [0.9505, 1.0, 1.089])  # all of ours are bright enough for the root
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_numbers_of_the_survival_curve_stand_below_it(runs: list[Run], tmp_path: Path) -> None:
    text = comparison.write_comparison(runs, tmp_path / "c.html").read_text()
    table = text[text.index('<table class="counted">') :].partition("</table>")[0]
    edits = [int(edit) for edit in re.findall(r"<th class=.n.>(\d+)<", table)]
    cells = [re.findall(r'<td class="n">([^<]*)<', row) for row in table.split("<tr>")[2:]]
    first = [_first_of(run, "diverging") for run in runs]
    ends = [run.edits[-1].edit if at is None else at for run, at in zip(runs, first, strict=True)]
    assert edits[0] == 0
    assert max(ends) - edits[1] < edits[-1] <= max(ends)
    at_risk = [sum(end >= edit for end in ends) for edit in edits]
    assert [cell.partition(" ")[0] for cell in cells[0]] == [str(count) for count in at_risk]
    assert cells[0][0] == cells[1][0] == "3 · 100 %"


def _first_of(run: Run, verdict: str) -> int | None:
    parts = comparison.stretches(run)
    return next((part["first"] for part in parts if severity(part["verdict"]) >= severity(verdict)), None)
