"""How well a watch does, from what was true of each run and what was said of it: plain data in, figures out.

**Which runs count.** A failing run in which the mechanism never struck (no onset) is no failure, and a run of a healthy
loop in which plain torch saw the model lost is not healthy: both are left out, and counted. A failing run is *lost*
where plain torch saw something non-finite or the canary lost.

**Alarm.** The first edit after which the verdict is ``diverging`` or worse. *In time*: not before the onset, and by the
edit at which the model is lost. *Early*: before the onset. That is a false alarm, though the run fails later; but where
the onset is edit 1 or 0, no sound edit comes before it, and an alarm at edit 0 speaks of the state that the loop starts
from: in time. Recall is over the lost runs. A failing run that is never lost has no such edit: there it counts whether
the last diagnosis names trouble at all, a verdict of ``drifting`` or worse or a cause (``static_detected``); what the
same test makes of healthy runs stands beside it (``healthy_trouble_rate``).

**Lead.** (lost − alarm) / (lost − onset): the share of the interval still ahead; 0 without an alarm in time. The
headline is the mean over the runs whose growth is exponential or faster; jumps are counted apart, and runs that are
lost at their onset have no interval. ``…_nonfinite``: with the first non-finite value in place of that loss.

**Site.** Over the failing runs that were detected and whose fault is at a site. Top 1: the diagnosis' first bad site is
the true one, or one of the other names that the scenario gives the place, or a part of these (``editor.transforms`` has
the part ``editor.transforms.256x64.u``). Top 3: one of the first three distinct sites is, out of the first bad site and
then those of the findings above ``stable``, by the edit at which they start and then by dataflow.

**Cause.** Macro-F1 over the causes of the known mechanisms, from all failing runs of these, detected or not; "unknown"
is a miss. Of unknown mechanisms: the share in which the cause is "unknown".

**Forecast.** Asked for at 30, 50, 70 and 85 % of the edits from the onset (else the start) to the loss (else the run's
end). The truth is the edits from there to the loss of the model where the limit is the canary's, else to the first
non-finite value. Where that never comes, a forecast is wrong when its interval is over before the run is; if it is not,
nothing can be said. Error: |median − true| / true.

**Intervals**, 95 %: Wilson's for shares of runs; for the rest percentiles of 1000 bootstrap samples of runs (not of
forecasts, of which a run has several). Runs of one scenario are alike: for scenarios that nobody has seen, both are too
narrow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Final, TypeVar

import numpy as np
from scipy.stats import binomtest, bootstrap

from benchmarks.detection.judged import Judged
from stabilitylab.analysis.findings import UNKNOWN_CAUSE

T = TypeVar("T")
GROWTH: Final = ("exponential", "super-exponential")
COURSES: Final = (*GROWTH, "jump", "static")
SAMPLES: Final = 1000


@dataclass(frozen=True)
class Figure:
    """A figure with the ends of its 95 % interval, from so many runs; None where there is nothing to tell it from."""

    value: float | None
    low: float | None
    high: float | None
    runs: int


def share(hits: Iterable[bool]) -> Figure:
    """The share of runs in which something holds, with Wilson's interval."""
    found = list(hits)
    if not found:
        return Figure(None, None, None, 0)
    test = binomtest(sum(found), len(found))
    ends = test.proportion_ci(method="wilson")
    return Figure(float(test.statistic), float(ends.low), float(ends.high), len(found))


def resampled(runs: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> Figure:
    """A statistic of what each run gives, with percentiles of bootstrap samples of runs: none of a single run."""
    if not runs:
        return Figure(None, None, None, 0)
    value = float(statistic(runs))
    if len(runs) == 1:
        return Figure(value, None, None, 1)
    found = bootstrap(
        (np.arange(len(runs)),),
        lambda picked: statistic([runs[place] for place in picked]),
        n_resamples=SAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Figure(value, float(low), float(high), len(runs))


def leads(runs: Iterable[Judged], *, nonfinite: bool = False) -> list[float]:
    """Of the lost runs that have an interval."""
    found = [run.lead(run.nonfinite if nonfinite else run.lost) for run in runs]
    return [lead for lead in found if lead is not None]


def cause_pairs(runs: Iterable[Judged]) -> list[tuple[str, str]]:
    """(true, said) of the failing runs of known mechanisms."""
    return [(run.cause, run.said_cause) for run in struck(runs) if run.known and run.cause is not None]


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean F1 over the true causes of (true, said) pairs."""
    return fmean(row["f1"] for row in by_cause(pairs).values())


def by_cause(pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Precision (NaN where it was never said), recall and F1 of each true cause, among (true, said) pairs."""
    true, said = Counter(cause for cause, _ in pairs), Counter(cause for _, cause in pairs)
    right = Counter(cause for cause, other in pairs if cause == other)
    return {
        cause: {
            "runs": float(count),
            "precision": right[cause] / said[cause] if said[cause] else math.nan,
            "recall": right[cause] / count,
            "f1": 2.0 * right[cause] / (count + said[cause]),
        }
        for cause, count in sorted(true.items())
    }


def struck(runs: Iterable[Judged]) -> list[Judged]:
    """The failing runs in which something went wrong."""
    return [run for run in runs if not run.healthy and run.onset is not None]


def sound(runs: Iterable[Judged]) -> list[Judged]:
    """The healthy runs in which plain torch saw nothing lost."""
    return [run for run in runs if run.healthy and run.lost is None]


def alarm_figures(runs: Sequence[Judged]) -> dict[str, Figure]:
    """What needs no more than an alarm's edit: also peers can be scored by it."""
    failing, well = struck(runs), sound(runs)
    lost = [run for run in failing if run.lost is not None]
    growing = [run for run in lost if run.course in GROWTH]

    def lead(course: str) -> list[float]:
        return leads(run for run in lost if run.course == course)

    return {
        "recall": share(run.in_time for run in lost),
        "false_alarm_rate": share(run.alarm is not None for run in well),
        "early_alarms": share(run.early for run in failing if run.onset is not None and run.onset > 1),
        "lead_share": resampled(leads(growing), fmean),
        **{f"lead_share_{_word(course)}": resampled(lead(course), fmean) for course in (*GROWTH, "jump")},
        **{f"recall_{_word(course)}": share(r.in_time for r in lost if r.course == course) for course in COURSES},
        "recall_ever": share(run.alarm is not None and not run.early for run in lost),
    }


def _word(course: str) -> str:
    return course.replace("-", "_")


def figures(runs: Sequence[Judged]) -> dict[str, Figure]:
    """Every total; the docstring of this file says what each is."""
    failing, well = struck(runs), sound(runs)
    lost = [run for run in failing if run.lost is not None]
    placed = [run for run in failing if run.sites and run.detected]
    pairs = cause_pairs(runs)
    growing = [run for run in lost if run.course in GROWTH]
    exponential = [run for run in lost if run.course == "exponential"]
    return {
        **alarm_figures(runs),
        "lead_share_median": resampled(leads(growing), median),
        **{
            f"lead_share_{_word(course)}_median": resampled(leads(r for r in lost if r.course == course), median)
            for course in GROWTH
        },
        "lead_share_nonfinite": resampled(leads(growing, nonfinite=True), fmean),
        "static_detected": share(run.detected for run in failing if run.lost is None),
        "healthy_trouble_rate": share(run.trouble for run in well),
        "site_top1": share(run.names_site(1) for run in placed),
        "site_top3": share(run.names_site(3) for run in placed),
        "site_top1_lost": share(run.names_site(1) for run in placed if run.lost is not None),
        "site_top3_lost": share(run.names_site(3) for run in placed if run.lost is not None),
        "cause_macro_f1": resampled(pairs, macro_f1),
        "cause_accuracy": share(true == said for true, said in pairs),
        "unknown_abstains": share(run.said_cause == UNKNOWN_CAUSE for run in failing if not run.known),
        "healthy_cause_rate": share(run.said_cause != UNKNOWN_CAUSE for run in well),
        "forecast_error": _errors(exponential),
        "forecast_error_all": _errors(lost),
        "forecast_coverage": _coverage(failing),
        "forecast_spoke": _spoke(growing),
        "healthy_forecast_rate": share(any(asked.middle is not None for asked in run.asked) for run in well),
    }


def _errors(runs: Iterable[Judged]) -> Figure:
    found = [[asked.error for asked in run.asked if asked.error is not None] for run in runs]
    return resampled([errors for errors in found if errors], lambda some: median(e for errors in some for e in errors))


def _coverage(runs: Iterable[Judged]) -> Figure:
    found = [[asked.covered for asked in run.asked if asked.covered is not None] for run in runs]
    return resampled([held for held in found if held], lambda some: fmean(c for held in some for c in held))


def _spoke(runs: Iterable[Judged]) -> Figure:
    found = [[asked.middle is not None for asked in run.asked] for run in runs if run.asked]
    return resampled(found, lambda some: fmean(s for spoke in some for s in spoke))


def counts(runs: Sequence[Judged]) -> dict[str, int]:
    """How many runs there are of each kind, those that are left out included."""
    failing = struck(runs)
    lost = [run for run in failing if run.lost is not None]
    return {
        "failing": len(failing),
        "lost": len(lost),
        "never_lost": len(failing) - len(lost),
        "lost_at_onset": sum(run.lead(run.lost) is None for run in lost),
        "never_struck": sum(not run.healthy for run in runs) - len(failing),
        "healthy": len(sound(runs)),
        "healthy_but_lost": sum(run.healthy for run in runs) - len(sound(runs)),
        "forecasts": sum(asked.middle is not None for run in failing for asked in run.asked),
    }


def confusions(runs: Iterable[Judged]) -> list[tuple[str, str, str, int]]:
    """(scenario, true cause, cause said, runs) of every wrong cause, the most frequent first.

    Of an unknown mechanism every cause is wrong but "unknown"; of a healthy run too.
    """
    found = Counter(
        (run.scenario, run.cause or "none", run.said_cause)
        for run in (*struck(runs), *sound(runs))
        if run.said_cause != (run.cause if run.known and not run.healthy else UNKNOWN_CAUSE)
    )
    return [(*names, count) for names, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))]


def by_scenario(runs: Sequence[Judged]) -> list[dict[str, Any]]:
    """One plain row for each scenario, in the order in which they come: numbers of runs, and means."""
    names = list(dict.fromkeys(run.scenario for run in runs))
    return [_scenario([run for run in runs if run.scenario == name]) for name in names]


def _scenario(runs: Sequence[Judged]) -> dict[str, Any]:
    first = runs[0]
    counted = struck(runs) or sound(runs)
    lost = [run for run in counted if run.lost is not None]
    placed = [run for run in counted if run.sites and run.detected]
    right = UNKNOWN_CAUSE if first.healthy or not first.known else first.cause
    ahead = leads(lost)
    errors = [asked.error for run in lost for asked in run.asked if asked.error is not None]
    return {
        "scenario": first.scenario,
        "course": first.course,
        "cause": first.cause,
        "known": first.known,
        "runs": len(runs),
        "counted": len(counted),
        "lost": len(lost),
        "in_time": sum(run.in_time for run in lost),
        "late": sum(run.alarm is not None and not run.early and not run.in_time for run in lost),
        "early": sum(run.early for run in counted),
        "alarms": sum(run.alarm is not None for run in counted),
        "detected": sum(run.detected for run in counted) if not first.healthy else None,
        "lead": fmean(ahead) if ahead else None,
        "placed": len(placed),
        "site_top1": sum(run.names_site(1) for run in placed),
        "site_top3": sum(run.names_site(3) for run in placed),
        "cause_right": sum(run.said_cause == right for run in counted),
        "causes_said": dict(Counter(run.said_cause for run in counted).most_common()),
        "confidence": dict(Counter(run.confidence for run in counted).most_common()),
        "asked": sum(len(run.asked) for run in counted),
        "forecasts": sum(asked.middle is not None for run in counted for asked in run.asked),
        "forecast_error": median(errors) if errors else None,
    }
