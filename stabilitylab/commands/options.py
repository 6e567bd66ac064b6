"""What several commands share: exit codes, choices, and arguments with their help."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

import typer

from stabilitylab.reports.text import clean

EXIT_BAD_VERDICT: Final = 1
"""The verdict (of a scan, a warning) reaches ``--fail-on``, or none of the last edits took effect."""
EXIT_USAGE: Final = 2
"""The command can't be carried out: what it was given, or a file that it was to read or write."""
EXIT_INCOMPLETE: Final = 3
"""The run holds nothing to judge yet."""
EXIT_INTERNAL: Final = 4
"""An error of ours."""
EXIT_UNWATCHED: Final = 5
"""Something that was asked for could not be watched, and nothing worse is known."""
EXIT_INTERRUPTED: Final = 130
"""Ctrl-C."""
WIDEST_PAGE: Final = 100
"""Columns: longer lines of prose are hard to read."""


def complain(words: object) -> None:
    """Say one line on stderr. Names of folders and what files hold may be anyone's: nothing in it steers a terminal."""
    print("stabilitylab:", clean(words, 4_000), file=sys.stderr, flush=True)


def say(words: object) -> None:
    """Say one line on stdout, as safely."""
    typer.echo(clean(words, 100_000))


class Precision(str, Enum):
    """The dtypes that a testbed's model (of BLIP2-OPT: its decoder) can be loaded in."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Tier(str, Enum):
    """The sets of probes, by cost."""

    light = "light"
    default = "default"
    deep = "deep"


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its run.db.", show_default=False)]
