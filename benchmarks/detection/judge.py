"""From a kept run of the zoo to what is scored: its rows are fed to the analyzer one by one, as the monitor did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.detection.judged import Asked, Judged
from benchmarks.zoo import Outcome, State
from benchmarks.zoo.runs import Case, folder_of, kept
from stabilitylab.analysis.findings import Diagnosis, Forecast, severity
from stabilitylab.record.readings import EditRow
from stabilitylab.record.run import analyzer_of, load

SHARES: Final = (0.3, 0.5, 0.7, 0.85)


@dataclass(frozen=True)
class Seen:
    """A judged run, and what the peers are given of it, from its first edit on.

    blind: the same, judged as if there had been no canary. norms: ‖ΔW‖ over all watched weights. losses: of the edit's
    own forward; None where there was none.
    """

    judged: Judged
    blind: Judged
    norms: tuple[float, ...]
    losses: tuple[float | None, ...]


def judge(job: tuple[Case, Path]) -> Seen:
    """What is said of a kept run after each edit that matters, beside the truth."""
    case, runs = job
    outcome = kept(case, runs)
    run = load(folder_of(case, runs))
    moments = set(_moments(outcome))
    analyzer, asked = analyzer_of(run.metrics, run.manifest, run.thresholds), []
    blind = analyzer_of(run.metrics, run.manifest, run.thresholds)
    for edit in run.edits:
        analyzer.observe(edit.row)
        blind.observe(_without_canary(edit.row))
        if edit.edit in moments:
            asked.append(_asked(outcome, edit.edit, analyzer.diagnosis().forecast))
    losses = tuple(edit.row.scalar("logits.loss", "model") for edit in run.edits[1:])
    judged = _judged(outcome, analyzer.diagnosis(), tuple(asked))
    return Seen(judged, _judged(outcome, blind.diagnosis(), ()), tuple(map(_norm, outcome.states[1:])), losses)


def _without_canary(row: EditRow) -> EditRow:
    """The row of the same loop without a canary, which changes nothing else that is read."""
    readings = {key: values for key, values in row.readings.items() if not key[0].startswith("canary.")}
    return replace(row, readings=readings)


def _norm(state: State) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in state.updates.values()))


def _moments(outcome: Outcome) -> Iterator[int]:
    """The edits after which a forecast is asked for; in a run that is over at once there are none."""
    truth = outcome.truth
    first = truth.onset or 0
    last = outcome.states[-1].edit if truth.lost_edit is None else truth.lost_edit
    return (edit for edit in (int(first + share * (last - first)) for share in SHARES) if edit < last)


def _asked(outcome: Outcome, edit: int, forecast: Forecast | None) -> Asked:
    truth, after = outcome.truth, outcome.states[-1].edit - edit
    if forecast is None or forecast.edits_left is None:
        end = truth.lost_edit
    else:
        end = truth.lost_edit if forecast.limit == "canary-lost" else truth.nonfinite_edit
    true = None if end is None else end - edit
    if forecast is None:
        return Asked(edit, after, true)
    return Asked(edit, after, true, forecast.edits_left, forecast.low, forecast.high)


def _judged(outcome: Outcome, diagnosis: Diagnosis, asked: tuple[Asked, ...]) -> Judged:
    scenario, truth = outcome.scenario, outcome.truth
    return Judged(
        scenario=scenario.name,
        seed=outcome.seed,
        course=truth.course,
        known=scenario.known,
        cause=truth.cause,
        onset=truth.onset,
        lost=truth.lost_edit,
        nonfinite=truth.nonfinite_edit,
        sites=() if truth.site is None else (truth.site, *truth.also),
        edits=diagnosis.edits,
        alarm=diagnosis.alarm_edit,
        verdict=diagnosis.verdict,
        said_cause=diagnosis.cause,
        confidence=diagnosis.confidence,
        said_sites=_sites(diagnosis),
        asked=asked,
    )


def _sites(diagnosis: Diagnosis) -> tuple[str | None, ...]:
    """The first bad site, named or not, and up to two others, by the start of what is claimed of them."""
    worse = [finding for finding in diagnosis.findings if severity(finding.verdict) > severity("stable")]
    in_order = [finding.site for finding in sorted(worse, key=lambda finding: finding.start)]
    others = dict.fromkeys(site for site in in_order if site != diagnosis.first_bad_site)
    return (diagnosis.first_bad_site, *list(others)[:2])
