"""How what watching costs grows with the sites of an edit, and with the edits of a run: linear, and flat.

    python -m benchmarks.growth [--sites 1,10,50] [--edits 20000] [--tiers light,default] [--json FILE]

CPU time of a watched edit less that of the same edit unwatched, one thread, one process, one after the other: medians.
An edit is one forward, one backward and one step of plain SGD on a stack of as many layers of 256x256 as the most sites
asked for; everything is measured at each edit (`budget=None`). ``--edits 0`` leaves the long run out.

- Sites: the models take turns in each round. The line is that of least squares through the medians; beside it stands
  how far the farthest of them is from it.
- Edits: one run at one site, from edit 0 to the last. Its slope is Theil and Sen's over blocks of 100 edits, from edit
  100 on, with its 95% interval; so is that of the unwatched edits in between, which shows what the machine did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import linregress, theilslopes
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

import stabilitylab as sl
from benchmarks.overhead import machine
from stabilitylab.probes.base import Tier

WIDTH: Final = 256
TOKENS: Final = 32
ROUNDS: Final = 40
_BASELINE: Final = 9
"""Edits before the first that counts: the analyzer's own baseline is eight."""
BLOCK: Final = 100
"""Edits that one median is taken of."""
TIERS: Final[tuple[Tier, ...]] = ("light", "default")


def step_of(layers: int, sites: int) -> tuple[nn.Sequential, Callable[[], None]]:
    """A stack of layers of which the first ones are edited, and one edit of it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(layers)))
    weights: list[Tensor] = [layer[0].weight for layer in list(model)[:sites]]  # type: ignore[index]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    draw = torch.Generator().manual_seed(1)

    def step() -> None:
        loss = model(torch.randn(1, TOKENS, WIDTH, generator=draw)).square().mean()
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.sub_(gradient, alpha=1e-3)

    return model, step


def watched(
    tier: Tier, layers: int, sites: int, folder: Path, stack: ExitStack
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A watched edit, and the same one unwatched on a model of its own."""
    model, step = step_of(layers, sites)
    names = [f"{layer}.0" for layer in range(sites)]
    monitor = stack.enter_context(sl.attach(model, names, folder, probes=tier, budget=None, announce=False))

    def edit() -> None:
        with monitor.edit():
            step()

    return edit, step_of(layers, sites)[1]


def seconds_of(action: Callable[[], None]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def by_sites(counts: Sequence[int], tier: Tier, scratch: Path) -> dict[str, Any]:
    """Milliseconds that watching adds to an edit, by its sites, and the line through them."""
    with ExitStack() as stack:
        pairs = {n: watched(tier, max(counts), n, scratch / f"{tier}-{n}", stack) for n in counts}
        added: dict[int, list[float]] = {n: [] for n in counts}
        for number in range(-_BASELINE, ROUNDS):
            for n, (edit, plain) in pairs.items():
                before, took, after = seconds_of(plain), seconds_of(edit), seconds_of(plain)
                if number >= 0:
                    added[n].append(took - (before + after) / 2)
    medians = [statistics.median(added[n]) * 1e3 for n in counts]
    found: dict[str, Any] = {"ms": dict(zip(map(str, counts), medians, strict=True))}
    if len(counts) > 1:
        line = linregress(counts, medians)
        off = max(abs(value / (line.intercept + line.slope * n) - 1) for n, value in zip(counts, medians, strict=True))
        found |= {"ms_of_no_site": line.intercept, "ms_a_site": line.slope, "farthest_from_line": off}
    return found


def by_edits(edits: int, tier: Tier, scratch: Path) -> dict[str, Any]:
    """Milliseconds that watching adds to an edit at the beginning and at the end of a run, and their slopes."""
    with ExitStack() as stack:
        edit, plain = watched(tier, 1, 1, scratch / f"{tier}-long", stack)
        took = np.array([[seconds_of(edit), seconds_of(plain)] for _ in range(edits)]) * 1e3
    blocks = np.median(took[BLOCK // 2 : BLOCK // 2 + (edits - BLOCK // 2) // BLOCK * BLOCK].reshape(-1, BLOCK, 2), 1)
    added, bare = blocks[:, 0] - blocks[:, 1], blocks[:, 1]
    thousands = (np.arange(len(blocks)) + 1) * BLOCK / 1e3
    found: dict[str, Any] = {"ms_at_100": added[0], "ms_at_the_end": added[-1], "edits": edits}
    for name, values in (("added", added), ("unwatched", bare)):
        slope, middle, low, high = theilslopes(values, thousands)
        found[f"{name}_us_a_1000_edits"] = {"slope": slope * 1e3, "low": low * 1e3, "high": high * 1e3}
        found[f"{name}_ms_in_the_middle"] = middle + slope * thousands.mean()
    return found


def _say(tier: str, found: dict[str, Any]) -> None:
    sites, edits = found["sites"], found.get("edits")
    print(f"{tier}: " + ", ".join(f"{ms:.2f} ms at {n} sites" for n, ms in sites["ms"].items()), flush=True)
    if "ms_a_site" in sites:
        print(
            f"  {sites['ms_of_no_site']:.2f} ms + {sites['ms_a_site']:.3f} ms a site; farthest from that line:"
            f" {sites['farthest_from_line']:.1%}",
            flush=True,
        )
    if edits:
        slope, bare = edits["added_us_a_1000_edits"], edits["unwatched_us_a_1000_edits"]
        print(
            f"  one site: {edits['ms_at_100']:.2f} ms at edit 100, {edits['ms_at_the_end']:.2f} ms at"
            f" {edits['edits']:,}; slope {slope['slope']:.2f} µs a 1,000 edits ({slope['low']:.2f} to"
            f" {slope['high']:.2f}); of the unwatched edit {bare['slope']:.2f}",
            flush=True,
        )


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("expected numbers of sites, such as 1,10,50")
    return numbers


def _tiers(text: str) -> list[Tier]:
    found = [tier for tier in TIERS if tier in text.split(",")]
    if len(found) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(TIERS)}")
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sites", type=_numbers, default="1,10,50", help="to compare (default: %(default)s)")
    parser.add_argument("--edits", type=int, default=20_000, help="of the long run (default: %(default)s)")
    parser.add_argument("--tiers", type=_tiers, default=",".join(TIERS), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if 0 < options.edits < 3 * BLOCK:
        parser.error(f"--edits {options.edits}: expected 0, or {3 * BLOCK} or more")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with threadpool_limits(1), tempfile.TemporaryDirectory() as scratch:
        for tier in options.tiers:
            found[tier] = {"sites": by_sites(options.sites, tier, Path(scratch))}
            if options.edits:
                found[tier]["edits"] = by_edits(options.edits, tier, Path(scratch))
            _say(tier, found[tier])
    if options.json:
        options.json.write_text(json.dumps({"tiers": found, "machine": machine()}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
