"""A run that takes long to judge: the tab says how far it has come, and all other runs are there meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stabilitylab.analysis import Analyzer
from stabilitylab.record.readings import EditRow
from stabilitylab.record.run import load
from stabilitylab.reports.tensorboard_plugin import plugin
from tests.synthetic import make_run
from tests.unit.test_tensorboard_plugin import Tab, plugin_of, until

HELD = 25


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds whoever looks at edit `HELD`."""
    opened, observe = threading.Event(), Analyzer.observe

    def held(analyzer: Analyzer, row: EditRow) -> None:
        if row.edit == HELD:
            opened.wait(60)
        observe(analyzer, row)

    monkeypatch.setattr(Analyzer, "observe", held)
    monkeypatch.setattr(plugin, "PATIENCE_SECONDS", 0.05)
    yield opened
    opened.set()


def test_a_run_is_judged_aside_and_says_how_far_it_is(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    make_run(tmp_path / "long", edits=40, dies_at=30)
    make_run(tmp_path / "short", edits=6, dies_at=None)
    gate.clear()
    tab = Tab(plugin_of(tmp_path))
    first = json.loads(tab.get("/run", run="long").text)
    assert first["state"] == "judging"

    def said() -> dict[str, object]:
        return {run["id"]: run for run in tab.json("/runs")["runs"]}["long"]

    until(lambda: said().get("judged") == HELD - 1)
    assert (said()["state"], said()["of"]) == ("unread", 40)
    assert json.loads(tab.get("/run", run="long").text) == {"id": "long", "state": "judging", "judged": 24, "of": 40}
    assert sum(thread.name == "stabilitylab-run" for thread in threading.enumerate()) == 1  # however often it is asked
    assert tab.json("/run", run="short")["verdict"] == "stable"
    gate.set()
    assert tab.json("/run", run="long")["verdict"] == load(tmp_path / "long").diagnosis().verdict
    assert "judged" not in said()


def test_runs_that_are_read_ahead_do_not_wait_for_a_long_one(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    make_run(tmp_path / "a-long", edits=40, dies_at=None)
    for name in ("b", "c"):
        make_run(tmp_path / name, edits=6, dies_at=None)
    gate.clear()
    tab = Tab(plugin_of(tmp_path))
    shelf = tab.plugin._shelf
    assert shelf is not None

    def states() -> list[str]:
        shelf.read_ahead(0.05)
        return [run["state"] for run in tab.json("/runs")["runs"]]

    until(lambda: states() == ["unread", "read", "read"])
    gate.set()
    until(lambda: states() == ["read"] * 3)


def test_what_goes_wrong_aside_is_said_to_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", edits=3, dies_at=None)
    tab = Tab(plugin_of(tmp_path))
    shelf = tab.plugin._shelf
    assert shelf is not None

    def gone(run: str) -> None:
        raise KeyError(run)

    monkeypatch.setattr(shelf, "read", gone)
    assert tab.get("/run", run="run").status_code == 404
    with pytest.raises(KeyError):
        shelf.ask("run", None)
