"""``stabilitylab report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stabilitylab.commands.options import say
from stabilitylab.record.run import load


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run folder, or its run.db; several are compared.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; by default report.html in the run's folder, or comparison.html here."
        ),
    ] = None,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object: the two files' paths.")] = False,
) -> None:
    """Write the run's stability report, or compare several: one HTML page that needs nothing else, and its JSON."""
    found = [load(run) for run in runs]
    if len(found) > 1:
        from stabilitylab.reports.comparison import write_comparison

        page = write_comparison(found, out or Path("comparison.html"))
    else:
        from stabilitylab.reports.html import write_report

        page = write_report(found[0], out or found[0].path / "report.html")
    say(json.dumps({"page": str(page), "data": str(page.with_suffix(".json"))}) if as_object else page)
