"""What a person sees in a terminal: a progress bar while the loop runs, and a short page when it is over.

Text from the run is always a `rich.text.Text` of cleaned characters, never markup. Rich leaves colours out where the
output is piped or ``NO_COLOR`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.analysis.grouping import grouped
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import EditRow, Note
from stabilitylab.record.run import Run
from stabilitylab.reports.events import event_words, short_places, telling
from stabilitylab.reports.known_before import Known, known_before
from stabilitylab.reports.noted import events, missing
from stabilitylab.reports.operations import facts as operation_facts
from stabilitylab.reports.operations import untraced
from stabilitylab.reports.pacing import time_in_probes
from stabilitylab.reports.text import clean, number, percent, with_short_names
from stabilitylab.reports.verdicts import LOOKS, chain, facts, why

FINDINGS_SHOWN: Final = 8
NOTES_SHOWN: Final = 4


def verdict_text(verdict: str) -> Text:
    """A verdict as a sign and a word, in its colour."""
    look = next(look for name, look in LOOKS.items() if name == verdict)
    return Text(f"{look.sign} {look.word.lower()}", style=f"bold {look.style}")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("– edits/s" if task.speed is None else f"{number(task.speed, 2)} edits/s", style="cyan")


class _Verdict(ProgressColumn):
    def render(self, task: Task) -> Text:
        return verdict_text(task.fields["verdict"])


class ProgressSink:
    """A progress bar with edits per second and the verdict so far. Shown only where a person watches."""

    def __init__(self, total: int | None = None, console: Console | None = None) -> None:
        """total: how many edits there will be, if known. console: where to; by default the terminal."""
        self._console = console or Console(stderr=True)
        self._verdict = "stable"
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                _Label(), BarColumn(bar_width=24), MofNCompleteColumn(), _Speed(), TimeRemainingColumn(), _Verdict(),
                console=self._console,
            )  # fmt: skip
            self._task = self._progress.add_task("edits", total=total, verdict=self._verdict)
            self._progress.start()

    def on_row(self, row: EditRow, diagnosis: Diagnosis | None) -> None:
        """Move the bar; say it above the bar when the verdict changes or an edit fails."""
        if self._progress is None:
            return
        if diagnosis is not None and diagnosis.verdict != self._verdict:
            self._verdict = diagnosis.verdict
            line = Text.assemble(f"edit {row.edit}: ", verdict_text(self._verdict), f"  {clean(diagnosis.says, 300)}")
            self._progress.console.print(line)
        if row.error is not None:
            self._progress.console.print(Text(f"edit {row.edit} failed: {clean(row.error, 160)}", style="yellow"))
        self._progress.update(self._task, completed=row.edit, verdict=self._verdict)

    def close(self) -> None:
        """Leave the bar as it is, and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()


class _Label(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("editing")


def diagnosis_text(run: Run, diagnosis: Diagnosis) -> RenderableType:
    """The verdict in a sentence, why, and what to do, with short names for layers."""
    places = short_places(run.sites)

    def told(words: str, limit: int) -> str:
        return clean(with_short_names(clean(words, 4 * limit), places), limit)  # short first: more of it fits

    lines: list[RenderableType] = [
        verdict_text(diagnosis.verdict),
        *([Text("▲ no edit takes effect", style="bold dark_orange3")] if diagnosis.nothing_lands else []),
        Text(told(diagnosis.says, 700), style="bold"),
    ]
    if not run.closed:
        lines.append(Text("The run was not closed: it goes on, or it ended without a word.", style="yellow"))
    if why(diagnosis):
        lines.append(Text(f"Why: {told(why(diagnosis), 700)}"))
    others = chain(diagnosis)
    if others:
        lines.append(Text("With it:"))
    lines += [Padding(Text(f"{role}: {told(says, 500)}"), (0, 0, 0, 2)) for role, says in others]
    if untraced(run, diagnosis):
        lines.append(Text(untraced(run, diagnosis), style="yellow"))
    if diagnosis.advice:
        lines.append(Text(f"What to do: {told(diagnosis.advice, 900)}"))
    return Group(*lines)


def closing_table(run: Run, diagnosis: Diagnosis) -> RenderableType:
    """The run in numbers, one per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    failed = sum(edit.status == "failed" for edit in run.edits)
    rows = [
        *facts(diagnosis, failed, short_places(run.sites)),
        ("time in probes", time_in_probes(run)),
        ("time in the canary", percent(run.canary_time_share)),
        ("time in the tracer", percent(run.trace_time_share)),
        ("run", clean(run.path, 300)),
    ]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def findings_table(run: Run, diagnosis: Diagnosis) -> RenderableType:
    """The most telling findings, by edit and layer: that of the headline, then the others in order of edit."""
    kept = telling(diagnosis, FINDINGS_SHOWN)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    places = short_places(run.sites)
    for event in kept:
        name = Text("worth knowing", style="dim") if event.verdict == "stable" else verdict_text(event.verdict)
        table.add_row(Text(f"edit {event.edit}"), name, Text(event_words(event, places)))
    left = len(grouped(diagnosis.findings)) - len(kept)
    more = [Text(f"and {left} more: see the page that `stabilitylab report` writes", style="dim")] if left else []
    return Group(table, *more)


def _operation(operation: Operation, places: Mapping[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, words in operation_facts(operation, places):
        table.add_row(Text(name), Text(words))
    return Padding(table, (0, 0, 0, 2))


def _known(known: Known) -> RenderableType:
    """How many warnings there were before the first edit, and those that came true."""
    lines = [Text.assemble(("Known before edit 1: ", "bold"), known.words)]
    for told in known.came_true[:NOTES_SHOWN]:
        style = "bold red" if told.here else "bold"
        lines.append(Text.assemble((f"⚑ {told.came_true}: ", style), clean(told.caution.says, 240)))
    if len(known.came_true) > NOTES_SHOWN:
        lines.append(Text(f"and {len(known.came_true) - NOTES_SHOWN} more that came true", style="dim"))
    return Group(lines[0], *(Padding(line, (0, 0, 0, 2)) for line in lines[1:]))


def _notes(notes: Sequence[Note]) -> RenderableType:
    said = [Text(f"{clean(note.kind, 30)}: {clean(note.says, 240)}") for note in notes[:NOTES_SHOWN]]
    if len(notes) > NOTES_SHOWN:
        said.append(Text(f"and {len(notes) - NOTES_SHOWN} more", style="dim"))
    return Padding(Group(*said), (0, 0, 0, 2))


def diagnosis_page(run: Run, diagnosis: Diagnosis | None = None) -> RenderableType:
    """All of it as a short page: the sentence, the numbers, the findings, and what was not measured.

    diagnosis: another one than the run's own, such as one by other limits.
    """
    diagnosis = diagnosis or run.diagnosis()
    measure = Text(f"Baseline: {clean(diagnosis.baseline, 120)}; {clean(diagnosis.thresholds, 240)}.", style="dim")
    parts: list[RenderableType] = [diagnosis_text(run, diagnosis), Text(), closing_table(run, diagnosis)]
    known = known_before(run, diagnosis)
    if known is not None:
        parts += [Text(), _known(known)]
    if diagnosis.operation is not None:
        parts += [Text(), Text("The operation", style="bold"), _operation(diagnosis.operation, short_places(run.sites))]
    if diagnosis.findings:
        parts += [
            Text(),
            Text.assemble(("Findings", "bold"), (", that of the headline first", "dim")),
            findings_table(run, diagnosis),
        ]
    for says, notes in (("Not measured, or not as asked", missing(run.notes)), ("Of note", events(run.notes))):
        if notes:
            parts += [Text(), Text(says, style="bold"), _notes(notes)]
    return Group(*parts, Text(), measure)
