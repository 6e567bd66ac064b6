"""What several commands share: exit codes, choices, and arguments with their help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Final

import typer

EXIT_BAD_VERDICT: Final = 1
EXIT_USAGE: Final = 2
EXIT_INCOMPLETE: Final = 3
EXIT_UNWATCHED: Final = 5
WIDEST_PAGE: Final = 100
"""Columns: longer lines of prose are hard to read."""


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
