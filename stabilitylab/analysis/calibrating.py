"""Limits of one's own: from runs that the user knows to be healthy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from stabilitylab.analysis.calibration import Peaks, calibrated
from stabilitylab.analysis.findings import severity
from stabilitylab.analysis.thresholds import NOMINAL, Thresholds, rank, shipped
from stabilitylab.errors import UsageError
from stabilitylab.record.run import Run, load


def calibrate(runs: Sequence[Path], *, alpha: float = 0.05) -> Thresholds:
    """Limits that a further healthy run of the same kind exceeds with probability `alpha` at most.

    runs: whole healthy runs of the same kind of loop, model and editor: only of such runs does the bound speak. The
    detectors' scales are those that are shipped, which these runs had no part in.

    Raises:
        UsageError: too few runs for `alpha` (19 for 5 %, 99 for 1 %), one of them twice, or one that is not healthy.
        RunError: a path is no run.
    """
    rank(len(runs), alpha)  # before any is read
    peaks = list(_peaks(runs))
    return calibrated(peaks, shipped().scales, alpha=alpha, source="the user's own")


def _peaks(runs: Sequence[Path]) -> Iterator[Peaks]:
    seen: set[Path] = set()
    for path in runs:
        run = load(path)
        where = run.path.resolve()
        if where in seen:
            raise UsageError(f"'{path}' is given twice; expected each run once")
        seen.add(where)
        yield _peaks_of(run)


def _peaks_of(run: Run) -> Peaks:
    analyzer = run.analyzed(NOMINAL)
    found = analyzer.diagnosis()
    if severity(found.verdict) >= severity("collapsed"):
        raise UsageError(f"'{run.path}' is not healthy ({found.says}); expected runs with nothing wrong")
    if not len(run):
        raise UsageError(f"'{run.path}' holds no edit; expected whole healthy runs")
    return dict(analyzer.peaks)
