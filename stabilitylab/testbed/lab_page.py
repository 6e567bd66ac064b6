"""What a person sees of a comparison: a bar while it runs, and one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.editors import base
from stabilitylab.record.readings import EditRow
from stabilitylab.reports.console import verdict_text
from stabilitylab.reports.sinks import Sink
from stabilitylab.reports.text import clean, number
from stabilitylab.testbed.lab import Row

_LEGEND = (
    ("onset, NaN", "edit where values begin to diverge, in hindsight; first NaN or ∞"),
    ("edit", "share of the edits that took: answered as wanted right after"),
    ("reph, image", "the same in other words, and of another picture"),
    ("local", "share of unrelated answers that were the same after the last edit"),
    ("kept", "share of all edits that still held then"),
    ("drift", "greatest ‖W − W₀‖ / ‖W₀‖ of an edited weight then"),
    ("perpl", "perplexity of a fixed text then"),
    ("1/s", "edits per second"),
)


class LabProgress:
    """Bars on a terminal; nothing where the output is piped."""

    def __init__(self, runs: int, console: Console) -> None:
        """runs: how many there will be."""
        self._console = console
        self._runs = runs
        self._done = 0

    @contextmanager
    def preparing(self, title: str) -> Iterator[base.Progress]:
        """A bar that appears with the first word of progress."""
        if not self._console.is_terminal:
            yield base.quiet
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        bars = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[says]}"), console=self._console, transient=True)  # fmt: skip  # noqa: E501
        task = bars.add_task(clean(title, 40), total=None, says="")

        def show(done: int, steps: int, says: str) -> None:
            bars.start()
            bars.update(task, completed=done, total=steps, says=clean(says, 40))
            if done >= steps:
                bars.stop()

        try:
            yield show
        finally:
            bars.stop()

    @contextmanager
    def editing(self, editor: str, seed: int, edits: int) -> Iterator[Sequence[Sink]]:
        """A bar of one run's edits with the verdict so far."""
        self._done += 1
        if not self._console.is_terminal:
            yield ()
            return
        which = f"{self._done}/{self._runs}  {clean(editor, 24)}  seed {seed}"
        bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[verdict]}"), console=self._console, transient=True,
        )  # fmt: skip
        try:
            yield (_Bar(bars, which, edits),)
        finally:
            bars.stop()


class _Bar:
    """A `Sink` that moves one bar."""

    def __init__(self, bars: Progress, title: str, edits: int) -> None:
        self._bars = bars
        self._task = bars.add_task(title, total=edits, verdict="")

    def on_row(self, row: EditRow, diagnosis: Diagnosis | None) -> None:
        self._bars.start()
        verdict = "" if diagnosis is None else diagnosis.verdict
        self._bars.update(self._task, completed=row.edit, verdict=verdict)

    def close(self) -> None:
        self._bars.stop()


def lab_table(rows: Sequence[Row]) -> RenderableType:
    """One line per run, 80 columns wide: pictures where there are any, else the perplexity; the seed if they differ."""
    images = any(row.image_rephrase is not None for row in rows)
    seeds = len({row.seed for row in rows}) > 1
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("editor", overflow="fold")
    if seeds:
        table.add_column("seed", justify="right")
    table.add_column("verdict", no_wrap=True)
    for name in ("onset", "NaN", "edit", "reph", "image" if images else "perpl", "local", "kept", "drift", "1/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.editor),
            *((Text(str(row.seed)),) if seeds else ()),
            verdict_text(row.verdict),
            _edit(row.onset_edit),
            _edit(row.first_nonfinite_edit),
            _share(row.efficacy),
            _share(row.rephrase),
            _share(row.image_rephrase) if images else Text(number(row.perplexity)),
            _share(row.locality),
            _share(row.retention),
            Text(number(row.drift_ratio, 2)),
            Text(number(row.edits_per_s, 2)),
        )
    return table


def lab_page(rows: Sequence[Row]) -> RenderableType:
    """The table, what its columns mean, and which editors raised errors."""
    legend = Table.grid(padding=(0, 2))
    legend.add_column(style="dim", no_wrap=True)
    legend.add_column(style="dim")
    text_only = all(row.image_rephrase is None for row in rows)
    for name, means in _LEGEND:
        if name != "perpl" or text_only:
            legend.add_row(Text(name), Text(means))
    failed = [
        Text(
            f"{row.editor}, seed {row.seed}: errors at {row.failed} of {row.edits} edits, first {clean(row.error)}",
            "yellow",
        )
        for row in rows
        if row.failed
    ]
    return Group(lab_table(rows), *failed, Text(""), legend)


def _edit(edit: int | None) -> Text:
    return Text("–" if edit is None else str(edit))


def _share(share: float | None) -> Text:
    return Text("–" if share is None else f"{share:.2f}")
