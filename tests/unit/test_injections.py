"""The corpus of injections against what no browser shows: console, JSON, SVG and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from stabilitylab.commands.cli import app
from stabilitylab.record.run import Run, load
from stabilitylab.reports import figures
from stabilitylab.reports.comparison import compared
from stabilitylab.reports.html import write_report
from stabilitylab.reports.svg import to_svg
from tests.injections import ELSEWHERE, hostile_run

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
DRAWN = {"svg", "defs", "style", "g", "path", "rect", "use", "clipPath", "image"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(hostile_run(tmp_path_factory.mktemp("runs") / "[red]\x1b[31m\u202e<script>"))


@pytest.mark.parametrize("command", ["check", "compare"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_is_not_steered(hostile: Run, command: str, as_json: bool) -> None:
    done = CliRunner().invoke(app, [command, str(hostile.path), *(["--json"] if as_json else [])])
    assert done.exit_code == (1 if command == "check" else 0), done.output
    assert not STEERING.search(done.output)
    assert "[red]" in done.output
    if as_json:
        json.loads(done.output)
    else:
        assert max(map(len, done.output.splitlines())) <= 80
        assert len(done.output) < 20_000


def test_the_data_of_a_report_and_of_a_comparison_is_plain_short_json(hostile: Run, tmp_path: Path) -> None:
    page = write_report(hostile, tmp_path / "report.html")
    for text in (page.with_suffix(".json").read_text(encoding="utf-8"), json.dumps(compared([hostile, hostile]))):
        json.loads(text, parse_constant=pytest.fail)
        assert not STEERING.search(text)
        assert "mega" * 1_000 not in text


def test_a_picture_holds_drawings_only(hostile: Run) -> None:
    names = [metric.name for metric in hostile.metrics if hostile.sites_of(metric.name)]
    drawn = [figures.heatmap(hostile, "update.norm"), *(figures.lines(hostile, name) for name in names)]
    for figure in drawn:
        text = to_svg(figure)
        assert len(text) < 2_000_000
        assert ELSEWHERE not in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        for element in ElementTree.fromstring(text).iter():
            assert element.tag.rpartition("}")[2] in DRAWN
            for name, value in element.attrib.items():
                assert not name.startswith("on")
                assert not name.endswith("href") or value.startswith(("#", "data:image/png;base64,"))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the csv module of Python 3.10 can't write a NUL")
def test_each_text_stays_in_its_cell_of_a_csv_file(hostile: Run) -> None:
    frame = hostile.to_frame("pandas")
    text = io.StringIO(frame.to_csv(index=False), newline="")
    usual = csv.field_size_limit(2_000_000)
    try:
        rows = list(csv.DictReader(text))
    finally:
        csv.field_size_limit(usual)
    assert len(rows) == len(frame)
    for column in ("label", "status", "outcome", "metric", "site"):
        assert [row[column] for row in rows] == frame[column].fillna("").tolist()
