from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from stabilitylab.analysis import Analyzer, severity
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.reports.tensorboard import TensorBoardSink, site_tag
from stabilitylab.reports.tensorboard_dashboards import hyperparameters
from tests.synthetic import HOSTILE, make_run

METRICS = (
    Metric("update.norm", "1", "log", "after", "How far.", "‖ΔW‖", "—"),
    Metric("logits.max", "logit", "linear", "during", "The largest.", "max z", "—"),
    Metric("gradient.spectrum", "1", "log", "during", "σ", "σ", "—", 32),
    Metric("editor.learning_rate", "1", "linear", "before", "α", "α", "—", 64),
)


def row(edit: int, **readings: float | list[float]) -> EditRow:
    named = {
        (name.replace("__", "."), "layer"): np.atleast_1d(np.array(value, dtype=float))
        for name, value in readings.items()
    }
    return EditRow(edit, "", "applied", 1.7e9, 1.0, 0.1, 0.05, readings=named)


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in read_back(folder).Scalars(tag)}


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[TensorBoardSink]:
    made = TensorBoardSink(tmp_path, METRICS)
    yield made
    made.close()


def test_values_are_on_disk_when_the_edit_is_over(sink: TensorBoardSink, tmp_path: Path) -> None:
    for edit in (3, 4):  # the writer's thread flushes the first event by itself
        sink.on_row(row(edit, update__norm=100.0, logits__max=12.5), None)
    assert scalars(tmp_path, "update.norm log10/layer") == {3: pytest.approx(2.0), 4: pytest.approx(2.0)}
    assert scalars(tmp_path, "logits.max/layer") == {3: 12.5, 4: 12.5}
    assert scalars(tmp_path, "seconds/probes") == {3: pytest.approx(0.1), 4: pytest.approx(0.1)}


def test_an_edit_is_one_event(sink: TensorBoardSink, tmp_path: Path) -> None:
    sink.on_row(row(1, update__norm=1.0, logits__max=2.0), None)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_size
    sink.on_row(row(2, update__norm=1.0, logits__max=2.0), None)
    assert file.stat().st_size - before < 600
    assert {event.wall_time for event in read_back(tmp_path).Scalars("logits.max/layer")} == {1.7e9}


def test_what_is_no_number_is_counted_and_never_written(sink: TensorBoardSink, tmp_path: Path) -> None:
    sink.on_row(row(1, update__norm=2.0, logits__max=3.0, gradient__spectrum=[4.0, 2.0]), None)
    sink.on_row(row(2, update__norm=math.inf, logits__max=1e39, gradient__spectrum=[math.nan, math.nan]), None)
    sink.on_row(row(3, update__norm=-1.0, logits__max=1e38), None)
    assert scalars(tmp_path, "update.norm log10/layer").keys() == {1}
    assert scalars(tmp_path, "logits.max/layer").keys() == {1, 3}
    assert scalars(tmp_path, "nonfinite/update") == {1: 0, 2: 1, 3: 1}
    assert scalars(tmp_path, "nonfinite/logits") == {1: 0, 2: 1, 3: 0}
    assert scalars(tmp_path, "nonfinite/gradient") == {1: 0, 2: 2}
    assert scalars(tmp_path, "nonfinite/total") == {1: 0, 2: 4, 3: 1}


def test_values_beyond_float32_have_a_logarithm_and_zero_is_left_out(sink: TensorBoardSink, tmp_path: Path) -> None:
    sink.on_row(row(1, update__norm=0.0), None)
    sink.on_row(row(2, update__norm=1e300), None)
    assert scalars(tmp_path, "update.norm log10/layer") == {2: pytest.approx(300.0)}
    assert scalars(tmp_path, "nonfinite/total") == {1: 0, 2: 0}


def test_of_many_values_the_powers_of_two_are_kept(sink: TensorBoardSink, tmp_path: Path) -> None:
    sink.on_row(
        row(1, gradient__spectrum=[10.0**-place for place in range(32)], editor__learning_rate=[1.0, 2.0, 3.0]), None
    )
    tags = read_back(tmp_path).Tags()["scalars"]
    spectrum = [tag.rpartition("/")[2] for tag in tags if tag.startswith("gradient.spectrum")]
    assert spectrum == ["01", "02", "04", "08", "16", "32"]
    assert scalars(tmp_path, "gradient.spectrum log10/layer/04") == {1: pytest.approx(-3.0)}
    assert scalars(tmp_path, "editor.learning_rate/layer/03") == {1: 3.0}


def test_bad_values_are_counted_where_none_would_be_written(sink: TensorBoardSink, tmp_path: Path) -> None:
    sink.on_row(row(1, gradient__spectrum=[1.0] * 10 + [math.nan] * 22), None)
    assert scalars(tmp_path, "nonfinite/gradient") == {1: 22}


@pytest.mark.parametrize(
    ("site", "tag"),
    [
        ("language_model.model.decoder.layers.1.fc1", "layers.1.fc1 of language_model.model.decoder"),
        ("h.0.mlp", "h.0.mlp"),
        ("model", "model"),
    ],
)
def test_the_end_of_a_name_comes_first_since_titles_are_cut(site: str, tag: str) -> None:
    assert site_tag(site) == tag


def write(run: Run, folder: Path) -> EventAccumulator:
    sink, analyzer = TensorBoardSink(folder, run.metrics), Analyzer(run.metrics)
    for edit in run.edits:
        analyzer.observe(edit.row)
        sink.on_row(edit.row, analyzer.diagnosis())
    sink.close()
    return read_back(folder)


def test_a_whole_run_reads_back_as_it_was(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=20, dies_at=14))
    events = write(run, tmp_path / "events")
    for metric in run.metrics:
        for site in run.sites_of(metric.name) if metric.length == 1 else ():
            tag = f"{metric.name}{' log10' if metric.scale == 'log' else ''}/{site_tag(site)}"
            series = run.series(metric.name, site)
            with np.errstate(divide="ignore"):
                shown = np.log10(series) if metric.scale == "log" else series
            written = {
                int(edit): value for edit, value in zip(run.edit_numbers, shown, strict=True) if np.isfinite(value)
            }
            found = {event.step: event.value for event in events.Scalars(tag)} if written else {}
            assert found == pytest.approx(written, rel=1e-6, abs=1e-7), tag
    verdicts = [event.value for event in events.Scalars("verdict/severity")]
    assert (verdicts[0], verdicts[-1]) == (0.0, severity(run.diagnosis().verdict))
    said = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("verdict/says")]
    assert all(line.startswith("    ") for text in said for line in text.splitlines())
    assert "unit 117" in " ".join(said[-1].split())
    assert len(said) == len(set(verdicts))


def test_hostile_names_make_harmless_tags(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=4, dies_at=2, sites=len(HOSTILE), hostile_labels=True))
    tags = write(run, tmp_path / "events").Tags()["scalars"]
    assert max(map(len, tags)) < 400
    # Round brackets: Custom Scalars takes what is in the first pair of a series' name for its run, and draws nothing.
    assert not [tag for tag in tags if any(char in tag for char in "\x00\x1b\u202e\n()")]
    assert len([tag for tag in tags if tag.startswith("update.norm")]) == len(HOSTILE)


def layout_of(events: EventAccumulator) -> layout_pb2.Layout:
    (event,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def test_custom_scalars_has_a_category_per_family_whose_charts_find_their_tags(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=8, dies_at=5))
    events = write(run, tmp_path / "events")
    layout, tags = layout_of(events), events.Tags()["scalars"]
    titles = [category.title for category in layout.category]
    assert titles[0] == "Verdict"
    assert {"Updates", "Drift", "Activations", "Gradients", "Logits", "Canary"} <= set(titles)
    for category in layout.category[1:]:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            found = {tag for tag in tags if re.match(pattern, tag)}
            if run.sites_of(chart.title):
                assert found == {tag for tag in tags if tag.split("/")[0].split(" ")[0] == chart.title}
    for chart in layout.category[0].chart:
        assert [tag for tag in tags if re.match(chart.multiline.tag[0], tag)], chart.title


ABOUT = {
    "sites": ["a", "b", "c"],
    "editor_class": "stabilitylab.editors.mend.Mend",
    "model_class": "transformers.Blip2",
    "dtypes": {"float32": 2, "float16": 60},
    "config": {"lr": 1e-4, "layers": [1, 2], "shared": True, "editor": "mine", "note": HOSTILE[0]},
}


def test_hyperparameters_are_what_the_run_was_made_with() -> None:
    assert hyperparameters(ABOUT) == {
        "sites": 3,
        "editor": "Mend",
        "model": "Blip2",
        "precision": "float16, float32",
        "lr": 1e-4,
        "layers": "[1, 2]",
        "shared": True,
        "config.editor": "mine",
        "note": HOSTILE[0],
    }
    assert hyperparameters({"config": {"precision": "fp16"}, "sites": []}) == {"precision": "fp16"}
    assert hyperparameters({"config": None, "dtypes": None}) == {}


def test_hparams_has_one_session_per_run_with_what_became_of_it(tmp_path: Path) -> None:
    """As TensorBoard's own plugin reads it."""
    verdicts = {}
    for name, dies_at in (("dying", 14), ("healthy", None)):
        run = load(make_run(tmp_path / "runs" / name, edits=18, dies_at=dies_at))
        sink, analyzer = TensorBoardSink(tmp_path / "logdir" / name, run.metrics, ABOUT), Analyzer(run.metrics)
        for edit in run.edits:
            analyzer.observe(edit.row)
            sink.on_row(edit.row, analyzer.diagnosis())
        sink.close()
        verdicts[name] = analyzer.diagnosis()
    found = hparams_page(tmp_path / "logdir")
    assert [info["name"] for info in found["experiment"]["hparamInfos"]] == sorted(hyperparameters(ABOUT))
    sessions = {group["sessions"][0]["name"]: group for group in found["groups"]["sessionGroups"]}
    assert sessions.keys() == verdicts.keys()
    for name, group in sessions.items():
        assert group["hparams"]["sites"] == 3
        assert group["hparams"]["note"] == HOSTILE[0]
        (session,) = group["sessions"]
        assert session["status"] == "STATUS_SUCCESS"
        values = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
        assert values["verdict/last_edit"] == 18
        assert values["verdict/severity"] == severity(verdicts[name].verdict)
        assert values.get("verdict/onset_edit") == verdicts[name].onset_edit


def hparams_page(logdir: Path) -> dict[str, Any]:
    """What the dashboard asks for, from a TensorBoard without a port. In its own process: it warns while importing."""
    code = f"""
import json
from tensorboard import default, program
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_ingester
from werkzeug.test import Client

board = program.TensorBoard(plugins=default.get_static_plugins())
board.configure(argv=["tensorboard", "--logdir", {str(logdir)!r}])
ingester = data_ingester.LocalDataIngester(board.flags)
ingester._multiplexer.AddRunsFromDirectory({str(logdir)!r})
ingester._multiplexer.Reload()
client = Client(application.TensorBoardWSGIApp(
    board.flags, board.plugin_loaders, ingester.data_provider, None, ingester.deprecated_multiplexer
))
ask = lambda address, **body: json.loads(client.post("/data/plugin/hparams" + address, json=body).text)
experiment = ask("/experiment", experimentName="")
columns = [{{"metric": info["name"]}} for info in experiment["metricInfos"]]
statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
groups = ask("/session_groups", experimentName="", allowedStatuses=statuses, colParams=columns, startIndex=0,
    sliceSize=9)
print(json.dumps({{"experiment": experiment, "groups": groups}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return page


def test_without_a_manifest_there_is_no_session(sink: TensorBoardSink, tmp_path: Path) -> None:
    sink.on_row(row(1, logits__max=1.0), None)
    events = read_back(tmp_path)
    assert not [tag for tag in events.Tags()["tensors"] if "hparams" in tag]
    assert layout_of(events).category


def test_a_session_that_was_not_closed_has_no_end(tmp_path: Path) -> None:
    made = TensorBoardSink(tmp_path, METRICS, ABOUT)
    assert "_hparams_/session_start_info" in read_back(tmp_path).Tags()["tensors"]
    assert "_hparams_/session_end_info" not in read_back(tmp_path).Tags()["tensors"]
    made.close()
    assert "_hparams_/session_end_info" in read_back(tmp_path).Tags()["tensors"]
