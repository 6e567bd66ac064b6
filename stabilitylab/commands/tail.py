"""``stabilitylab tail``."""

from __future__ import annotations

from typing import Annotated

import typer

from stabilitylab.commands.options import RunPath, complain


def tail(
    run: RunPath,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object per new edit, a line each.")] = False,
) -> None:
    """Follow a run that goes on, from another terminal, until it is closed.

    A page that renews itself, or a line per new edit where the output is piped. A run that is not there yet is waited
    for.
    """
    from stabilitylab.reports.tail import follow

    follow(run, interval=interval, once=once, as_json=as_object, says=complain)
