"""What a scan costs, and whether its ranking of layers is true.

    python -m benchmarks.scan [--only reading|ranking] [--gigabytes 1] [--rounds 7] [--seeds 3] [--layers 6] [--json F]

**Reading**: time and memory beside the least that reading a folder takes, see `reading.py`. **Ranking**: the layers by
how far each can be moved, beside the edits that each one takes alone until the canary is lost, see `ranking.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import machine
from benchmarks.scan import ranking
from benchmarks.scan.reading import GOAL_MEMORY, GOAL_TIME, measure
from benchmarks.wild.decoder import Norm
from stabilitylab.analysis.findings import json_safe

PARTS = ("reading", "ranking")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reading_table(rows: list[dict[str, Any]]) -> Table:
    """The figures of each dtype."""
    table = Table(title="A scan beside reading each tensor and forming one norm", title_justify="left")
    for name in ("", "cold, wall", "warm, CPU", "memory over largest tensor"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        spans = [f"{row[how]['ratio']:.2f} ({row[how]['ratio_low']:.2f}–{row[how]['ratio_high']:.2f})" for how in HOW]
        table.add_row(f"{row['dtype']}, {row['bytes'] / 1e9:.2f} GB", *spans, f"{row['memory_ratio']:.2f}")
    table.add_row("goal", f"≤ {GOAL_TIME:g}", "–", f"< {GOAL_MEMORY:g}")
    return table


HOW = ("cold", "warm")


def main() -> None:
    """Measure what was asked for, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="reading: of the folder")
    parser.add_argument("--rounds", type=int, default=7, help="reading: scans of each dtype, cold and warm")
    parser.add_argument("--seeds", type=int, default=3, help="ranking: models of each norm; minutes for each")
    parser.add_argument("--layers", type=int, default=6, help="ranking: of each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    parts = options.only or PARTS
    document: dict[str, Any] = {"machine": machine()}
    out = Console()
    if "reading" in parts:
        rows = []
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory(prefix="scan-") as scratch:
                rows.append(measure(Path(scratch), int(options.gigabytes * 1e9), dtype, options.rounds))
        document["reading"] = rows
        out.print(reading_table(rows))
    if "ranking" in parts:
        ranked = ranking.run(get_args(Norm), options.seeds, options.layers, lambda says: print(says, file=sys.stderr))
        document["ranking"] = ranked
        out.print(ranking.table(ranked))
    if options.json is not None:
        options.json.write_text(json.dumps(json_safe(document), indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
