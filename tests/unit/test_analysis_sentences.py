"""The sentence that findings add up to, and its numbers: onset, since when, what leads, what stands in front."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stabilitylab.analysis import Diagnosis, Finding
from stabilitylab.analysis.causes.evidence import Place
from stabilitylab.analysis.causes.rule import Cause
from stabilitylab.analysis.diagnosis import diagnose, judge, onset
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, VERDICTS, Link, severity
from stabilitylab.analysis.landing import Landing
from stabilitylab.analysis.leading import edit_of, leading, reading, value_words
from stabilitylab.analysis.story import Story

A, B, M = "layers.1.fc1", "layers.1.fc2", "model"
CALM = "Stable over 12 edits: nothing out of the ordinary."
UNKNOWN = Cause(UNKNOWN_CAUSE, "no rule explains this.", "Begin at the first.", "none")
KNOWN = Cause("feedback-growth", "each edit fed the next.", "Restore.", "high")


def finding(edit: int, verdict: str = "drifting", since: int | None = None, **more: Any) -> Finding:
    known = {"rule": "growth", "metric": "update.norm", "site": A, "value": 3.0, "threshold": 1.0, "says": "It grows."}
    return Finding(edit=edit, verdict=verdict, since=since, **{**known, **more})  # type: ignore[arg-type]


def told(*findings: Finding, **more: Any) -> Diagnosis:
    judged: dict[str, Any] = {
        "first_bad": None,
        "cause": UNKNOWN,
        "causes": (),
        "landing": Landing(),
    }
    shown: dict[str, Any] = {"rows": 13, "baseline": True, "alarm": None, "forecast": None, "unwatched": ()}
    edits = more.pop("edits", 12)
    worst = max((each.verdict for each in findings), key=severity, default="stable")
    of_judge = {name: more.pop(name) for name in (*judged, "operations") if name in more}
    found = judge(worst, edits=edits, findings=findings, **{**judged, **of_judge})
    return diagnose(found, edits=edits, **{**shown, **more})


@pytest.mark.parametrize(
    ("findings", "alarm", "began"),
    [
        ([], None, None),
        ([finding(3, "stable")], None, None),
        ([finding(9, since=7), finding(5)], None, 5),
        ([finding(20, "diverging", since=18)], 20, 18),
        ([finding(8, since=6), finding(20, "diverging", since=18)], 20, 6),  # within ten edits of what it led to
        ([finding(7, since=5), finding(20, "diverging", since=18)], 20, 18),
        ([finding(1), finding(8, since=6), finding(20, "diverging", since=18)], 20, 1),
        ([finding(20, "diverging", since=18), finding(25, "diverging", since=2)], 20, 18),  # later changes nothing
        ([finding(8, "stable", since=6), finding(20, "diverging", since=18)], 20, 18),
    ],
)
def test_the_onset_is_where_the_development_began_that_led_to_the_alarm(
    findings: list[Finding], alarm: int | None, began: int | None
) -> None:
    assert onset(findings, alarm) == began


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"rows": 0, "edits": 0}, "Nothing recorded yet."),
        ({"rows": 1, "edits": 0}, "No edit yet: nothing out of the ordinary before the first one."),
        (
            {"edits": 1, "baseline": False},
            "Stable over 1 edit by the absolute limits; a baseline to compare with exists after 8 applied edits.",
        ),
        ({}, "Stable over 12 edits: nothing out of the ordinary."),
        (
            {"unwatched": ("a", "b")},
            f"{CALM} That is as far as it was watched: a; b.",
        ),
        (
            {"landing": Landing(tried=12, landed=0, lost=12)},
            "None of 12 edits moved a watched layer; the model is as it was.",
        ),
        (
            {"landing": Landing(tried=12, landed=0, lost=12, failed=12, left=1, words="x")},
            "None of 12 edits was carried out: each raised an exception (x);"
            " weights were moved by then, and stayed so.",
        ),
        (
            {"landing": Landing(tried=12, landed=4, lost=1)},
            "Only 4 of 12 edits moved a watched layer. Stable over 12 edits: nothing out of the ordinary.",
        ),
    ],
)
def test_of_a_sound_model(more: dict[str, Any], says: str) -> None:
    assert told(**more).says == says


def test_a_note_is_worth_knowing() -> None:
    note = finding(3, "stable", says="Units are dead.")
    assert told(note).says == "Stable over 12 edits. Worth knowing: Units are dead."
    assert told(note, edits=0).says.endswith("before the first one. Worth knowing: Units are dead.")
    assert told(note).first_bad_edit is None


def test_a_drift_is_told_with_what_shows_it() -> None:
    found = told(finding(9, since=7))
    assert found.says == f"Drifting since edit 7: first in {A} (update.norm 3 at edit 9) — it grows."
    assert (found.first_bad_edit, found.onset_edit, found.alarm_edit) == (None, 7, None)
    lost = told(finding(9, since=7), landing=Landing(tried=12, landed=0, lost=12))
    assert lost.says.startswith("None of 12 edits moved a watched layer. Drifting since edit 7: ")


def test_what_diverges_is_told_with_since_when_and_what_came_before() -> None:
    early, bad = finding(9, since=7), finding(14, "diverging", since=12)
    found = told(early, bad, alarm=14, first_bad=bad, cause=KNOWN)
    assert found.says == (
        f"Diverging since edit 12, drifting since edit 7: first in {A} (update.norm 3 at edit 14) —"
        " each edit fed the next."
    )
    assert (found.first_bad_edit, found.first_bad_site, found.first_bad_metric) == (14, A, "update.norm")
    assert (found.cause, found.confidence, found.advice) == ("feedback-growth", "high", "Restore.")
    assert [each.edit for each in found.findings] == [14, 9]
    alone = told(bad, alarm=14, first_bad=bad, cause=KNOWN)
    assert alone.says.startswith("Diverging since edit 12: first in")


def test_what_is_not_finite_is_told_by_its_first_edit() -> None:
    grows = finding(9, "diverging", since=7)
    bad = finding(14, "non-finite", rule="non-finite", metric="weight", value=300.0)
    later = finding(16, "non-finite", rule="non-finite", metric="logits")
    found = told(grows, bad, later, alarm=9, first_bad=bad)
    assert found.first_nonfinite_edit == 14
    since = "Non-finite since edit 14, diverging since edit 7"
    assert found.says.startswith(f"{since}: first in {A} (weight 300 at edit 14)")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (finding(9), "update.norm 3 at edit 9"),
        (finding(9, since=7), "update.norm 3 at edit 9"),  # of drift the edit that showed it
        (finding(9, since=7, rule="canary-lost"), "update.norm 3, since edit 7"),
        (finding(9, forecast=8.0), "update.norm 3 → 8 / limit 1 at edit 9"),
        (finding(9, rule="large-step"), "update 3 times the weight's original norm at edit 9"),
        (finding(9, rule="large-step-harmful"), "update 3 times the weight's original norm at edit 9"),
    ],
)
def test_a_reading_in_words(found: Finding, words: str) -> None:
    assert reading(found) == words
    assert words.startswith(value_words(found).partition(" →")[0])
    assert edit_of(found) in (7, 9)


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.4, "by 0.4 of its norm."), (1.0, "by 1 times its norm."), (2.5, "by 2.5")]
)
def test_the_weight_that_is_furthest_becomes_a_finding(ratio: float, words: str) -> None:
    found = leading(Place(5, "drift.ratio", B, ratio), finding(6, "collapsed", site=M), [finding(2)])
    assert found is not None
    assert (found.rule, found.site, found.edit, found.value, found.verdict) == ("furthest", B, 5, ratio, "drifting")
    assert math.isnan(found.threshold)
    assert words in found.says


def test_a_note_about_a_place_gives_way_to_a_finding_about_it() -> None:
    note, later = finding(5, "stable"), finding(30, "diverging")
    assert leading(Place(5, "update.norm", A), later, [note, later]) is later


def test_the_models_own_first_bad_reading_names_a_layer_that_had_left_by_then() -> None:
    bad = finding(9, "collapsed", site=M)
    layer, later = finding(12, since=9, site=B), finding(12, since=10, site=B)
    assert leading(None, bad, [bad, layer]) is layer
    assert leading(None, bad, [bad, later]) is bad


def test_verdicts_are_in_order() -> None:
    assert [severity(verdict) for verdict in VERDICTS] == [0, 1, 2, 3, 4]
    assert VERDICTS == ("stable", "drifting", "diverging", "collapsed", "non-finite")


@pytest.mark.parametrize(
    ("edit", "due"), [(20, True), (70, True), (71, False), (79, False), (80, True), (81, False), (90, True)]
)
def test_causes_are_looked_for_closely_for_fifty_edits_and_then_at_each_tenth(edit: int, due: bool) -> None:
    assert Story.is_due(edit, 20) == due


def test_short_words_for_a_prompt() -> None:
    assert repr(finding(9)) == "<Finding at edit 9, drifting: 'It grows.'>"
    assert str(finding(9)) == "It grows."
    assert len(repr(finding(9, says="x" * 999))) < 300
    assert str(Link("trigger", "x", 1, None, None, "it fed", "do", "high")) == "trigger: it fed"
    assert finding(9).start == 9
    assert finding(9, since=0).start == 0
