from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from werkzeug.test import Client, TestResponse

from stabilitylab.analysis.grouping import grouped
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import load
from stabilitylab.record.store import FILE_NAME, SCHEMA_VERSION, RunWriter
from stabilitylab.reports.events import short_places
from stabilitylab.reports.headline import headline, telling
from stabilitylab.reports.manifest import title
from stabilitylab.reports.tensorboard_plugin import payload, shelf
from stabilitylab.reports.tensorboard_plugin.loader import StabilityLoader
from stabilitylab.reports.tensorboard_plugin.plugin import StabilityPlugin
from stabilitylab.reports.text import with_short_names
from stabilitylab.reports.verdicts import causes
from tests.injections import INJECTIONS, hostile_run
from tests.synthetic import make_run


def plugin_of(logdir: Path | str) -> StabilityPlugin:
    """The plugin, once it has looked through the logdir."""
    plugin = StabilityPlugin(SimpleNamespace(logdir=str(logdir)))
    if plugin._shelf is not None:
        plugin._shelf.look()
    return plugin


@dataclass
class Tab:
    """What a browser would ask for."""

    plugin: StabilityPlugin

    def __post_init__(self) -> None:
        apps = self.plugin.get_plugin_apps()
        self.client = Client(lambda environ, start: apps[environ["PATH_INFO"]](environ, start))

    def get(self, address: str, **arguments: str | int) -> TestResponse:
        return self.client.get(address, query_string={key: str(value) for key, value in arguments.items()})

    def json(self, address: str, **arguments: str | int) -> Any:
        answer = self.get(address, **arguments)
        assert answer.status_code == 200, answer.text
        found = json.loads(answer.text, parse_constant=pytest.fail)
        if address == "/run" and found["state"] == "judging":  # as the page does
            time.sleep(0.1)
            return self.json(address, **arguments)
        return found

    def arrays(self, address: str, **arguments: str | int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        answer = self.get(address, **arguments)
        assert answer.status_code == 200, answer.text
        return unpacked(answer.data)

    def read_ahead(self) -> Any:
        assert self.plugin._shelf is not None
        self.plugin._shelf.look()
        self.plugin._shelf.read_ahead()
        return {run["id"]: run for run in self.json("/runs")["runs"]}


def unpacked(data: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(values, taken) by name, read as the docstring of `payload.packed` says."""
    (length,) = struct.unpack_from("<I", data)
    offset, found = 4 + length, {}
    assert offset % 8 == 0
    for name, rows, columns in json.loads(data[4:offset]):
        size = rows * columns
        values = np.frombuffer(data, "<f8", size, offset).reshape(rows, columns)
        offset += 8 * size
        taken = np.frombuffer(data, np.uint8, size, offset).reshape(rows, columns).astype(bool)
        offset += size + -size % 8
        found[name] = (values, taken)
    assert offset == len(data)
    return found


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logdir")
    make_run(folder / "mend" / "dying", edits=16, dies_at=12)
    make_run(folder / "healthy", edits=12, dies_at=None)
    return folder


@pytest.fixture(scope="module")
def tab(logdir: Path) -> Tab:
    return Tab(plugin_of(logdir))


def test_runs_are_found_at_any_depth_with_their_verdicts(tab: Tab, logdir: Path) -> None:
    runs = tab.read_ahead()
    assert list(runs) == ["healthy", "mend/dying"]
    for name, said in runs.items():
        diagnosis = load(logdir / name).diagnosis()
        assert said["state"] == "read"
        assert (said["verdict"], said["onset_edit"]) == (diagnosis.verdict, diagnosis.onset_edit)
        assert (said["first_bad_edit"], said["cause"]) == (diagnosis.first_bad_edit, diagnosis.cause)
    assert tab.plugin.is_active()


def test_a_logdir_that_is_a_run_itself(logdir: Path) -> None:
    alone = Tab(plugin_of(logdir / "healthy"))
    assert list(alone.read_ahead()) == ["."]
    assert alone.json("/run", run=".")["verdict"] == "stable"


def test_what_is_said_of_a_run_is_the_analyzers(tab: Tab, logdir: Path) -> None:
    sent, run = tab.json("/run", run="mend/dying"), load(logdir / "mend" / "dying")
    diagnosis = run.diagnosis()
    places = short_places(run.sites)
    assert sent["title"] == title(run.manifest, diagnosis.edits)
    assert sent["diagnosis"]["says"] == with_short_names(headline(diagnosis, places), places)
    assert sent["diagnosis"]["cause_says"].lower() == with_short_names(diagnosis.cause_says, places).lower()
    assert sent["diagnosis"]["advice"].lower() == with_short_names(diagnosis.advice, places).lower()
    assert [finding["says"] for finding in sent["findings"]] == [finding.says for finding in diagnosis.findings]
    assert [tuple(link) for link in sent["diagnosis"]["causes"]] == causes(diagnosis, places)
    metric, site = telling(run, diagnosis) or ("", "")
    curve = sent["curve"]
    assert (sent["metrics"][curve["metric"]]["name"], sent["sites"][curve["site"]]) == (metric, site)
    assert curve["marks"][-1] == {"edit": diagnosis.first_nonfinite_edit, "name": "NaN or ∞"}
    assert len(diagnosis.causes) > 1
    assert sent["diagnosis"]["landed"].startswith(str(diagnosis.landed))
    assert sent["diagnosis"]["unwatched"] == "; ".join(diagnosis.unwatched) != ""
    assert [event["edit"] for event in sent["events"]] == [event.edit for event in grouped(diagnosis.findings)]
    assert sum(event["members"] for event in sent["events"]) == len(diagnosis.findings)
    assert {mark["name"]: mark["edit"] for mark in sent["marks"]} == {
        "onset": diagnosis.onset_edit,
        "alarm": diagnosis.alarm_edit,
        "first bad": diagnosis.first_bad_edit,
    }
    assert sent["sites"] == list(run.sites)
    assert sent["number"] == run.edit_numbers.tolist()
    assert [metric["name"] for metric in sent["metrics"]] == [m.name for m in run.metrics if run.sites_of(m.name)]


def test_every_reading_is_sent_bit_for_bit_and_absent_is_not_nan(tab: Tab, logdir: Path) -> None:
    sent, run = tab.json("/run", run="mend/dying"), load(logdir / "mend" / "dying")
    at = {"run": "mend/dying", "version": sent["version"]}
    seen = set()
    for number, metric in enumerate(sent["metrics"]):
        values, taken = tab.arrays("/values", **at, metric=number)["values"]
        for row, site in enumerate(metric["sites"]):
            name = run.sites[site]
            for column, edit in enumerate(run.edits):
                reading = edit.row.readings.get((metric["name"], name))
                assert taken[row, column] == (reading is not None)
                if reading is not None:
                    assert values[row, column].tobytes() == reading[:1].tobytes()
                    seen.add("nan" if np.isnan(reading[0]) else "inf" if np.isinf(reading[0]) else "finite")
                else:
                    seen.add("absent")
    assert seen == {"nan", "inf", "finite", "absent"}
    for site, name in enumerate(run.sites):
        for number, (values, taken) in tab.arrays("/site", **at, site=site).items():
            metric_name = sent["metrics"][int(number)]["name"]
            for line, mask, edit in zip(values, taken, run.edits, strict=True):
                reading = edit.row.readings.get((metric_name, name), np.zeros(0))
                assert line[mask].tobytes() == reading.tobytes()


def test_headers(tab: Tab) -> None:
    version = tab.json("/run", run="healthy")["version"]
    for address, kind in (
        ("/index.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/runs", "application/json"),
        ("/run?run=healthy", "application/json"),
        ("/run?run=nope", "application/json"),
        (f"/values?run=healthy&version={version}&metric=0", "application/octet-stream"),
    ):
        answer = tab.client.get(address)
        assert answer.headers["Content-Type"] == kind
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "no-cache" in answer.headers["Cache-Control"]


def test_nothing_can_be_written(tab: Tab) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert tab.client.open("/run?run=healthy", method=method).status_code == 405


OUTSIDE = (
    "..", "../outside", "healthy/../../outside", "%2e%2e/outside", "..%2foutside", "link", "linked", "linked/run.db",
    "healthy/", "healthy/run.db", "./healthy", "//healthy", "", "healthy\x00", "healthy%00", "\udcff", "a" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_name_that_was_not_found_under_the_logdir_is_refused(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "outside", edits=1, dies_at=None, sites=1)
    make_run(tmp_path / "logdir" / "healthy", edits=1, dies_at=None, sites=1)
    (tmp_path / "logdir" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "logdir" / "linked").mkdir()
    (tmp_path / "logdir" / "linked" / FILE_NAME).symlink_to(tmp_path / "outside" / FILE_NAME)
    inside = Tab(plugin_of(tmp_path / "logdir"))
    assert list(inside.read_ahead()) == ["healthy"]
    given = name.encode("utf-8", "surrogateescape").decode("latin-1")
    for address in ("/run", "/values", "/site"):
        answer = inside.get(address, run=given, version="0", metric=0, site=0)
        assert answer.status_code == 404, answer.text
        assert "outside" not in answer.text
    assert inside.get("/run", run=str(tmp_path / "outside")).status_code == 404


def test_a_run_that_becomes_a_link_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "outside", edits=2, dies_at=None, sites=1)
    make_run(tmp_path / "logdir" / "file", edits=1, dies_at=None, sites=1)
    make_run(tmp_path / "logdir" / "folder", edits=1, dies_at=None, sites=1)
    inside = Tab(plugin_of(tmp_path / "logdir"))
    (tmp_path / "logdir" / "file" / FILE_NAME).unlink()
    (tmp_path / "logdir" / "file" / FILE_NAME).symlink_to(tmp_path / "outside" / FILE_NAME)
    shutil.rmtree(tmp_path / "logdir" / "folder")
    (tmp_path / "logdir" / "folder").symlink_to(tmp_path / "outside")
    assert inside.get("/run", run="file").status_code == 404
    assert inside.get("/run", run="folder").status_code == 404


def test_a_pipe_by_the_name_of_a_run_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / FILE_NAME)
    assert not plugin_of(tmp_path).is_active()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"metric": "999"}, 404), ({"metric": "-1"}, 400), ({"metric": "1e3"}, 400), ({"metric": ""}, 400),
        ({"metric": "²"}, 400), ({"metric": "9" * 5_000}, 400), ({}, 400), ({"metric": "0", "version": "old"}, 409),
    ],
)  # fmt: skip
def test_numbers_and_versions_that_are_none_are_refused(tab: Tab, arguments: dict[str, str], code: int) -> None:
    version = tab.json("/run", run="healthy")["version"]
    answer = tab.get("/values", **{"run": "healthy", "version": version, **arguments})
    assert answer.status_code == code
    assert len(json.loads(answer.text)["error"]) < 200


HIDDEN = "".join(map(chr, [*range(32), *range(127, 160), 0x200B, 0x200F, 0x202E, 0x2028, 0x2029, 0x2060, 0xFEFF]))


def test_injections_are_text_without_control_characters(tmp_path: Path) -> None:
    hostile_run(tmp_path / "<img src=x onerror=alert(1)>\u202e\n")
    hostile = Tab(plugin_of(tmp_path))
    (run,) = hostile.read_ahead()
    assert run.isascii()
    listed, sent = hostile.get("/runs"), hostile.get("/run", run=run)
    for answer in (listed, sent):
        assert answer.status_code == 200
        assert len(answer.data) < 1_000_000
        answer.data.decode("ascii")
        shown = json.dumps(json.loads(answer.text), ensure_ascii=False)
        assert not set(shown) & set(HIDDEN)
        shown.encode("utf-8")  # no lone surrogate
    about = json.loads(sent.text)
    assert INJECTIONS["script"] in about["label"]
    assert f"layers.0.{INJECTIONS['script']}" in about["sites"]
    for names in (about["sites"], [metric["name"] for metric in about["metrics"]]):
        assert len(set(names)) == len(names)
    for site in range(len(about["sites"])):
        assert hostile.get("/site", run=run, version=about["version"], site=site).status_code == 200


def test_names_that_cutting_made_alike_are_told_apart() -> None:
    assert payload.distinct(["a", "b", "a", "a #2", "a"]) == ["a", "b", "a #2", "a #2 #2", "a #3"]


def damage(file: Path, how: str) -> None:
    if how == "noise":
        file.write_bytes(b"no database at all" * 400)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    else:
        statement = {
            "newer": f"PRAGMA user_version = {SCHEMA_VERSION + 1}",
            "foreign": "PRAGMA application_id = 7",
            "manifest": "UPDATE manifest SET value = '7' WHERE key = 'sites'",
            "rows": "UPDATE edit SET data = x'00', present = x'ff'",
            "text": "UPDATE edit SET seconds = 'long'",
        }[how]
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            db.execute(statement)


@pytest.mark.parametrize("how", ["noise", "empty", "cut", "newer", "foreign", "manifest", "rows", "text"])
def test_a_damaged_file_is_named_with_the_reason_and_the_others_work(tmp_path: Path, how: str) -> None:
    make_run(tmp_path / "good", edits=2, dies_at=None, sites=1)
    damage(make_run(tmp_path / "bad", edits=2, dies_at=None, sites=1) / FILE_NAME, how)
    tab = Tab(plugin_of(tmp_path))
    runs = tab.read_ahead()
    assert runs["good"]["state"] == "read"
    assert runs["bad"]["state"] == "unreadable"
    assert runs["bad"]["reason"]
    if how == "newer":
        assert "upgrade stabilitylab" in runs["bad"]["reason"]
    sent = tab.json("/run", run="bad")
    assert (sent["state"], sent["reason"]) == ("unreadable", runs["bad"]["reason"])
    assert tab.get("/values", run="bad", version=sent["version"], metric=0).status_code == 409


def grow(writer: RunWriter, edit: int) -> None:
    readings = {("update.norm", "fc1"): np.array([float(edit)])}
    writer.append(EditRow(edit, f"edit {edit}", "applied" if edit else "start", 1.7e9, 1.0, 0.1, 0.0, None, readings))


def test_a_run_grows_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SHARE", 1e9)  # reads again at once
    tab = Tab(plugin_of(tmp_path))
    assert not tab.plugin.is_active()
    metric = Metric("update.norm", "1", "log", "after", "How far.", "‖ΔW‖", "—")
    writer = RunWriter(tmp_path / "live", {"sites": ["fc1"], "closed": False}, (metric,))
    grow(writer, 0)
    first = tab.read_ahead()["live"]
    assert tab.plugin.is_active()
    assert (first["last_edit"], first["complete"]) == (0, False)
    old = tab.json("/run", run="live")["version"]
    assert first["version"] == old
    for edit in (1, 2, 3):
        grow(writer, edit)
    later = tab.read_ahead()["live"]
    assert later["last_edit"] == 3
    assert later["version"] != old
    sent = tab.json("/run", run="live")
    assert sent["label"][-1] == "edit 3"
    kept, _ = tab.arrays("/values", run="live", version=old, metric=0)["values"]
    assert kept.tolist() == [[0.0]]  # what a page is drawing does not change under it
    grown, _ = tab.arrays("/values", run="live", version=sent["version"], metric=0)["values"]
    assert grown.tolist() == [[0.0, 1.0, 2.0, 3.0]]
    writer.set_manifest({"closed": True})
    writer.close()
    assert tab.read_ahead()["live"]["complete"]
    shutil.rmtree(tmp_path / "live")
    assert tab.read_ahead() == {}
    assert not tab.plugin.is_active()
    assert tab.get("/run", run="live").status_code == 404


def test_a_folder_that_cannot_be_looked_through_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LOOK_SECONDS", 0.01)
    search, failures = shelf.search, [OSError("gone"), RuntimeError("loop")]

    def failing(root: Path) -> dict[str, Path]:
        if failures:
            raise failures.pop()
        return search(root)

    monkeypatch.setattr(shelf, "search", failing)
    make_run(tmp_path / "run", edits=1, dies_at=None, sites=1)
    plugin = StabilityPlugin(SimpleNamespace(logdir=str(tmp_path)))
    until(plugin.is_active)
    assert not failures


def until(done: Callable[[], bool]) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    pytest.fail("nothing changed in 30 seconds")


def test_a_run_that_grows_fast_is_not_read_without_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SHARE", 1e-9)
    tab = Tab(plugin_of(tmp_path))
    writer = RunWriter(tmp_path / "live", {"sites": ["fc1"]}, ())
    grow(writer, 0)
    first = tab.read_ahead()["live"]["version"]
    grow(writer, 1)
    assert tab.read_ahead()["live"]["version"] == first
    writer.close()


def test_more_runs_than_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "KEPT", 1)
    for number in (1, 2, 10):
        make_run(tmp_path / f"run-{number}", edits=1, dies_at=None, sites=1)
    tab = Tab(plugin_of(tmp_path))
    assert list(tab.read_ahead()) == ["run-1", "run-2", "run-10"]
    assert [run["state"] for run in tab.read_ahead().values()] == ["read"] * 3
    version = tab.json("/run", run="run-1")["version"]
    assert tab.get("/values", run="run-1", version=version, metric=0).status_code == 200
    assert tab.get("/values", run="run-10", version=version, metric=0).status_code == 409
    assert tab.json("/run", run="run-1")["version"] == version


@pytest.mark.parametrize("logdir", ["", "gs://bucket/runs", "s3://bucket/runs", None])
def test_where_no_local_folder_is_watched_there_is_no_tab(logdir: str | None) -> None:
    plugin = StabilityPlugin(SimpleNamespace(logdir=logdir))
    assert not plugin.is_active()
    assert Tab(plugin).get("/runs").status_code == 404


def test_the_thread_finds_a_run_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LOOK_SECONDS", 0.05)
    plugin = StabilityPlugin(SimpleNamespace(logdir=str(tmp_path)))
    tab = Tab(plugin)
    make_run(tmp_path / "late", edits=1, dies_at=None, sites=1)
    until(lambda: [run["state"] for run in tab.json("/runs")["runs"]] == ["read"])
    assert plugin.is_active()


def test_the_loader_makes_the_plugin(tmp_path: Path) -> None:
    plugin = StabilityLoader().load(SimpleNamespace(logdir=str(tmp_path)))
    assert plugin is not None
    assert plugin.plugin_name == "stability"
    metadata = plugin.frontend_metadata()
    assert metadata.es_module_path in plugin.get_plugin_apps()
    assert metadata.tab_name == "Stability"


def in_another_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)


def test_the_loader_brings_in_hardly_anything_of_ours(tmp_path: Path) -> None:
    """What TensorBoard imports at its start: each of these modules could end it."""
    done = in_another_python(
        "import sys, stabilitylab.reports.tensorboard_plugin.loader\n"
        "print(*sorted(name for name in sys.modules if name.startswith('stabilitylab')))",
        tmp_path,
    )
    reports = "stabilitylab.reports"
    plugin = f"{reports}.tensorboard_plugin"
    assert done.stdout.split() == ["stabilitylab", "stabilitylab.errors", reports, plugin, f"{plugin}.loader"]


def test_tensorboard_finds_the_plugin_through_its_entry_point(tmp_path: Path) -> None:
    done = in_another_python("from tensorboard import default; print(default.get_dynamic_plugins())", tmp_path)
    assert "StabilityLoader" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "broken", ["reports.tensorboard_plugin.plugin", "reports.tensorboard_plugin.shelf", "record.run"]
)
def test_a_broken_module_of_ours_costs_the_tab_only(broken: str, tmp_path: Path) -> None:
    """TensorBoard itself is made as its command makes it, and serves the list of plugins without ours."""
    done = in_another_python(
        f"""
import json, sys

class Saboteur:
    def find_spec(self, name, path=None, target=None):
        if name == "stabilitylab.{broken}":
            raise RuntimeError("sabotage\\nof two lines")

sys.meta_path.insert(0, Saboteur())
from tensorboard import default, program
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_ingester
from werkzeug.test import Client

board = program.TensorBoard(plugins=default.get_plugins())
board.configure(argv=["tensorboard", "--logdir", {str(tmp_path)!r}])
ingester = data_ingester.LocalDataIngester(board.flags)
app = application.TensorBoardWSGIApp(
    board.flags, board.plugin_loaders, ingester.data_provider, None, ingester.deprecated_multiplexer
)
print(sorted(json.loads(Client(app).get("/data/plugins_listing").text)))
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "'scalars'" in done.stdout
    assert "stability" not in done.stdout
    said = [line for line in done.stderr.splitlines() if "stabilitylab" in line]
    assert len(said) == 1
    assert "no Stability tab (RuntimeError: sabotage of two lines)" in said[0]
