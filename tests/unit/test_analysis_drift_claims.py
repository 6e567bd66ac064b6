"""What is claimed of one series against its own baseline: at which sizes, since when, and in which words.

Baselines here are without any noise, so that a spread is its metric's prior alone: ``prior · √(4/12)`` after eight
readings. The limits are those of the headers of `drift` and `detectors`, written out once more.
"""

from __future__ import annotations

import math

import pytest

from stabilitylab.analysis import Analyzer, Finding
from stabilitylab.analysis.drift_series import TRACKED
from stabilitylab.analysis.thresholds import NOMINAL
from tests.synthetic_runs import METRICS, row

A = "decoder.layers.1.fc1"
USUAL = 2.0


def claims(values: list[float], metric: str = "activation.rms", base: list[float] | None = None) -> list[Finding]:
    """The findings of one series: eight readings of the usual, and then these."""
    analyzer = Analyzer(METRICS, NOMINAL)
    analyzer.observe(row(0, {}))
    for edit, value in enumerate([*([USUAL] * 8 if base is None else base), *values], start=1):
        analyzer.observe(row(edit, {(metric, A): value}))
    return list(analyzer.diagnosis().findings)


def of_rule(rule: str, values: list[float], metric: str = "activation.rms") -> list[Finding]:
    return [finding for finding in claims(values, metric) if finding.rule == rule]


def spread(metric: str) -> float:
    return TRACKED[metric].spread * math.sqrt(4 / 12)


def far(metric: str) -> float:
    """The factor that is far beyond the usual."""
    return math.exp(max(8 * spread(metric), math.log(100)))


UPWARDS = [name for name in TRACKED if TRACKED[name].minus is None]


@pytest.mark.parametrize("metric", UPWARDS)
def test_three_readings_in_a_row_that_are_far_away_are_a_level(metric: str) -> None:
    size = USUAL * far(metric)
    (found,) = of_rule("level", [1.001 * size] * 3, metric)
    assert (found.edit, found.since, found.verdict, found.site) == (11, 9, "diverging", A)
    assert found.value == pytest.approx(1.001 * size)
    assert found.threshold == pytest.approx(size)
    assert found.usual == pytest.approx(USUAL)
    assert "times its baseline of 2 at edit 11, and above its band since edit 9." in found.says
    assert of_rule("level", [0.999 * size] * 5, metric) == []
    assert of_rule("level", [1.001 * size] * 2, metric) == []
    assert of_rule("level", [1.001 * size, USUAL] * 4, metric) == []


@pytest.mark.parametrize("metric", UPWARDS)
def test_three_that_climb_past_a_quarter_a_half_and_the_whole_of_it_are_one_too(metric: str) -> None:
    unit = math.log(far(metric))

    def climb(*shares: float) -> list[Finding]:
        return of_rule("level", [USUAL * math.exp(share * unit) for share in shares], metric)

    assert len(climb(0.251, 0.501, 1.001)) == 1
    assert climb(0.249, 0.501, 1.001) == climb(0.251, 0.499, 1.001) == climb(0.251, 0.501, 0.999) == []
    assert climb(0.6, 0.501, 1.001) == []  # they must climb


@pytest.mark.parametrize("metric", UPWARDS)
def test_three_readings_that_have_left_are_drift(metric: str) -> None:
    size = USUAL * math.exp(max(4 * spread(metric), math.log(3)))
    (found,) = of_rule("drift", [1.001 * size] * 3, metric)
    assert (found.edit, found.since, found.verdict) == (11, 9, "drifting")
    assert found.threshold == pytest.approx(size)
    assert of_rule("drift", [0.999 * size] * 5, metric) == []
    assert of_rule("drift", [1.001 * size] * 2, metric) == []
    assert of_rule("drift", [2 * USUAL * far(metric)] * 5, metric) == []  # a level says more


def test_one_update_that_is_huge_is_a_jump() -> None:
    metric, size = "update.norm", USUAL * 1_000.0
    (found,) = of_rule("jump", [1.001 * size], metric)
    assert (found.edit, found.since, found.verdict, found.value) == (9, 9, "diverging", pytest.approx(1.001 * size))
    assert found.threshold == pytest.approx(size)
    assert found.says == f"update.norm at {A} jumped at edit 9: it is 1e3 times its baseline of 2."
    assert of_rule("jump", [0.999 * size], metric) == []
    # Against the median of the three before it, where that is above the baseline.
    assert of_rule("jump", [3.0, 2.0, 3.0, 1.499 * size], metric) == []
    assert len(of_rule("jump", [3.0, 2.0, 3.0, 1.501 * size], metric)) == 1
    assert len(of_rule("jump", [1.0, 1.0, 1.0, 1.001 * size], metric)) == 1
    assert [metric for metric in TRACKED if TRACKED[metric].jumps] == ["update.norm"]


FALLS = {
    "update.norm": (1e4, "drifting"),
    "activation.rms": (100.0, "drifting"),
    "activation.max_abs": (100.0, "drifting"),
    "gradient.norm": (1e6, "drifting"),
}


@pytest.mark.parametrize("metric", FALLS)
def test_a_fall_counts_by_the_metrics_own_factor(metric: str) -> None:
    factor, verdict = FALLS[metric]
    (found,) = of_rule("shrink", [USUAL / (1.001 * factor)] * 3, metric)
    assert (found.edit, found.since, found.verdict) == (11, 9, verdict)
    assert found.threshold == pytest.approx(USUAL / factor)
    assert ", and below its band since edit 9." in found.says
    assert of_rule("shrink", [USUAL / (0.999 * factor)] * 5, metric) == []
    assert of_rule("shrink", [USUAL / (1.001 * factor)] * 2, metric) == []


@pytest.mark.parametrize("metric", ["weight.max_abs", "weight.spectral_norm", "editor.input_max"])
def test_of_some_metrics_a_fall_means_nothing(metric: str) -> None:
    assert of_rule("shrink", [1e-20] * 5, metric) == []


@pytest.mark.parametrize("family", ["logits", "canary"])
def test_a_range_that_closes_is_a_collapse_on_the_way(family: str) -> None:
    def closing(factor: float) -> list[Finding]:
        analyzer = Analyzer(METRICS, NOMINAL)
        for edit in range(12):
            half = 1.0 if edit <= 8 else 1.0 / factor
            ends = {(f"{family}.min", "model"): 3.0 - half, (f"{family}.max", "model"): 3.0 + half}
            analyzer.observe(row(edit, ends if edit else {}))
        return [finding for finding in analyzer.diagnosis().findings if finding.rule == "shrink"]

    (found,) = closing(30.1)
    assert (found.edit, found.verdict, found.usual) == (11, "diverging", pytest.approx(2.0))
    word = "logits" if family == "logits" else "canary logits"
    assert found.says.startswith(f"The range of {word} (max − min) at the model is 0.0332 times its baseline of 2")
    assert closing(29.9) == []


def test_it_is_outside_its_band_since_the_first_of_the_readings_but_for_one_that_came_back() -> None:
    size = USUAL * math.exp(max(4 * spread("activation.rms"), math.log(3)))
    outside, inside = 1.51 * USUAL, 1.49 * USUAL

    def since(*before: float) -> int | None:
        (found,) = of_rule("drift", [*before, *[1.01 * size] * 3])
        return found.since

    assert since() == 9
    assert since(outside) == 9
    assert since(inside) == 10
    assert since(outside, inside) == 9  # one reading back inside does not end that
    assert since(outside, inside, inside) == 12
    assert since(outside, inside, inside, outside) == 12
    assert since(USUAL / 1.51) == 10  # the other side has a band of its own


def test_a_readings_spread_is_taken_from_the_first_eight() -> None:
    """Differences of 0.4 in logs: a standard deviation of 1.4826 · 0.4 / √2, with a prior worth four readings."""
    base = [USUAL * math.exp(0.4 * (edit % 2)) for edit in range(8)]
    middle = USUAL * math.exp(0.2)
    own = 1.4826 * 0.4 / math.sqrt(2.0)
    sigma = math.sqrt((4 * 0.2**2 + 8 * own**2) / 12)
    size = middle * math.exp(4 * sigma)
    for factor, said in ((1.001, True), (0.999, False)):
        rules = [finding.rule for finding in claims([factor * size] * 3, base=base)]
        assert ("drift" in rules) == said
    (found,) = (finding for finding in claims([1.001 * size] * 3, base=base) if finding.rule == "drift")
    assert found.usual == pytest.approx(middle)


def test_dry_edits_are_the_baseline_where_there_are_eight_of_them() -> None:
    def drifts(dry: int, size: float) -> bool:
        analyzer = Analyzer(METRICS, NOMINAL)
        analyzer.observe(row(0, {}))
        for edit in range(1, dry + 1):
            analyzer.observe_dry(row(edit, {("activation.rms", A): USUAL * math.exp(0.3 * (-1) ** edit)}))
        for edit in range(1, 4):
            analyzer.observe(row(edit, {("activation.rms", A): size}))
        return any(finding.rule == "drift" for finding in analyzer.diagnosis().findings)

    # All deviate from the median by 0.3 in logs.
    sigma = math.sqrt((4 * 0.2**2 + 8 * (1.4826 * 0.3) ** 2) / 12)
    size = USUAL * math.exp(4 * sigma)
    assert drifts(8, 1.001 * size)
    assert not drifts(8, 0.999 * size)
    assert not drifts(7, 10 * size)


def test_the_first_edit_of_all_is_a_jump_beside_dry_edits() -> None:
    def rules(size: float) -> set[str]:
        analyzer = Analyzer(METRICS, NOMINAL)
        analyzer.observe(row(0, {}))
        for edit in range(1, 9):
            analyzer.observe_dry(row(edit, {("update.norm", A): USUAL * math.exp(0.01 * (-1) ** edit)}))
        analyzer.observe(row(1, {("update.norm", A): size}))
        return {finding.rule for finding in analyzer.diagnosis().findings}

    assert "jump" in rules(1e4 * USUAL)
    assert "jump" not in rules(10.0 * USUAL)


def test_growth_says_how_fast_it_is_and_over_how_many_edits() -> None:
    rate = 0.5
    grown = [USUAL * math.exp(rate * edit) for edit in range(1, 13)]
    (found,) = of_rule("growth", grown, "weight.max_abs")
    assert found.verdict == "diverging"
    assert "faster than edits add up; at edit" in found.says
    assert "over 12 edits)" in found.says
    assert "grows by" in found.says
    assert found.threshold == pytest.approx(USUAL * math.exp(max(3 * spread("weight.max_abs"), math.log(3))))


@pytest.mark.parametrize(
    ("per_edit", "words"), [(0.05, "5% per edit (at least 5%"), (0.7, "a factor of 2.01 per edit")]
)
def test_growth_is_a_percentage_and_from_two_on_a_factor(per_edit: float, words: str) -> None:
    grown = [USUAL * math.exp(per_edit * edit) for edit in range(60)]
    analyzer = Analyzer(METRICS, NOMINAL)
    for edit, value in enumerate(grown, start=1):
        analyzer.observe(row(edit, {("weight.max_abs", A): value}))
    (found,) = (finding for finding in analyzer.diagnosis().findings if finding.rule == "growth")
    assert words in found.says
