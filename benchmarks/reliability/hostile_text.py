"""Hostile text: the corpus of injections through every output that is no browser's stays text.

Each injection is a layer, a metric's name and meaning, a label, an error and a note of one run. Pages are parsed, as a
browser would: no element and no attribute of theirs may come of it. What only a browser shows is tested there:
``make test-browser``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from typer.testing import CliRunner

import stabilitylab as sl
from benchmarks.reliability.promise import Effort, Result, counted
from stabilitylab.commands.cli import app
from stabilitylab.record.run import Run
from stabilitylab.reports import figures
from stabilitylab.reports.comparison import compared, write_comparison
from stabilitylab.reports.html import write_report
from stabilitylab.reports.svg import to_svg
from stabilitylab.reports.tensorboard_plugin import payload
from tests.injections import ELSEWHERE, INJECTIONS, OWNED, hostile_run

STEERING: Final = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_DRAWN: Final = {"svg", "defs", "style", "g", "path", "rect", "use", "clipPath", "image"}
_RUNS: Final = re.compile(r"^on[a-z]+$|^srcdoc$|^formaction$")
_LOADS: Final = ("src", "href", "xlink:href", "action", "data", "poster", "background")


class _Page(HTMLParser):
    """What of a page would run, load or steer."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.breaks: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if _RUNS.match(name):
                self.breaks.append(f"<{tag} {name}>")
            if name in _LOADS and value and not value.startswith(("#", "data:image/")):
                self.breaks.append(f"<{tag} {name}={value[:40]}>")
            if name == "style" and value and "url(" in value:
                self.breaks.append(f"<{tag} style={value[:40]}>")
        if tag in ("iframe", "object", "embed", "base", "frame"):
            self.breaks.append(f"<{tag}>")

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and data.strip().startswith(f"window.{OWNED}"):
            self.breaks.append("a script of theirs")
        if self._inside == "title" and OWNED in data and "<" not in data:
            self.breaks.append("the title")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def of_page(text: str) -> list[str]:
    page = _Page()
    page.feed(text)
    steering = STEERING.search(text.replace("\t", " ").replace("\r", ""))
    return page.breaks + ([f"{steering[0]!r} in it"] if steering else [])


def of_terminal(text: str) -> list[str]:
    found = STEERING.search(text)
    return [f"{found[0]!r} in it"] if found else []


def of_json(text: str) -> list[str]:
    def no_number(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=no_number)
    except ValueError as error:
        return [f"no JSON: {error}"]
    return of_terminal(text.replace("\\u", ""))


def of_picture(text: str) -> list[str]:
    breaks = [f"{ELSEWHERE} in it"] if ELSEWHERE in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL) else []
    for element in ElementTree.fromstring(text).iter():
        tag = element.tag.rpartition("}")[2]
        breaks += [] if tag in _DRAWN else [f"<{tag}>"]
        for name, value in element.attrib.items():
            outside = name.endswith("href") and not value.startswith(("#", "data:image/png;base64,"))
            breaks += [f"{name}={value[:40]}"] if name.startswith("on") or outside else []
    return breaks


def of_frame(run: Run) -> list[str]:
    """A CSV file of the run's readings has each text in its own cell."""
    frame = run.to_frame("pandas")
    usual = csv.field_size_limit(2_000_000)
    try:
        rows = list(csv.DictReader(io.StringIO(frame.to_csv(index=False), newline="")))
    finally:
        csv.field_size_limit(usual)
    columns = ("label", "status", "outcome", "metric", "site")
    return [f"column {name}" for name in columns if [row[name] for row in rows] != frame[name].fillna("").tolist()]


def outputs(run: Run, folder: Path) -> Mapping[str, Callable[[], list[str]]]:
    """Every output: what goes wrong in it."""

    def command(*words: str) -> str:
        return CliRunner().invoke(app, list(words)).output

    def page(file: Path) -> list[str]:
        return of_page(file.read_text(encoding="utf-8"))

    def picture(metric: str) -> list[str]:
        return of_picture(to_svg(figures.lines(run, metric)))

    def tab() -> Any:
        return [payload.about(run, run.diagnosis()), payload.summary(run, run.diagnosis())]

    path, drawn = str(run.path), [metric.name for metric in run.metrics if run.sites_of(metric.name)]
    made: dict[str, Callable[[], list[str]]] = {
        "check": lambda: of_terminal(command("check", path)),
        "check --json": lambda: of_json(command("check", path, "--json")),
        "compare": lambda: of_terminal(command("compare", path, path)),
        "compare --json": lambda: of_json(command("compare", path, path, "--json")),
        "tail": lambda: of_terminal(command("tail", path, "--once")),
        "an error": lambda: of_terminal(command("check", f"{path}-not-there")),
        "report": lambda: page(write_report(run, folder / "page.html")),
        "report's data": lambda: of_json((folder / "page.json").read_text(encoding="utf-8")),
        "comparison": lambda: page(write_comparison([run, run], folder / "several.html")),
        "comparison's data": lambda: of_json(json.dumps(compared([run, run]))),
        "notebook: run": lambda: of_page(run._repr_html_()),
        "notebook: diagnosis": lambda: of_page(run.diagnosis()._repr_html_()),
        "notebook: metrics": lambda: of_page(run.metrics._repr_html_()),
        "TensorBoard's tab": lambda: of_json(json.dumps(tab())),
        "SVG: heatmap": lambda: of_picture(to_svg(figures.heatmap(run, "update.norm"))),
        "printed": lambda: of_terminal(f"{run!r}{run.diagnosis()}"),
        "CSV": lambda: of_frame(run),
    }
    made |= {f"SVG: {name[:20]}": partial(picture, name) for name in drawn}
    return made


def promise(effort: Effort) -> Iterator[Result]:
    """Goal: nothing gets through."""
    folder = effort.folder("text")
    run = sl.load(hostile_run(folder / "[red]\x1b[31m\u202e<script>"))
    breaks, made = [], outputs(run, folder)
    for number, (name, look) in enumerate(made.items()):
        effort.tell(f"hostile text: {name}".encode("ascii", "replace").decode(), number / len(made))
        try:
            breaks += [f"{name}: {said}" for said in look()]
        except Exception as error:
            breaks.append(f"{name}: {type(error).__name__}: {str(error)[:80]}")
    tried = len(made) * len(INJECTIONS)
    yield counted(f"{len(INJECTIONS)} injections through {len(made)} outputs", "that get through", tried, breaks)
