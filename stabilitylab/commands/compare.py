"""``stabilitylab compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stabilitylab.record.run import load


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their run files.", show_default=False)
    ],
    as_object: Annotated[bool, typer.Option("--json", help="Print a JSON list with an object per run.")] = False,
) -> None:
    """Say what became of several runs, side by side."""
    from stabilitylab.reports.side_by_side import facts, side_by_side
    from stabilitylab.reports.terminal import show

    found = [load(run) for run in runs]
    if as_object:
        typer.echo(json.dumps([facts(run) for run in found], indent=2, allow_nan=False))
    else:
        console = Console()
        show(console, side_by_side(found, console.width))
