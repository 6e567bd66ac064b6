"""The headline's edit, place, metric and number are those of finding 1, which is on every surface."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest

from stabilitylab.analysis import Diagnosis, Finding, severity
from stabilitylab.analysis.causes.evidence import Place
from stabilitylab.analysis.leading import edit_of, leading, reading
from stabilitylab.analysis.words import place_name
from stabilitylab.record.readings import EditRow
from stabilitylab.record.run import load
from tests.synthetic import make_run
from tests.synthetic_runs import diagnose, growing, healthy, row


def finding(
    edit: int, site: str, verdict: str = "drifting", *, rule: str = "drift", metric: str = "m", since: int | None = None
) -> Finding:
    return Finding(rule, metric, site, edit, 3.0, 1.0, f"{metric} at {site}", verdict, since)  # type: ignore[arg-type]


def leaving(edits: int = 12, *, ratios: bool = True) -> list[EditRow]:
    """A canary that leaves, of a model one of whose weights moves far, and no other rule speaks of weights.

    ratios: whether it is read how far, beside their norms.
    """
    rows = []
    for edit in range(edits + 1):
        readings = {("canary.kl", "model"): 1e-4 + 0.04 * edit**2, ("canary.agreement", "model"): 1.0}
        for site, pace in (("layers.0", 0.02), ("layers.1", 0.05)):
            readings[("update.norm", site)] = pace if edit else 0.0
            readings[("drift.norm", site)] = pace * edit
            if ratios:
                readings[("update.ratio", site)] = pace if edit else 0.0
                readings[("drift.ratio", site)] = pace * edit
        rows.append(row(edit, readings))
    return rows


def spikes(edit: int) -> list[EditRow]:
    return [row(at, {("weight.nonfinite", "a"): 3.0 if at == edit else 0.0}) for at in range(edit + 1)]


def diagnoses(tmp_path: Path) -> Iterable[Diagnosis]:
    """Runs of all verdicts, at each third edit of them."""
    for rows in (
        leaving(),
        leaving(ratios=False),
        spikes(4),
        healthy(4).rows[:60],
        growing(11, "exponential").rows,
        growing(3, "super-exponential").rows,
    ):
        for end in range(2, len(rows) + 1, 3):
            yield diagnose(rows[:end])
    for dies_at in (3, 14, None):
        yield load(make_run(tmp_path / str(dies_at), edits=24, dies_at=dies_at)).diagnosis()


def test_the_headline_is_about_finding_1_in_every_run(tmp_path: Path) -> None:
    seen = set()
    for diagnosis in diagnoses(tmp_path):
        if severity(diagnosis.verdict) >= severity("diverging"):
            first = diagnosis.findings[0]
            said = (diagnosis.first_bad_edit, diagnosis.first_bad_site, diagnosis.first_bad_metric)
            assert said == (edit_of(first), first.site, first.metric)
            assert f"first in {place_name(first.site)} ({reading(first)}) — " in diagnosis.says
            seen.add(diagnosis.verdict)
        elif diagnosis.first_bad_site is not None:
            assert diagnosis.findings[0].site == diagnosis.first_bad_site
        assert [each.edit for each in diagnosis.findings[1:]] == sorted(each.edit for each in diagnosis.findings[1:])
    assert seen >= {"diverging", "non-finite"}


def test_the_weight_that_a_headline_names_is_a_finding_with_its_number() -> None:
    diagnosis = diagnose(leaving())
    first = diagnosis.findings[0]
    assert (first.rule, first.metric, first.site) == ("furthest", "drift.ratio", "layers.1")
    assert first.value == pytest.approx(0.05 * first.edit)
    assert math.isnan(first.threshold)
    assert f"drift.ratio {first.value:.3g} at edit {first.edit}" in diagnosis.says


def test_an_early_alarm_says_value_forecast_and_limit() -> None:
    diagnosis = diagnose(leaving(ratios=False)[:7])
    first = diagnosis.findings[0]
    assert (first.rule, first.site) == ("canary-heading", "model")
    assert first.forecast is not None
    assert first.value < first.threshold <= first.forecast
    assert (
        f"(canary.kl {first.value:.3g} → {first.forecast:.3g} / limit {first.threshold:.3g} at edit" in diagnosis.says
    )
    assert f"forecast to reach {first.forecast:.3g} within" in first.says


def test_the_place_of_the_cause_comes_first_then_the_first_bad_reading_that_has_one() -> None:
    early, layer, bad = finding(2, "a"), finding(5, "b", since=3), finding(6, "model", "collapsed", rule="canary-lost")
    late = finding(9, "c", "diverging")
    everything = [early, layer, bad, late]
    assert leading(Place(9, "m", "c"), bad, everything) is late
    assert leading(Place(5, "other", "b"), bad, everything) is layer  # nothing else is known of that reading
    assert leading(None, bad, everything) is early
    assert leading(None, bad, [bad, late]) is bad  # what left its range later is no place of it
    assert leading(None, late, everything) is late
    assert leading(None, None, []) is None
    assert leading(None, None, [finding(1, "a", "stable"), early]) is early


def test_of_the_same_reading_the_finding_nearest_in_time_is_named() -> None:
    found = [finding(2, "a", "stable"), finding(4, "a"), finding(30, "a", "diverging", rule="level")]
    assert leading(Place(28, "m", "a"), found[2], found) is found[2]
    assert leading(Place(3, "m", "a"), found[2], found) is found[1]
