"""Charts for a notebook: what is in them, that Vega draws them, and that text from the run stays data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair as alt
import numpy as np
import pytest
import vl_convert

from stabilitylab.errors import UsageError
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports import chart_parts, charting, interactive
from tests.injections import hostile_run as write_hostile
from tests.synthetic import HOSTILE, make_run

RUNS = {
    "dying": {"edits": 20, "dies_at": 14},
    "healthy": {"edits": 20, "dies_at": None},
    "nothing yet": {"edits": 0, "dies_at": None},
    "hostile": {"edits": 14, "dies_at": 9, "hostile_labels": True, "sites": len(HOSTILE)},
}
Spec = dict[str, Any]


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "run", **RUNS[request.param]))


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "run", edits=20, dies_at=14))


def all_charts(run: Run) -> dict[str, alt.LayerChart]:
    drawn = {
        "log": run.plot.lines("update.norm"),
        "linear": run.plot.lines("weight.headroom_bits"),
        "heatmap": run.plot.heatmap("update.norm"),
        "canary": run.plot.logit_range(),
        "vector": run.plot.lines("editor.learning_rate"),
    }
    if run.sites_of("gradient.spectrum"):
        drawn["spectra"] = run.plot.spectra(run.sites_of("gradient.spectrum")[0])
        drawn["logits"] = run.plot.logit_range("logits")
    return drawn


def plain(chart: alt.LayerChart) -> Spec:
    """The specification, as Altair's schema allows it and JSON can hold it."""
    spec: Spec = json.loads(json.dumps(chart.to_dict(validate=True), allow_nan=False))
    return spec


def rows_of(spec: Spec) -> Iterator[dict[str, Any]]:
    """Every record of every data set, unfolded as the browser does."""
    for rows in spec["datasets"].values():
        for row in json.loads(rows):
            folded = {name: value for name, value in row.items() if isinstance(value, list)}
            for place in range(max(map(len, folded.values()), default=1)):
                each = {**row, **{name: value[place] for name, value in folded.items()}}
                reading = each.get("reading")
                yield {**each, "value": each.get("value", None if isinstance(reading, str) else reading)}


def svg_of(spec: Spec) -> str:
    svg: str = vl_convert.vegalite_to_svg(json.dumps(spec))
    return svg


def test_every_chart_is_valid_drawn_and_marks_the_flagged_edits(run: Run) -> None:
    flagged = {f"{name}: edit {edit}" for edit, name, *_ in charting.flagged(run.diagnosis())}
    for name, chart in all_charts(run).items():
        assert isinstance(chart, alt.LayerChart), name
        spec = plain(chart)
        assert {row["mark"] for row in rows_of(spec) if "mark" in row} == flagged, name
        svg = svg_of(spec)
        ElementTree.fromstring(svg)
        for words in flagged:
            assert words in svg, name
        assert spec["width"] <= 640


def drawn(spec: Spec) -> dict[tuple[str, int], tuple[float | None, str]]:
    """(value, kind) by (whole name of the site, edit)."""
    return {
        (row["whole"], row["edit"]): (row["value"], row["reading"] if isinstance(row["reading"], str) else "")
        for row in rows_of(spec)
        if "whole" in row
    }


@pytest.mark.parametrize("metric", ["update.norm", "weight.headroom_bits", "activation.nonfinite"])
@pytest.mark.parametrize("how", ["lines", "heatmap"])
def test_every_reading_is_there_and_what_is_no_number_is_in_a_lane(dying: Run, metric: str, how: str) -> None:
    log = dying.metric(metric).scale == "log"
    found = drawn(plain(getattr(dying.plot, how)(metric)))
    assert len(found) == len(dying.sites_of(metric)) * len(dying.edits)
    for site in dying.sites_of(metric):
        there = dying.present(metric, site)
        for edit, value, taken in zip(dying.edits, dying.series(metric, site).tolist(), there, strict=True):
            shown, kind = found[site, edit.edit]
            if not taken:
                assert (shown, kind) == (None, "")
            elif math.isfinite(value) and (value > 0 or not log):
                assert shown == pytest.approx(value, rel=1e-5)
                assert kind == ""
            else:
                assert shown is None
                assert kind == {"nan": "NaN", "inf": "∞", "-inf": "−∞", "0.0": "0"}[str(value)]


def lanes(spec: Spec) -> set[str]:
    return {row["words"] for row in rows_of(spec) if "words" in row and not row["words"].startswith("limit")}


def test_a_lane_stands_only_where_something_is_in_it(dying: Run, tmp_path: Path) -> None:
    assert lanes(plain(dying.plot.lines("update.norm"))) == {"NaN, ∞", "0"}
    assert lanes(plain(dying.plot.lines("weight.headroom_bits"))) == {"−∞"}
    healthy = load(make_run(tmp_path / "run", edits=12, dies_at=None))
    assert lanes(plain(healthy.plot.lines("activation.rms"))) == set()


def test_axes_are_logarithmic_where_the_metric_says_so(dying: Run) -> None:
    def kinds(spec: Any) -> set[str]:
        if isinstance(spec, dict):
            scale = (spec.get("encoding") or {}).get("y", {}).get("scale") or {}
            return (
                {str(scale["type"])} & {"log", "linear", "symlog"}
                if "type" in scale
                else set().union(*map(kinds, spec.values()))
            )
        return set().union(*map(kinds, spec)) if isinstance(spec, list) else set()

    assert kinds(plain(dying.plot.lines("update.norm"))) == {"log"}
    assert "log" not in kinds(plain(dying.plot.lines("weight.headroom_bits")))
    assert kinds(plain(dying.plot.spectra(dying.sites_of("gradient.spectrum")[0]))) == {"log"}


def test_rings_stand_on_readings(dying: Run) -> None:
    metric = next(each.metric for each in dying.diagnosis().findings if each.verdict != "stable")
    spec = plain(dying.plot.lines(metric))
    rings = [row for row in rows_of(spec) if "says" in row]
    values = {(edit, value) for (_, edit), (value, _) in drawn(spec).items()}
    assert all(
        any(
            edit == row["edit"] and value == pytest.approx(row["value"], rel=1e-5)
            for edit, value in values
            if value is not None
        )
        for row in rings
    )


def test_charts_can_be_put_side_by_side_and_made_narrower(dying: Run) -> None:
    first, second = dying.plot.lines("update.norm"), dying.plot.lines("drift.ratio")
    assert svg_of(plain(first | second))
    assert svg_of(plain(first & dying.plot.heatmap("update.norm")))
    narrow = ElementTree.fromstring(svg_of(plain(first.properties(width=300))))
    usual = ElementTree.fromstring(svg_of(plain(first)))
    assert float(narrow.get("width", "0")) < float(usual.get("width", "0"))


def test_sites_are_chosen_by_name_and_by_pattern(dying: Run) -> None:
    sites = dying.sites_of("update.norm")
    for chosen, expected in (
        (sites[1], {sites[1]}),
        ([sites[0], sites[2]], {sites[0], sites[2]}),
        ("*.fc2", {site for site in sites if site.endswith(".fc2")}),
        (None, set(sites)),
    ):
        assert {site for site, _ in drawn(plain(dying.plot.lines("update.norm", chosen)))} == expected
        assert {site for site, _ in drawn(plain(dying.plot.heatmap("update.norm", chosen)))} == expected


def test_a_wrong_name_names_the_nearest(dying: Run) -> None:
    site = dying.sites_of("update.norm")[0]
    with pytest.raises(UsageError, match=r"no metric 'update.nrom' in this run; did you mean 'update.norm'"):
        dying.plot.lines("update.nrom")
    with pytest.raises(UsageError, match=r"no metric 'update.nrom'"):
        dying.plot.heatmap("update.nrom")
    with pytest.raises(UsageError, match=f"no site '{site}x'; did you mean '{site}'"):
        dying.plot.lines("update.norm", f"{site}x")
    with pytest.raises(UsageError, match="no site"):
        dying.plot.spectra("nowhere")
    with pytest.raises(UsageError, match=r"no metric 'canry.max'"):
        dying.plot.logit_range("canry")  # type: ignore[arg-type]


def expressions(spec: Any) -> Iterator[str]:
    """Everything in a specification that Vega evaluates."""
    if isinstance(spec, dict):
        for name, value in spec.items():
            if name == "datasets":
                continue
            if name in {"expr", "labelExpr", "calculate", "test", "filter", "signal"} and isinstance(value, str):
                yield value
            yield from expressions(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from expressions(value)


def test_hostile_text_is_data_and_nothing_else(tmp_path: Path, dying: Run) -> None:
    hostile = load(make_run(tmp_path / "run", edits=14, dies_at=9, hostile_labels=True, sites=len(HOSTILE)))
    ours = {each for chart in all_charts(dying).values() for each in expressions(plain(chart))}
    for name, chart in all_charts(hostile).items():
        spec = plain(chart)
        assert set(expressions(spec)) <= ours, name
        assert len(json.dumps(spec)) < 300_000, name
        assert not [
            row for row in rows_of(spec) for value in row.values() if isinstance(value, str) and not value.isprintable()
        ]
        svg = ElementTree.fromstring(svg_of(spec))
        tags = {element.tag.rpartition("}")[2] for element in svg.iter()}
        assert not tags & {"script", "foreignObject", "image", "a", "style", "iframe"}, name
        assert not [key for element in svg.iter() for key in element.attrib if key.lower().startswith("on")], name


def test_nothing_in_a_chart_can_end_the_script_that_altair_writes_it_into(tmp_path: Path) -> None:
    run = load(write_hostile(tmp_path / "run"))
    metrics = list({metric.family: metric.name for metric in run.metrics if run.sites_of(metric.name)}.values())
    made = [run.plot.lines(metric) for metric in metrics] + [run.plot.heatmap(metric) for metric in metrics[:3]]
    for chart in made:
        assert "<" not in json.dumps(chart.to_dict(), ensure_ascii=False)
    (labels,) = {tuple(row["label"] for row in rows_of(plain(chart)) if "label" in row)[:2] for chart in made}
    assert "<script>" in labels[0]


def test_names_that_are_cut_to_the_same_stay_apart(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=9, dies_at=None, hostile_labels=True, sites=3 * len(HOSTILE)))
    spec = plain(run.plot.lines("update.norm"))
    assert len({row["site"] for row in rows_of(spec) if "whole" in row}) == len(run.sites_of("update.norm"))


def grown(folder: Path, edits: int, sites: int) -> Run:
    metric = Metric("update.norm", "1", "log", "after", "size", "‖Δ‖", "—")
    names = [f"layers.{place}.fc" for place in range(sites)]
    writer = RunWriter(folder, {"sites": names, "closed": True}, [metric])
    for edit in range(edits + 1):
        size = np.array([math.nan if edit > 0.9 * edits else 1.0 + edit % 7])
        read = {("update.norm", name): size for name in names}
        writer.append(EditRow(edit, f"edit {edit}", "applied" if edit else "start", 0.0, 1.0, 0.0, 0.0, None, read))
    writer.close()
    return load(folder)


def test_more_rows_than_altair_takes_from_a_frame(tmp_path: Path) -> None:
    run = grown(tmp_path / "run", 300, 30)
    assert len(run.edits) * len(run.sites) > 5_000
    for chart in (run.plot.lines("update.norm"), run.plot.heatmap("update.norm")):
        spec = plain(chart)
        assert len(drawn(spec)) == 301 * 30
        assert len(json.dumps(spec)) < 60 * 301 * 30
        assert svg_of(spec)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([5e-324, 1e-320], id="denormal"),
        pytest.param([1e308, 1.7e308], id="as large as can be"),
        pytest.param([-1e308, 1e308], id="both ways"),
        pytest.param([3.0, 3.0], id="one value"),
        pytest.param([math.nan, math.nan], id="none"),
        pytest.param([0.0, 0.0], id="zero"),
        pytest.param([-2.0, -1.0], id="negative"),
    ],
)
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_values_at_the_ends_of_what_floats_hold_are_drawn(tmp_path: Path, values: list[float], scale: Any) -> None:
    metric = Metric("x.y", "1", scale, "after", "size", "x", "—")
    writer = RunWriter(tmp_path / "run", {"sites": ["fc"], "closed": True}, [metric])
    for edit, value in enumerate(values):
        read = {("x.y", "fc"): np.array([value])}
        writer.append(EditRow(edit, "", "applied" if edit else "start", 0.0, 1.0, 0.0, 0.0, None, read))
    writer.close()
    run = load(tmp_path / "run")
    for chart in (run.plot.lines("x.y"), run.plot.heatmap("x.y")):
        svg = svg_of(plain(chart))
        assert "NaN" not in "".join(element.get("d", "") for element in ElementTree.fromstring(svg).iter())


def test_the_palette_has_a_colour_per_named_line() -> None:
    assert len(set(interactive.LINES)) == chart_parts.NAMED
