"""How well the analysis detects, places, explains and forecasts: the failure zoo and healthy loops, beside five others.

    python -m benchmarks.detection [--seeds N] [--healthy N] [--only tuning|held-out] [--runs DIR] [--json FILE]

**The split.** *Tuning*: seeds 100 to 119 of the scenarios that are not marked `held_out`. Thresholds and rules may be
set with these, and the peers' thresholds are. *Held out*: seeds from 1000 on of all scenarios, those marked `held_out`
among them: other streams, models, editors and parameters than tuning saw, and mechanisms that no rule knows. Nobody
looks at them but this file, when a version is finished. Seeds below 100 were seen while the zoo was built, and count
nowhere.

``--seeds`` is per failing scenario; ``--healthy`` is in all, spread over the healthy loops. What each figure means is
in `scores.py`, what the peers do in `peers.py`. Each loop is gone through once (and again under
each live peer, on ``--peer-seeds`` seeds and 40 healthy runs), on one thread in each of ``--processes`` processes.
Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from benchmarks.detection.judge import Seen, judge
from benchmarks.detection.judged import Judged
from benchmarks.detection.peers import LIVE, OFFLINE, alarmed, isfinite, live, threshold
from benchmarks.detection.scores import (
    Figure,
    alarm_figures,
    by_cause,
    by_scenario,
    cause_pairs,
    confusions,
    counts,
    figures,
    sound,
)
from benchmarks.detection.table import console, mistakes, peers, scenarios, totals, wild_cases
from benchmarks.wild import CASES
from benchmarks.wild import HEALTHY as WELL
from benchmarks.wild.judge import document_of as document_of_wild
from benchmarks.wild.judge import hear
from benchmarks.zoo import HEALTHY, SCENARIOS, Scenario
from benchmarks.zoo.runs import Case, Job, Result, make, spread
from stabilitylab.analysis.findings import json_safe

TUNING: Final = range(100, 120)
HELD_OUT_FROM: Final = 1000
PEER_HEALTHY: Final = 40
SPLITS: Final = ("tuning", "held-out")


def tuning_cases(seeds: int) -> list[Case]:
    """The first so many tuning seeds of every scenario that tuning may see, healthy loops too."""
    seen = [scenario for scenario in (*SCENARIOS, *HEALTHY) if not _held_out(scenario)]
    return [(scenario.name, seed) for seed in TUNING[:seeds] for scenario in seen]


def held_out_cases(seeds: int, healthy: int) -> list[Case]:
    """So many seeds of each failing scenario, and so many healthy runs in all."""
    failing = [(scenario.name, HELD_OUT_FROM + number) for number in range(seeds) for scenario in SCENARIOS]
    return failing + healthy_cases(HELD_OUT_FROM, healthy, HEALTHY)


def healthy_cases(first: int, runs: int, loops: Sequence[Scenario]) -> list[Case]:
    """So many runs, spread over the loops."""
    return [(loops[number % len(loops)].name, first + number // len(loops)) for number in range(runs)]


def _held_out(scenario: Scenario) -> bool:
    return getattr(scenario, "held_out", False)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Seen by a person only."""
    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal, transient=True) as progress:
        yield progress


def gone_through(
    says: str, function: Callable[[Job], Result], jobs: Sequence[Job], processes: int, progress: Progress
) -> list[Result]:
    """`function` of each job, in whatever order."""
    return list(progress.track(spread(function, jobs, processes), total=len(jobs), description=says))


def seen_in(
    cases: Sequence[Case], runs: Path, processes: int, progress: Progress, says: str, budget: float | None = None
) -> list[Seen]:
    """The judged runs, in the order of `cases`; made where they are not there. budget: as for `stabilitylab.attach`."""
    gone_through(f"{says}: edit loops", partial(make, runs=runs, budget=budget), cases, processes, progress)
    found = gone_through(f"{says}: diagnoses", judge, [(case, runs) for case in cases], processes, progress)
    by_case = {(seen.judged.scenario, seen.judged.seed): seen for seen in found}
    return [by_case[case] for case in cases]


def peers_of(
    seen: Sequence[Seen], healthy: Sequence[Seen], cases: Sequence[Case], processes: int, progress: Progress
) -> dict[str, Any]:
    """The same runs as the peers saw them: for each its threshold, if it has one, and the runs with its alarms.

    healthy: what the thresholds are set on. cases: those that the live ones go through.
    """
    found: dict[str, Any] = {}
    for name, score in OFFLINE.items():
        above = threshold(healthy, score)
        found[name] = {"threshold": above, "runs": [alarmed(each, score, above) for each in seen]}
    found["isfinite"] = {"runs": [isfinite(each) for each in seen]}
    judged = {(each.judged.scenario, each.judged.seed): each.judged for each in seen}
    told = gone_through("live peers", live, cases, processes, progress)
    for peer in LIVE:
        found[peer] = {"runs": [replace(judged[case], alarm=alarms[peer]) for case, alarms in told]}
    return found


def _live_cases(seen: Sequence[Seen], seeds: int) -> list[Case]:
    """The first seeds of each failing scenario, and the first healthy runs."""
    judged = [each.judged for each in seen]
    first = min(run.seed for run in judged)
    failing = [run for run in judged if not run.healthy and run.seed < first + seeds]
    well = [run for run in judged if run.healthy][:PEER_HEALTHY]
    return [(run.scenario, run.seed) for run in (*failing, *well)]


def _flat(found: Mapping[str, Figure]) -> dict[str, Any]:
    """Each figure, its interval and the number of runs beside it."""
    plain: dict[str, Any] = {}
    for name, figure in found.items():
        plain[name] = figure.value
        plain[f"{name}_interval"] = None if figure.low is None else [figure.low, figure.high]
        plain[f"{name}_runs"] = figure.runs
    return plain


def document_of(runs: Sequence[Judged]) -> dict[str, Any]:
    """One half of the split, as JSON has it."""
    return {
        "totals": _flat(figures(runs)),
        "counts": counts(runs),
        "scenarios": by_scenario(runs),
        "causes": by_cause(cause_pairs(runs)),
        "confusions": [dict(zip(("scenario", "true", "said", "runs"), row, strict=True)) for row in confusions(runs)],
        "runs": [asdict(run) for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="held-out seeds of each failing scenario")
    parser.add_argument("--healthy", type=int, default=320, help="held-out healthy runs in all")
    parser.add_argument("--tuning-seeds", type=int, default=6, help="tuning seeds of each scenario, at most 20")
    parser.add_argument("--peer-seeds", type=int, default=2, help="seeds of each failing scenario for the live peers")
    parser.add_argument("--only", choices=SPLITS, help="one half; the healthy tuning runs are always made")
    parser.add_argument("--budget", type=float, help="the share of the loop's time that probes may take; else no limit")
    parser.add_argument("--runs", type=Path, help="keep the runs there, and use those that are; else they are deleted")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with ExitStack() as stack:
        runs = options.runs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zoo-")))
        progress = stack.enter_context(_progress())
        look = partial(seen_in, runs=runs, processes=options.processes, progress=progress, budget=options.budget)
        tuning = tuning_cases(options.tuning_seeds)
        if options.only == "held-out":
            loops = {scenario.name for scenario in HEALTHY}
            tuning = [case for case in tuning if case[0] in loops]
        halves = {"tuning": look(tuning, says="tuning")}
        if options.only != "tuning":
            halves["held-out"] = look(held_out_cases(options.seeds, options.healthy), says="held out")
        compared = "tuning" if options.only == "tuning" else "held-out"
        seen = halves[compared]
        healthy = [each for each in halves["tuning"] if sound([each.judged])]
        cases = _live_cases(seen, options.peer_seeds)
        others = peers_of(seen, healthy, cases, options.processes, progress)
        jobs = [(case.name, runs / "wild", canary) for canary in (True, False) for case in (*CASES, *WELL)]
        shutil.rmtree(runs / "wild", ignore_errors=True)
        wild = sorted(
            gone_through("wild loops", partial(hear, budget=options.budget), jobs, options.processes, progress),
            key=lambda each: (each.number, not each.canary),
        )
    judged = {half: [each.judged for each in found] for half, found in halves.items() if options.only in (None, half)}
    blind = {half: [each.blind for each in found] for half, found in halves.items() if half in judged}
    document = {half.replace("-", "_"): document_of(found) for half, found in judged.items()}
    document |= {f"{half.replace('-', '_')}_without_canary": document_of(found) for half, found in blind.items()}
    document["wild"] = document_of_wild(wild)
    table = {"stabilitylab": figures(judged[compared])}
    table |= {name: alarm_figures(peer["runs"]) for name, peer in others.items()}
    document["peers"] = {
        name: {"split": compared, "threshold": peer.get("threshold"), **_flat(table[name])}
        for name, peer in others.items()
    }
    _show(document, judged, compared, table)
    for half, found in blind.items():
        console().print(totals(f"Totals, {half}, once more without a canary", figures(found)))
    console().print(wild_cases("The wild corpus", wild))
    if options.json is not None:
        options.json.write_text(json.dumps(json_safe(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _show(
    document: Mapping[str, Any],
    judged: Mapping[str, Sequence[Judged]],
    compared: str,
    table: Mapping[str, Mapping[str, Figure]],
) -> None:
    out = console()
    for half, found in judged.items():
        plain = document[half.replace("-", "_")]
        says = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in plain["counts"].items())
        out.print(f"[bold]{half.capitalize()}[/]: {says}", highlight=False)
        out.print(scenarios("By scenario (in brackets: never lost, but trouble was named)", plain["scenarios"]))
        out.print(mistakes(confusions(found)))
        out.print(totals(f"Totals, {half}", figures(found)))
    out.print(peers(f"Others, {compared} (lost runs)", table))


if __name__ == "__main__":
    main()
