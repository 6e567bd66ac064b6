"""From which score on a run is called diverging: a bound on false alarms, taken from whole healthy runs.

Split-conformal (Vovk et al. 2005; Lei et al. 2018, section 2.2) with one score per run, after shared/FINDINGS.md,
section 5: each detector's largest statistic over the run is divided by that detector's scale, and the largest of
these is the run's score. The ⌈(1 − α)(n + 1)⌉-th smallest score of n healthy runs is exceeded by a further healthy
run with probability α at most, if it is exchangeable with them: of the same kind of loop, model and editor. Scales
come from runs of their own.

What is shipped in ``thresholds.json`` comes from the healthy loops of the failure zoo on small models; other loops
are not exchangeable with these, so that it never goes below the nominal statistic of 1. It is made by
``python -m benchmarks.thresholds``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, get_type_hints

from stabilitylab.analysis.detectors import DETECTORS, LEAST
from stabilitylab.errors import UsageError
from stabilitylab.record.checked import expect
from stabilitylab.record.plain_files import read_json

SHIPPED: Final = "thresholds.json"
_LARGEST: Final = 1e12
"""Of scales and scores; statistics are of the order of 1."""
LONGEST_SOURCE: Final = 10_000


@dataclass(frozen=True)
class Thresholds:
    """scales: what each detector's statistic is divided by. score: the limit of a run's score. least: no statistic
    below it counts, however quiet the healthy runs were. alpha: the share of healthy runs that may exceed the limit.
    runs: how many it was taken from. source: what these were, for a reader.
    """

    scales: Mapping[str, float]
    score: float
    least: float
    alpha: float
    runs: int
    source: str

    def limit(self, detector: str) -> float:
        """The least statistic of a detector that counts."""
        return max(self.scales[detector] * self.score, self.least)

    def score_of(self, peaks: Mapping[str, float]) -> float:
        """A run's score from its detectors' largest statistics; 0 for a run without any."""
        return max((peak / self.scales[detector] for detector, peak in peaks.items()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """As a file or a manifest holds it."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"limits from {self.runs} healthy runs ({self.source}), at most {self.alpha:.0%} false alarms on such runs"
        )


NOMINAL: Final = Thresholds(dict.fromkeys(DETECTORS, 1.0), 1.0, 1.0, alpha=1.0, runs=0, source="not calibrated")
"""Each limit where its detector's statistic is 1."""


def from_json(plain: Any, where: str) -> Thresholds:
    """The opposite of `to_json`.

    Raises:
        UsageError: `plain` holds no thresholds. where: what it is read from, for the message.
    """
    try:
        given = Thresholds(**expect(dict, plain, "it"))
        for name, kind in get_type_hints(Thresholds).items():
            expect(kind, getattr(given, name), f"its {name}")
    except (TypeError, ValueError) as error:
        expected = "expected what `stabilitylab calibrate` wrote"
        raise UsageError(f"{where} holds no thresholds ({error}); {expected}") from None
    scales = {name: float(scale) for name, scale in given.scales.items()}
    found = replace(given, scales=scales, score=float(given.score), least=float(given.least))
    wrong = set(scales) != set(DETECTORS) or not LEAST <= found.least < _LARGEST
    if not 0.0 <= found.alpha <= 1.0 or found.runs < 0 or len(found.source) > LONGEST_SOURCE:
        raise UsageError(
            f"{where}: expected a share as alpha, a count of runs, and at most {LONGEST_SOURCE:,} characters of source"
        )
    if wrong or not all(0.0 < value < _LARGEST for value in (*scales.values(), found.score)):
        raise UsageError(
            f"{where}: expected a scale above 0 for each of {', '.join(DETECTORS)}, "
            f"a score above 0 and a least of {LEAST} or more"
        )
    return found


def read(path: Path) -> Thresholds:
    """Thresholds from a file. Raises UsageError where it holds none."""
    try:
        plain = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read thresholds from '{path}': {error}") from None
    return from_json(plain, f"'{path}'")


def write(thresholds: Thresholds, path: Path) -> None:
    """The opposite of `read`. Raises UsageError where something else would be replaced, OSError."""
    if path.is_file() and path.stat().st_size:
        try:
            read(path)
        except UsageError as error:
            raise UsageError(f"limits would replace what is none: {error}; expected another name") from None
    path.write_text(f"{json.dumps(thresholds.to_json(), indent=2, allow_nan=False)}\n", encoding="utf-8")


@cache
def shipped() -> Thresholds:
    """Those of the package."""
    plain = json.loads(files("stabilitylab.analysis").joinpath(SHIPPED).read_text(encoding="utf-8"))
    return from_json(plain, SHIPPED)


def rank(runs: int, alpha: float) -> int:
    """Which of the sorted scores of so many runs is the limit, from 1.

    Raises:
        UsageError: there are too few runs for that alpha: at least ⌈1/α⌉ − 1 are needed.
    """
    # 1e-9: (1 − 0.05) · 20 is a little more than 19 in binary.
    place = math.ceil((1.0 - alpha) * (runs + 1) - 1e-9)
    if place > runs:
        least = math.ceil(1.0 / alpha - 1e-9) - 1
        raise UsageError(f"{runs} healthy runs can't bound false alarms at {alpha:.3g}; expected at least {least}")
    return place


def conformal(scores: Sequence[float], alpha: float) -> float:
    """The ⌈(1 − α)(n + 1)⌉-th smallest of n scores. Raises UsageError where there are too few."""
    return sorted(scores)[rank(len(scores), alpha) - 1]
