"""The command line in a process of its own, as a terminal of 80 columns has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: object) -> list[str]:
    """What starts it."""
    return [sys.executable, "-m", "stabilitylab", *map(str, arguments)]


def run_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """How it ends, and what it says."""
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment, cwd=cwd, timeout=120
    )
