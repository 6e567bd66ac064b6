"""``stabilitylab calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stabilitylab.analysis.thresholds import write
from stabilitylab.commands.options import say


def calibrate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs known to be healthy, all of one kind.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Where the limits go.")] = Path("thresholds.json"),
    alpha: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="The share of healthy runs that may be called diverging.")
    ] = 0.05,
    as_object: Annotated[bool, typer.Option("--json", help="Print the limits as one JSON object.")] = False,
) -> None:
    """Take the analyzer's limits from runs of your own, for `check --thresholds` and `attach(thresholds=...)`.

    A further healthy run of the same kind of loop, model and editor is then called diverging by drift with probability
    ALPHA at most. That takes 19 runs for 0.05, and 99 for 0.01.
    """
    from stabilitylab.analysis.calibrating import calibrate as calibrate_on

    thresholds = calibrate_on(runs, alpha=alpha)
    write(thresholds, out)
    if as_object:
        typer.echo(json.dumps(thresholds.to_json(), indent=2, allow_nan=False))
    else:
        say(f"{out}: {thresholds}")
