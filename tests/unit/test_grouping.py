"""What was found at one edit and one layer is one event, in one line."""

from __future__ import annotations

import math

import pytest

from stabilitylab.analysis import Finding
from stabilitylab.analysis.grouping import Group, grouped
from stabilitylab.reports.events import event_words, short_places

A, B = "model.layers.1.fc2", "model.layers.2.fc1"


def finding(metric: str, value: float = 10.0, *, usual: float | None = None, **more: object) -> Finding:
    known = {"rule": "drift", "site": A, "edit": 12, "threshold": 2.0, "says": f"{metric}.", "verdict": "drifting"}
    return Finding(metric=metric, value=value, usual=usual, **{**known, **more})  # type: ignore[arg-type]


def said(*findings: Finding) -> str:
    (group,) = grouped(findings)
    return group.says


def test_one_line_for_many_metrics() -> None:
    outputs = [finding(f"activation.{name}", 10.0 + place, usual=1.0) for place, name in enumerate("ab")]
    weights = [finding("weight.max_abs", 9.0, usual=2.0)]
    assert said(*outputs) == "outputs 10–11 times usual, 2 metrics"
    assert said(*outputs, *weights) == "outputs 10–11 times usual, weights 4.5 times usual, 3 metrics"


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        ([finding("update.norm", 3.0, usual=0.5)], "update 6 times usual"),
        (
            [finding("update.norm", 3.0, usual=0.5, rule="growth")],
            "update 6 times usual, growing faster than edits add up",
        ),
        ([finding("update.norm", 4.4, rule="large-step")], "update 4.4 times the weight's original norm (limit 2)"),
        ([finding("gradient.norm", 0.0, usual=0.5, rule="shrink")], "gradient 0"),
        ([finding("gradient.norm", 3.0, usual=1.0, more_sites=4)], "gradient 3 times usual, and at 4 more sites"),
        (
            [finding("editor.input_max", 3.2e5), finding("editor.input_max", 3.2e5, usual=32.0)],
            "editor.input_max 3.2e5 (limit 2), 10,000 times usual",
        ),
        (
            [finding("update.norm", 4.4, rule="large-step"), finding("drift.ratio", 1.0, threshold=math.nan)],
            "update 4.4 times the weight's original norm (limit 2), drift.ratio 1, 2 metrics",
        ),
        (
            [
                finding("weight.nonfinite", rule="non-finite"),
                finding("gradient.norm", math.nan),
                finding("weight.x", math.inf),
            ],
            "weights and gradient NaN or infinite, 3 metrics",
        ),
        (
            [finding("canary.kl", 1.0, forecast=3.0), finding("canary.max", 8.0, usual=1.0)],
            "canary.kl 1 → 3 / limit 2, canary logits 8 times usual, 2 metrics",
        ),
    ],
)
def test_each_kind_of_claim_has_its_words(findings: list[Finding], words: str) -> None:
    assert said(*findings) == words


def test_a_claim_alone_keeps_its_own_sentence() -> None:
    (group,) = grouped([finding("attention.masked", says="Rows are padding altogether.")])
    assert (group.says, group.sentence) == ("Rows are padding altogether.", True)
    assert group.short == "attention.masked 10 (limit 2)"


def test_of_one_metric_the_worst_claim_speaks() -> None:
    mild, worse = finding("canary.kl", says="Mild."), finding("canary.kl", says="Worse.", verdict="collapsed")
    (group,) = grouped([mild, worse])
    assert (group.says, group.verdict, group.members) == ("Worse.", "collapsed", (worse, mild))


def test_events_are_by_edit_and_layer_and_the_headlines_comes_first() -> None:
    first, early, other = finding("a.x"), finding("b.x", edit=3), finding("c.x", site=B)
    late = finding("d.x", verdict="diverging")
    groups = grouped([first, early, other, late])
    assert [(group.edit, group.site) for group in groups] == [(12, A), (3, A), (12, B)]
    assert groups[0].members == (late, first)
    assert sum(len(group.members) for group in groups) == 4


def test_an_event_names_its_layer_as_charts_do() -> None:
    places = short_places([A, B, "model", "editor"])

    def words(site: str, *, sentence: bool = False) -> str:
        return event_words(Group(1, site, "drifting", "outputs 3 times usual", sentence, "", ()), places)

    assert words(A) == "1.fc2: outputs 3 times usual"
    assert words("model") == "the model: outputs 3 times usual"
    assert words("elsewhere") == "elsewhere: outputs 3 times usual"
    assert words(A, sentence=True) == "outputs 3 times usual"
