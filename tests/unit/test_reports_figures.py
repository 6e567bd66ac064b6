from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stabilitylab.errors import UsageError
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports import charting, figures
from stabilitylab.reports.svg import data_uri, to_svg
from tests.synthetic import make_run

RUNS = {
    "dying": {"edits": 20, "dies_at": 14},
    "healthy": {"edits": 20, "dies_at": None},
    "nothing yet": {"edits": 0, "dies_at": None},
    "hostile": {"edits": 10, "dies_at": 6, "hostile_labels": True, "sites": 13},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "run", **RUNS[request.param]))


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "run", edits=20, dies_at=14))


def all_figures(run: Run) -> dict[str, Figure]:
    drawn = {metric.name: figures.lines(run, metric.name) for metric in run.metrics if run.sites_of(metric.name)}
    drawn["canary range"] = figures.logit_range(run)
    drawn["editor"] = figures.editor_state(run)
    if run.sites_of("gradient.spectrum"):
        drawn["spectra"] = figures.spectra(run, run.sites_of("gradient.spectrum")[0])
    drawn["heatmap"] = figures.heatmap(run, "update.norm")
    return drawn


def verticals(figure: Figure) -> set[tuple[float, str]]:
    """(edit, colour) of the vertical lines through all of the first axes."""
    found = [line for line in figure.axes[0].get_lines() if list(line.get_ydata()) == [0, 1]]
    return {(float(np.asarray(line.get_xdata())[0]), str(line.get_color())) for line in found}


def test_every_chart_marks_the_flagged_edits_and_is_a_small_picture(run: Run) -> None:
    diagnosis = run.diagnosis()
    expected = {
        (float(edit), colour)
        for edit, colour in (
            (diagnosis.onset_edit, charting.ONSET),
            (diagnosis.alarm_edit, charting.MUTED),
            (diagnosis.first_bad_edit, charting.BAD),
        )
        if edit is not None
    }
    for name, figure in all_figures(run).items():
        assert verticals(figure) == expected, name
        svg = to_svg(figure)
        ElementTree.fromstring(svg)
        assert len(svg) < 80_000, name


def lane_points(figure: Figure, marker: str) -> list[tuple[float, float]]:
    """(edit, height) of the markers in a lane, where the height is a share of the axes'."""
    lane = figure.axes[0].get_xaxis_transform()
    lines = [
        line for line in figure.axes[0].get_lines() if line.get_marker() == marker and line.get_transform() == lane
    ]
    return [point for line in lines for point in _marked(line)]


def _marked(line: Line2D) -> list[tuple[float, float]]:
    x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
    return [(x[place], y[place]) for place in line.get_markevery()]  # type: ignore[union-attr]


def test_values_that_are_no_numbers_stand_at_the_edges(dying: Run) -> None:
    update = figures.lines(dying, "update.norm")
    nan, infinite, zero = lane_points(update, "x"), lane_points(update, "^"), lane_points(update, "o")
    assert {edit for edit, _ in nan} == set(range(15, 21))
    assert [edit for edit, _ in infinite] == [14.0]
    assert min(height for _, height in nan + infinite) > 0.8
    assert {edit for edit, _ in zero} == {0.0}
    assert max(height for _, height in zero) < 0.2
    headroom = figures.lines(dying, "weight.headroom_bits")
    assert {edit for edit, _ in lane_points(headroom, "v")} == set(range(14, 21))
    assert max(height for _, height in lane_points(headroom, "v")) < 0.2


def test_cells_are_numbers_non_finite_zero_or_blank(tmp_path: Path) -> None:
    names = ["a.fc1", "a.fc2"]
    writer = RunWriter(tmp_path / "run", {"sites": names}, [Metric("update.norm", "1", "log", "after", "", "", "")])
    for edit, values in enumerate([(0.0, 2.0), (1.0, np.nan), (np.inf, None), (0.0, 3.0)]):
        readings = {
            ("update.norm", name): np.array([value])
            for name, value in zip(names, values, strict=True)
            if value is not None
        }
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    figure = figures.heatmap(load(tmp_path / "run"), "update.norm")
    shown, bad, zero = (np.ma.getmaskarray(np.ma.asarray(mesh.get_array())) for mesh in figure.axes[0].collections)
    cells = ["+-?"[place] for place in np.argmax([~shown, ~bad, ~zero], axis=0).ravel()]
    blank = (shown & bad & zero).ravel()
    assert "".join(" " if empty else cell for cell, empty in zip(cells, blank, strict=True)) == "?+-?+- +"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"NaN, ∞", "0"}


def test_legends_stay_within_the_figure(tmp_path: Path) -> None:
    names = [f"{place}.{'long' * 9}" for place in range(8)]
    writer = RunWriter(tmp_path / "run", {"sites": names}, [Metric("update.norm", "1", "log", "after", "", "", "")])
    writer.append(EditRow(0, "", "start", 0.0, 1.0, 0.0, 0.0, readings={("update.norm", n): np.ones(1) for n in names}))
    writer.close()
    figure = figures.lines(load(tmp_path / "run"), "update.norm")
    with charting.style():
        box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 < figure.axes[0].get_window_extent().y0


def test_what_was_not_taken_is_a_gap_and_no_marker(dying: Run) -> None:
    kl = figures.lines(dying, "canary.kl")
    assert 7.0 not in {edit for edit, _ in lane_points(kl, "x")}  # edit 7 failed: the canary was not forwarded
    (line,) = (line for line in kl.axes[0].get_lines() if line.get_label() == "model")
    drawn = np.asarray(line.get_ydata(), dtype=float)
    assert np.isnan(drawn[7])
    assert np.isfinite(drawn[1:7]).all()


def test_lines_show_the_numbers_of_the_run(dying: Run) -> None:
    figure = figures.lines(dying, "gradient.norm")
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].get_lines()}
    for site, name in zip(dying.sites_of("gradient.norm"), ("1.fc1", "1.fc2", "2.fc1", "2.fc2"), strict=True):
        np.testing.assert_array_equal(lines[name], dying.series("gradient.norm", site))
    assert figure.axes[0].get_yscale() == "log"


def test_the_unit_that_was_divided_by_nothing_is_named(dying: Run) -> None:
    texts = {text.get_text() for text in figures.editor_state(dying).axes[0].texts}
    assert "unit 117" in texts


def test_absolute_limits_are_drawn_and_drift_has_none(dying: Run) -> None:
    agreement = figures.lines(dying, "canary.agreement")
    assert "limit 0.1" in {text.get_text() for text in agreement.axes[0].texts}
    drift = figures.lines(dying, "update.norm")
    assert "drift" in {finding.rule for finding in dying.diagnosis().findings if finding.metric == "update.norm"}
    assert not [text for text in drift.axes[0].texts if text.get_text().startswith("limit")]


def test_unknown_metric_names_the_nearest(dying: Run) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'update\.norm'"):
        figures.lines(dying, "update.nrom")


def test_a_linear_metric_that_explodes_keeps_its_beginning_readable(tmp_path: Path) -> None:
    metric = Metric("logits.max", "logit", "linear", "during", "", "", "")
    writer = RunWriter(tmp_path / "run", {"closed": True}, [metric])
    for edit, value in enumerate([10.0, 11.0, 12.0, 9.0, 10.0, 3e20, -4e25, 11.0]):
        readings = {("logits.max", "model"): np.array([value])}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    figure = figures.lines(load(tmp_path / "run"), "logits.max")
    assert figure.axes[0].get_yscale() == "symlog"
    ElementTree.fromstring(to_svg(figure))


@pytest.mark.parametrize("values", [[1.37, 4.5e-297, 4.5e-297], [1e308, 3.0, 2.0, 1.0, -1e308], [1e-308, 2e-308, 1.0]])
def test_an_axis_holds_whatever_floats_can(values: list[float], tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"closed": True}, [Metric("mine.size", "1", "linear", "after", "", "", "")])
    for edit, value in enumerate(values):
        readings = {("mine.size", "model"): np.array([value])}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    figure = figures.lines(load(tmp_path / "run"), "mine.size")
    low, high = figure.axes[0].get_ylim()
    assert low <= min(values) * (1 - 1e-9) or low <= -1e307
    assert high >= max(values) * (1 - 1e-9) or high >= 1e307
    ElementTree.fromstring(to_svg(figure))


def test_the_words_beside_an_axis_are_within_the_picture(tmp_path: Path) -> None:
    metrics = [Metric(f"canary.{name}", "logit", "linear", "after", "", "", "") for name in ("min", "max")]
    writer = RunWriter(tmp_path / "run", {"closed": True}, metrics)
    for edit in range(9):
        readings = {
            (f"canary.{name}", "model"): np.array([sign * 8e3 * edit]) for name, sign in (("min", -1), ("max", 1))
        }
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    figure = figures.logit_range(load(tmp_path / "run"))
    with charting.style():
        box = figure.axes[0].yaxis.get_tightbbox(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    assert box is not None
    assert box.x0 >= 0


def test_many_points_become_a_picture_and_stay_small(tmp_path: Path) -> None:
    names = [f"layers.{place}.fc" for place in range(100)]
    writer = RunWriter(tmp_path / "run", {"sites": names}, [Metric("update.norm", "1", "log", "after", "", "", "")])
    rng = np.random.default_rng(0)
    for edit in range(160):
        readings = {("update.norm", name): np.exp(rng.standard_normal(1)) for name in names}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    run = load(tmp_path / "run")
    assert len(to_svg(figures.lines(run, "update.norm"))) < 200_000
    assert len(to_svg(figures.heatmap(run, "update.norm"))) < 200_000


def test_pictures_are_the_same_each_time_and_turn_dark(dying: Run) -> None:
    first, again = (to_svg(figures.lines(dying, "drift.norm")) for _ in range(2))
    assert first == again
    assert "prefers-color-scheme:dark" in first
    assert data_uri(first).startswith("data:image/svg+xml;base64,")


def test_settings_of_the_user_are_left_alone(dying: Run) -> None:
    with mpl.rc_context({"font.size": 31.0}):
        figure = figures.lines(dying, "drift.norm")
        to_svg(figure)
        assert mpl.rcParams["font.size"] == 31.0
        assert figure.axes[0].xaxis.label.get_fontsize() < 12


def test_neither_torch_nor_pyplot_is_needed(dying: Run, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
import stabilitylab
from pathlib import Path
from stabilitylab.reports import SINKS, sink_class
from stabilitylab.reports.console import diagnosis_page
from stabilitylab.reports.html import write_report
run = stabilitylab.load({str(dying.path)!r})
write_report(run, Path({str(tmp_path / "page.html")!r}))
diagnosis_page(run), [sink_class(name) for name in SINKS]
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_for_a_paper_text_stays_text_and_a_figure_is_a_column_wide(dying: Run, tmp_path: Path) -> None:
    site = dying.sites_of("gradient.spectrum")[0]
    usual = figures.lines(dying, "update.norm")
    before = dict(mpl.rcParams)
    with figures.style():
        made = {
            "lines": figures.lines(dying, "update.norm"),
            "heatmap": figures.heatmap(dying, "update.norm"),
            "spectra": figures.spectra(dying, site),
            "range": figures.logit_range(dying),
            "editor": figures.editor_state(dying),
        }
        for name, figure in made.items():
            figure.savefig(tmp_path / f"{name}.svg")
            figure.savefig(tmp_path / f"{name}.pdf")
    assert dict(mpl.rcParams) == before
    for name, figure in made.items():
        assert figure.get_figwidth() < usual.get_figwidth()
        svg = ElementTree.parse(tmp_path / f"{name}.svg")
        words = {"".join(element.itertext()) for element in svg.iter() if element.tag.endswith("text")}
        assert "edit" in words, name
        assert any("first bad" in word for word in words), name
        assert b"/Type3" not in (tmp_path / f"{name}.pdf").read_bytes(), name
    assert figures.lines(dying, "update.norm").get_figwidth() == usual.get_figwidth()


def test_a_style_file_of_ones_own(dying: Run, tmp_path: Path) -> None:
    (tmp_path / "my.mplstyle").write_text("figure.figsize: 7, 3\nlines.linewidth: 3\n")
    with figures.style(tmp_path / "my.mplstyle"):
        assert figures.lines(dying, "update.norm").get_figwidth() == 7.0
    with (
        pytest.raises(UsageError, match=r"style 'papre': .*; expected 'paper', or a style file"),
        figures.style("papre"),
    ):
        pass


def test_the_paper_style_is_matplotlibs_by_name() -> None:
    with mpl.style.context("stabilitylab.reports.paper"):
        assert (mpl.rcParams["pdf.fonttype"], mpl.rcParams["svg.fonttype"]) == (42, "none")
