"""``stabilitylab demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stabilitylab.commands.options import Precision


def demo(
    precision: Annotated[Precision, typer.Option(help="The decoder's dtype; EasyEdit loads fp16.")] = Precision.fp16,
    edits: Annotated[int, typer.Option(min=1, max=1000, help="The most edits to make.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Which stream of edits.")] = 0,
    out: Annotated[Path, typer.Option(help="The run's folder; a demo run in it is replaced.")] = Path("runs/demo"),
) -> None:
    """Edit a small real BLIP2-OPT with MEND, one edit after the other, until it says NaN; then say why."""
    from stabilitylab.testbed.demo import run_demo

    run_demo(out=out, edits=edits, seed=seed, precision=precision.value, console=Console())
