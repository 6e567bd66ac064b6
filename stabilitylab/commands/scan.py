"""``stabilitylab scan``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stabilitylab.analysis.caution import URGENCIES
from stabilitylab.commands.options import EXIT_BAD_VERDICT, WIDEST_PAGE, say

if TYPE_CHECKING:
    from stabilitylab.acting.scanning.scan import Progress


class FailOn(str, Enum):
    """The urgencies that `scan` can be told to fail on."""

    fatal = "fatal"
    risk = "risk"
    note = "note"


def scan(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The folder, or a file, of a model's weights.", show_default=False)
    ],
    editor_state: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="An editor's archive, or second moments; may be given again.", show_default=False
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="What is going to be edited, as '*.mlp.down_proj'.", show_default=False),
    ] = None,
    hparams: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="EasyEdit's YAML or MEMIT's JSON, in place of --sites.", show_default=False),
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="DTYPES", help="What these would cost, as fp16,bf16.", show_default=False)
    ] = "",
    pickles: Annotated[bool, typer.Option("--pickle", help="Also read pickled tensors (and nothing else).")] = False,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE", help="Write a page of it there.", show_default=False),
    ] = None,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with 1 from this urgency on.")] = FailOn.fatal,
) -> None:
    """Look at a model's weights before the first edit, and say what they can take and what is wrong with them.

    Tensors are read one at a time, and no code of the folder is run. Exit code 1: something is fatal.
    """
    from stabilitylab.acting.scanning.scanned import scan as look

    with _bar() as progress:
        scanned = look(
            model,
            sites or None,
            editor=editor_state or None,
            hparams=hparams,
            precision=[name.strip() for name in precision.split(",") if name.strip()],
            pickles=pickles,
            progress=progress,
        )
    if out is not None:
        scanned.save(out)
    if as_object:
        typer.echo(json.dumps(scanned.to_json(), indent=2, allow_nan=False))
    else:
        from stabilitylab.reports.scan_console import scan_page
        from stabilitylab.reports.terminal import show

        console = Console()
        show(console, scan_page(scanned.figures, scanned.cautions), width=min(console.width, WIDEST_PAGE))
        if out is not None:
            say(f"page: {out}")
    if any(URGENCIES.index(caution.urgency) <= URGENCIES.index(fail_on.value) for caution in scanned.cautions):
        raise typer.Exit(EXIT_BAD_VERDICT)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar where a person watches."""
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from stabilitylab.reports.text import clean

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def tell(doing: str, done: int, total: int) -> None:
            bars.update(task, description=escape(clean(doing, 80)), completed=done, total=total)

        yield tell
