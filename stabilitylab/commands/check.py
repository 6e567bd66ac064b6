"""``stabilitylab check``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stabilitylab.analysis.findings import severity
from stabilitylab.analysis.thresholds import read
from stabilitylab.commands.options import (
    EXIT_BAD_VERDICT,
    EXIT_INCOMPLETE,
    EXIT_UNWATCHED,
    WIDEST_PAGE,
    RunPath,
    complain,
)
from stabilitylab.record.run import load


class FailOn(str, Enum):
    """The verdicts that `check` can be told to fail on."""

    drifting = "drifting"
    diverging = "diverging"
    collapsed = "collapsed"
    nonfinite = "non-finite"


def check(
    run: RunPath,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with 1 from this verdict on.")] = FailOn.diverging,
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Limits from `calibrate`, in place of those of the run.", show_default=False),
    ] = None,
) -> None:
    """Say what became of a run, and exit with 1 when it is diverging or worse, or when no edit takes effect any more.

    A run that goes on, or whose writer was killed, is judged by the edits that it holds. Exit code 5: nothing worse is
    known, but something that was asked for could not be watched.
    """
    limits = None if thresholds is None else read(thresholds)
    found = load(run)
    diagnosis = found.diagnosis(limits)
    if as_object:
        from stabilitylab.reports.plain import plain

        typer.echo(json.dumps(plain(found, diagnosis), indent=2, allow_nan=False))
    else:
        from stabilitylab.reports.console import diagnosis_page
        from stabilitylab.reports.terminal import show

        console = Console()
        show(console, diagnosis_page(found, diagnosis), width=min(console.width, WIDEST_PAGE))
    if severity(diagnosis.verdict) >= severity(fail_on.value) or diagnosis.nothing_lands:
        raise typer.Exit(EXIT_BAD_VERDICT)
    if not any(edit.row.readings for edit in found.edits if edit.edit > 0):
        complain(f"'{found.path}' holds no measured edit yet; nothing to judge")
        raise typer.Exit(EXIT_INCOMPLETE)
    if diagnosis.unwatched:
        raise typer.Exit(EXIT_UNWATCHED)
