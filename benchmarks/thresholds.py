"""Makes the limits that the package ships, from healthy loops of the failure zoo.

    python -m benchmarks.thresholds [--runs DIR] [--processes N] [--output FILE] [--alpha SHARE]

Each loop is run with the seeds below. Scales come from the first ones, the score's limit from the others, so that the
split is conformal. Both are tuning: `python -m benchmarks.detection` measures on seeds and loops that are not here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.zoo import HEALTHY
from benchmarks.zoo.runs import Case, folder_of, make, spread
from stabilitylab.analysis import calibration
from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.thresholds import NOMINAL
from stabilitylab.record.run import load

SCALE_SEEDS = range(100, 104)
SCORE_SEEDS = range(104, 120)
LEAST = 1.0
"""The loops of others are not exchangeable with these: what is shipped is never below the nominal statistic."""
SHIPPED = Path(__file__).parents[1] / "stabilitylab" / "analysis" / "thresholds.json"


def peaks_of(case: Case, runs: Path) -> calibration.Peaks:
    """The largest statistic of each detector over a kept run."""
    run = load(folder_of(case, runs))
    analyzer = Analyzer(run.metrics, NOMINAL)
    for edit in run.edits:
        analyzer.observe(edit.row)
    return dict(analyzer.peaks)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="where runs are kept, and taken from; by default they are made anew")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    parser.add_argument("--alpha", type=float, default=0.02)
    arguments = parser.parse_args()
    loops = [scenario.name for scenario in HEALTHY if not scenario.held_out]
    with tempfile.TemporaryDirectory() as made:
        runs = arguments.runs or Path(made)
        scaling = [(loop, seed) for seed in SCALE_SEEDS for loop in loops]
        scoring = [(loop, seed) for seed in SCORE_SEEDS for loop in loops]
        errors = Console(stderr=True)
        with Progress(console=errors, disable=not errors.is_terminal) as progress:
            task = progress.add_task("healthy loops", total=len(scaling) + len(scoring))
            for _ in spread(partial(make, runs=runs), [*scaling, *scoring], arguments.processes):
                progress.advance(task)
        scales = calibration.scales_of([peaks_of(case, runs) for case in scaling])
        peaks = {case: peaks_of(case, runs) for case in scoring}
        source = f"{len(loops)} kinds of loop on small models"
        thresholds = calibration.calibrated(
            list(peaks.values()), scales, alpha=arguments.alpha, source=source, least=LEAST
        )
    arguments.output.write_text(json.dumps(thresholds.to_json(), indent=2) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {thresholds}")
    by = {case: max(found, key=lambda detector: found[detector] / scales[detector]) for case, found in peaks.items()}
    print("the run's score came from", dict(Counter(by.values())))
    for case in sorted(peaks, key=lambda case: -thresholds.score_of(peaks[case]))[:6]:
        print(f"{thresholds.score_of(peaks[case]):6.2f}  {case[0]}, seed {case[1]}, by {by[case]}")
    for detector in scales:
        print(f"{detector:18} scale {scales[detector]:.2f}, limit {thresholds.limit(detector):.2f}")


if __name__ == "__main__":
    main()
