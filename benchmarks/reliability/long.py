"""Long: a loop of very many edits, or of very many layers, costs no more at its end than at its beginning.

Memory and time of the first tenth are left out: there caches fill, and a run learns its pace.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from benchmarks.reliability.forks import Forks
from benchmarks.reliability.promise import Effort, Result

MOST_GROWTH_MB: Final = 20.0
MOST_SLOWER: Final = 1.1
MOST_SECONDS: Final = 60.0
MOST_READING_MB: Final = 1_000.0
"""The last two for 100,000 edits."""
LOOPS: Final = "benchmarks.reliability.long_loops"


def promise(effort: Effort) -> Iterator[Result]:
    """Goals: memory and time stay; what is left can be read in a minute."""
    folder = effort.folder("long")
    shapes = ((1, effort.pick(4_000, 100_000)), (effort.pick(200, 1_000), effort.pick(60, 500)))
    with Forks() as forks:
        for number, (sites, edits) in enumerate(shapes):
            what = f"{edits:,} edits at {sites:,} site{'s' if sites > 1 else ''}"
            effort.tell(what, number / len(shapes))
            run = folder / f"run-{number}"
            ended = forks.run(f"{LOOPS}:edit", {"run": str(run), "sites": sites, "edits": edits})
            if ended.error or ended.by:
                yield Result(what, "ends", ended.error or f"ended by signal {ended.by}", False, edits)
                continue
            parts = [json.loads(line) for line in ended.said]
            early, late = parts[1], parts[-1]
            growth, slower = late["mb"] - early["mb"], late["seconds"] / early["seconds"]
            yield Result(
                what, f"growth under {MOST_GROWTH_MB:.0f} MB", f"{growth:.1f} MB", growth < MOST_GROWTH_MB, edits
            )
            says = f"{slower:.2f} times, {late['seconds'] * 1e3:.2f} CPU ms an edit"
            yield Result(
                f"{what}: last tenth", "time per edit within 10%", says, slower <= MOST_SLOWER, edits, clock=True
            )
            ended = forks.run(f"{LOOPS}:read", {"run": str(run), "out": str(folder / f"{number}.html")})
            if ended.error or ended.by:
                yield Result(f"{what}, read", "ends", ended.error or f"ended by signal {ended.by}", False, edits)
                continue
            seconds, peak = json.loads(ended.said[0])["seconds"], ended.peak_mb
            test, goal = f"{what}: open, diagnose, report", f"under {MOST_SECONDS:.0f} s"
            yield Result(test, goal, f"{seconds:.1f} CPU s", seconds < MOST_SECONDS, edits, clock=True)
            goal = f"under {MOST_READING_MB / 1_000:.0f} GB"
            yield Result(f"{test}: memory", goal, f"{peak:.0f} MB", peak < MOST_READING_MB, edits)
