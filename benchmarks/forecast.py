"""How good the forecast is: error, coverage and how often it speaks, on made-up paths with noise as in real runs.

    python -m benchmarks.forecast [--runs N] [--first SEED] [--json FILE]

A path is the distance to a limit in bits (doublings), edit by edit. ``exponential``: falls by as much each edit from a
random onset on; ``young``: from the first edit on, and over after 15 to 40. ``accelerating``: falls ever faster, twenty
times as fast at the end as at the onset. ``root`` and ``linear``: the value adds up as √t or t: bits fall as its log.
``flat``; ``jump``: falls once and stays there.

Noise: readings that scatter by 0.05 to 0.8 bits, some with heavy tails (activations of MEND on the demo model: 0.2 to
0.8); or random steps that stay, each a gamma variable around its mean with a standard deviation of 0.5 to 1.6 means
(weights); or both. 9 to 18 bits at the start, as float16 has.

A failing path is forecast when 30, 50, 70 and 85 % of the edits between its onset and the first reading past its limit
are over; the others at 60, 100, 140 and 170 edits. Error: |median − true| / true, true being the edits from there to
the first reading past the limit. Coverage: share of truths within what is said. ``sites``: whole rows of 50 flat sites
with noise, through the part that picks the series to fit: every forecast there is a false one.

Settings were chosen with seeds from 0 to 399; the default is to report on others. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stabilitylab.analysis.columns import Columns
from stabilitylab.analysis.forecast import WINDOW, Crossing, Forecaster, crossing
from stabilitylab.record.readings import Array, EditRow

FAILING = ("exponential", "young", "accelerating")
KINDS = (*FAILING, "root", "linear", "flat", "jump")
SHARES = (0.3, 0.5, 0.7, 0.85)
EDITS = (60, 100, 140, 170)


@dataclass(frozen=True)
class Course:
    """distance: bits by edit, the first at edit 1. end: the first edit past the limit; None when there is none."""

    distance: Array
    onset: int
    end: int | None


def make(kind: str, seed: int) -> Course:
    """The path of one seed."""
    rng = np.random.default_rng([9, seed])
    onset, bits = int(rng.integers(1, 60)), rng.uniform(9.0, 18.0)
    noise = rng.choice(["reading", "steps", "both"])
    length = int(rng.integers(15, {"accelerating": 60, "young": 40}.get(kind, 150)))
    onset = 0 if kind == "young" else onset
    edits = np.arange(1.0, onset + length + 401.0)
    share = np.maximum((edits - onset) / length, 0.0)
    speed = rng.uniform(0.1, 3.0)
    rise = {
        "exponential": bits * share,
        "young": bits * share,
        "accelerating": bits * np.expm1(3.0 * np.minimum(share, 5.0)) / math.expm1(3.0),
        "root": np.log2(1.0 + speed * np.sqrt(edits)),
        "linear": np.log2(1.0 + speed * edits),
        "flat": 0.0 * edits,
        "jump": np.where(edits > onset, 2.0 * speed, 0.0),
    }[kind]
    if noise != "reading":
        evenness = rng.uniform(0.4, 4.0)
        if kind != "jump":
            rise = np.cumsum(np.diff(rise, prepend=0.0) * rng.gamma(evenness, 1.0 / evenness, edits.size))
        rise = rise + rng.uniform(0.0, 0.05) * rng.standard_normal(edits.size).cumsum()
    if noise != "steps":
        heavy = rng.random() < 0.3
        scatter = rng.standard_t(3, edits.size) / math.sqrt(3.0) if heavy else rng.standard_normal(edits.size)
        rise = rise + rng.uniform(0.05, 0.8) * scatter
    past = np.flatnonzero(rise >= bits)
    return Course(bits - rise, onset, int(past[0]) + 1 if past.size else None)


def _moments(path: Course, kind: str) -> Iterable[int]:
    """The edits after which a forecast is asked for."""
    if kind not in FAILING:
        return EDITS
    end = path.end or path.distance.size
    return [int(path.onset + share * (end - path.onset)) for share in SHARES]


@dataclass(frozen=True)
class Score:
    """said: share of the moments asked at which there was a forecast.

    error: median; None where nothing was said that can be compared. covered: of what was said; early, late: the truth
    came before the interval, or after it. width: median of high over low end.
    """

    asked: int
    said: float
    error: float | None
    covered: float | None
    early: float | None
    late: float | None
    width: float | None


def score(kind: str, seeds: Iterable[int]) -> Score:
    """One kind of path over `seeds`."""
    asked = 0
    rows: list[tuple[float, float, float, float]] = []
    for seed in seeds:
        path = make(kind, seed)
        for at in _moments(path, kind):
            if path.end is not None and at >= path.end:
                continue
            asked += 1
            first = max(at - WINDOW, 0)
            found = crossing(np.arange(first + 1.0, at + 1.0), path.distance[first:at])
            if isinstance(found, Crossing) and found.tells:
                true = math.inf if path.end is None else float(path.end - at)
                rows.append((true, math.floor(found.low), found.middle, math.ceil(found.high)))
    if not rows:
        return Score(asked, 0.0, None, None, None, None, None)
    true, low, middle, high = np.array(rows).T
    ends = np.isfinite(true)
    error = float(np.median(np.abs(middle - true)[ends] / true[ends])) if ends.any() else None
    early, late = float(np.mean(true < low)), float(np.mean(true > high))
    width = float(np.median(high / np.maximum(low, 1.0)))
    return Score(asked, len(rows) / asked, error, 1.0 - early - late, early, late, width)


def false_share(seeds: Sequence[int], sites: int = 50, edits: int = 100) -> float:
    """The share of runs of flat, noisy sites in which any forecast was given, asked after each tenth edit."""
    given = 0
    for seed in seeds:
        rng = np.random.default_rng([10, seed])
        metrics = ("weight.headroom_bits", "activation.headroom_bits", "activation.norm_headroom_bits")
        keys = [(metric, f"layer.{site}") for site in range(sites) for metric in metrics]
        spread = rng.uniform(0.05, 0.8, len(keys))
        columns = Columns(())
        forecaster, spoke = Forecaster(columns), False
        for edit in range(1, edits + 1):
            bits = 14.0 + spread * rng.standard_normal(len(keys))
            readings = dict(zip(keys, bits[:, None], strict=True))
            forecaster.observe(columns.flatten(EditRow(edit, "", "applied", 0.0, 0.0, 0.0, 0.0, readings=readings)))
            spoke = spoke or (edit % 10 == 0 and forecaster.forecast().edits_left is not None)
        given += spoke
    return given / len(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="paths of each kind")
    parser.add_argument("--first", type=int, default=10_000, help="the first seed")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.runs)
    scores = {kind: score(kind, seeds) for kind in KINDS}
    sites = false_share(seeds[: max(len(seeds) // 10, 1)])
    names = ("asked", "said", "error", "covered", "early", "late", "width")
    print(f"{'path':14}" + "".join(f"{name:>9}" for name in names))
    for kind, one in scores.items():
        cells = [f"{one.asked}", f"{one.said:.1%}"]
        cells += ["–" if share is None else f"{share:.1%}" for share in (one.error, one.covered, one.early, one.late)]
        cells.append("–" if one.width is None else f"{one.width:.1f}")
        print(f"{kind:14}" + "".join(f"{cell:>9}" for cell in cells))
    print(f"flat runs of 50 sites in which anything was forecast: {sites:.1%}")
    if arguments.json is not None:
        paths = {kind: asdict(figures) for kind, figures in scores.items()}
        figures = {"first_seed": seeds[0], "runs": len(seeds), "paths": paths, "sites": sites}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
