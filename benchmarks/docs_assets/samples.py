"""Samples of output in the documentation: what the code prints now of the runs that are kept.

A sample is a fenced block after a line ``<!-- sample: name -->``. Everything is as at a terminal of 80 columns.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console, RenderableType

from benchmarks.docs_assets.kept import DOCS, unpack
from stabilitylab.record.following import Follower
from stabilitylab.record.run import load
from stabilitylab.reports.announcing import AlarmSink
from stabilitylab.reports.console import diagnosis_page
from stabilitylab.reports.side_by_side import side_by_side
from stabilitylab.reports.tail import follow

WIDTH: Final = 80
MARKED: Final = re.compile(r"(<!-- sample: ([\w-]+) -->\n```\w*\n)(.*?\n)(```\n)", re.DOTALL)
DEMO: Final = Path("runs/demo")
COMPARED: Final = ("demo", "mend-ball", "grace")
LINES: Final = (25, 26)
"""Edits whose lines are shown of a piped `tail`."""


def pages() -> list[Path]:
    """Where samples may stand."""
    return [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def shown(page: Path) -> dict[str, str]:
    """The samples that stand in a page, by name."""
    return {name: block for _, name, block, _ in MARKED.findall(page.read_text(encoding="utf-8"))}


def put(page: Path, samples: Mapping[str, str]) -> None:
    """Put samples in place of those that stand in a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(MARKED.sub(lambda found: found[1] + samples[found[2]] + found[4], text), encoding="utf-8")


def made() -> dict[str, str]:
    """Every sample as the code prints it now, from a folder that holds the kept runs in ``runs/``."""
    with tempfile.TemporaryDirectory() as scratch, _inside(Path(scratch)):
        unpack(Path(scratch))
        return {name: _tidy(sample()) for name, sample in SAMPLES.items()}


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _tidy(text: str) -> str:
    """Without blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def _console(out: io.StringIO) -> Console:
    return Console(file=out, width=WIDTH, color_system=None)


def _printed(what: RenderableType) -> str:
    out = io.StringIO()
    _console(out).print(what)
    return out.getvalue()


def _tail() -> str:
    out = io.StringIO()
    follow(DEMO, once=True, console=_console(out))
    return out.getvalue()


def _tail_piped() -> str:
    out = io.StringIO()
    follow(DEMO, console=_console(out))
    edits = tuple(f"edit {edit} " for edit in LINES)
    return "\n".join(line for line in out.getvalue().splitlines() if line.startswith(edits))


def _compare() -> str:
    paths = [Path("runs") / name for name in COMPARED]
    table = _printed(side_by_side([load(path) for path in paths], WIDTH))
    return f"$ stabilitylab compare {' '.join(map(str, paths))}\n{table}"


def _check(first: str, last: str) -> str:
    """Of what `check` prints, from the line that begins with `first` to the one before that begins with `last`."""
    lines = _printed(diagnosis_page(load(DEMO))).splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(first))
    end = next(place for place, line in enumerate(lines) if place > begin and line.startswith(last))
    return "\n".join(lines[begin:end])


def _alarm() -> str:
    said, sink = io.StringIO(), AlarmSink(DEMO)
    with redirect_stderr(said):
        for each in Follower(DEMO).look():
            sink.on_row(each.row, each.diagnosis)
    return said.getvalue()


def _prompt() -> str:
    run = load(DEMO)
    return f"{run!r}\n{run.metrics!r}"


SAMPLES: Final[Mapping[str, Callable[[], str]]] = {
    "tail": _tail,
    "tail-piped": _tail_piped,
    "compare": _compare,
    "check-findings": partial(_check, "Findings", "Baseline"),
    "check-operation": partial(_check, "The operation", "Findings"),
    "alarm": _alarm,
    "prompt": _prompt,
}
