"""Hard facts: what one reading proves, from edit 0 on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stabilitylab.analysis import Analyzer, Diagnosis
from stabilitylab.analysis.analyzer import NOTHING_MOVED
from stabilitylab.record.readings import EditRow, Key, Note
from tests.synthetic_runs import METRICS, diagnose, row

A, B = "decoder.layers.1.fc1", "decoder.layers.1.fc2"
U, V = "editor.mlp.0.u", "editor.mlp.0.v"
Reading = dict[Key, float]


def run(*edits: Reading) -> Diagnosis:
    return diagnose(row(edit, readings) for edit, readings in enumerate(edits))


def rules(diagnosis: Diagnosis) -> list[tuple[str, str, int]]:
    return [(finding.rule, finding.site, finding.edit) for finding in diagnosis.findings]


def test_nothing_recorded() -> None:
    diagnosis = Analyzer(METRICS).diagnosis()
    assert (diagnosis.verdict, diagnosis.edits, diagnosis.findings) == ("stable", 0, ())
    assert diagnosis.says == "Nothing recorded yet."


def test_edit_zero_alone_is_no_edit() -> None:
    diagnosis = run({("weight.max_abs", A): 0.3})
    assert (diagnosis.verdict, diagnosis.edits, diagnosis.onset_edit) == ("stable", 0, None)
    assert "No edit yet" in diagnosis.says


def test_few_edits_have_no_baseline_and_many_have() -> None:
    quiet = [{("weight.max_abs", A): 0.3, ("update.norm", A): 1.0 if edit else 0.0} for edit in range(13)]
    assert "baseline to compare with exists after 8" in run(*quiet[:4]).says
    assert run(*quiet).says == "Stable over 12 edits: nothing out of the ordinary."


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["weight.max_abs", "activation.rms", "canary.kl", "logits.max", "editor.std_min"])
def test_a_value_that_is_not_finite(metric: str, bad: float) -> None:
    diagnosis = run({(metric, A): 1.0}, {(metric, A): bad})
    assert diagnosis.verdict == "non-finite"
    assert (diagnosis.first_nonfinite_edit, diagnosis.first_bad_edit, diagnosis.onset_edit) == (1, 1, 1)
    assert (diagnosis.alarm_edit, diagnosis.first_bad_site, diagnosis.first_bad_metric) == (1, A, metric)
    json.dumps(diagnosis.to_json(), allow_nan=False)


@pytest.mark.parametrize("metric", ["drift.ratio", "gradient.stable_rank", "feedback.gain"])
def test_nan_in_a_derived_reading_proves_nothing(metric: str) -> None:
    assert run({}, {(metric, A): math.nan}).verdict == "stable"


def test_one_bad_tensor_is_one_finding_with_its_count() -> None:
    bad = {
        ("update.norm", A): math.inf,
        ("weight.max_abs", A): math.inf,
        ("weight.nonfinite", A): 300.0,
        ("weight.headroom_bits", A): -math.inf,
    }
    diagnosis = run({("weight.nonfinite", A): 0.0}, bad)
    assert [(finding.metric, finding.value) for finding in diagnosis.findings] == [("weight.nonfinite", 300.0)]
    assert "300 weights" in diagnosis.findings[0].says


def test_fifty_bad_sites_are_three_findings_and_a_count() -> None:
    bad = {("weight.nonfinite", f"layer.{number}"): 5.0 for number in range(50)}
    diagnosis = run({}, bad, bad, bad)
    assert [finding.site for finding in diagnosis.findings] == ["layer.0", "layer.1", "layer.2"]
    assert "47 more sites" in diagnosis.findings[-1].says


def test_within_one_edit_the_dataflow_orders() -> None:
    start = dict.fromkeys([("weight.max_abs", A), ("weight.max_abs", B), ("canary.kl", "model")], 1.0)
    bad = {
        ("canary.nonfinite", "model"): 9.0,
        ("weight.nonfinite", B): 9.0,
        ("weight.nonfinite", A): 9.0,
        ("editor.input_max", U): 5e4,
        ("gradient.nonfinite", A): 9.0,
        ("gradient.nonfinite", B): 9.0,
        ("activation.nonfinite", B): 9.0,
    }
    found = [(finding.metric, finding.site) for finding in run(start, bad).findings]
    assert found == [
        ("activation.nonfinite", B),
        ("gradient.nonfinite", B),  # gradients flow backwards
        ("gradient.nonfinite", A),
        ("editor.input_max", U),
        ("weight.nonfinite", A),
        ("weight.nonfinite", B),
        ("canary.nonfinite", "model"),
    ]


def test_the_editors_input_is_the_first_bad_and_the_first_nan_stays_visible() -> None:
    diagnosis = run(
        {}, {("editor.input_max", U): 95.0}, {("editor.input_max", U): 3.2e5}, {("weight.nonfinite", A): 3.0}
    )
    assert (diagnosis.first_bad_edit, diagnosis.first_bad_metric) == (2, "editor.input_max")
    assert (diagnosis.first_nonfinite_edit, diagnosis.alarm_edit, diagnosis.onset_edit) == (3, 2, 2)
    assert rules(diagnosis) == [("input-limit", U, 2), ("non-finite", A, 3)]
    assert diagnosis.says.startswith("Non-finite since edit 3, diverging since edit 2: first in editor.mlp.0.u")


def test_a_large_input_of_the_editor_is_drifting_first() -> None:
    assert rules(run({}, {("editor.input_max", U): 101.0}, {("editor.input_max", U): 1001.0})) == [
        ("input-limit", U, 2),  # the headline's, which comes first
        ("input-large", U, 1),
    ]


@pytest.mark.parametrize("metric", ["logits.dead", "canary.dead"])
def test_dead_logits_are_a_collapse(metric: str) -> None:
    diagnosis = run({(metric, "model"): 0.0}, {(metric, "model"): 1.0})
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.first_bad_edit) == ("collapsed", "dead-logits", 1)


@pytest.mark.parametrize("metric", ["weight.headroom_bits", "activation.headroom_bits"])
def test_headroom_that_runs_out(metric: str) -> None:
    diagnosis = run({(metric, A): 9.0}, {(metric, A): 5.0}, {(metric, A): 1.9})
    assert (diagnosis.verdict, diagnosis.first_bad_edit) == ("diverging", 2)


def test_headroom_that_was_never_there_is_a_note_until_it_falls() -> None:
    little = {("activation.headroom_bits", A): 1.5}
    diagnosis = run({}, little, little)
    assert (diagnosis.verdict, rules(diagnosis)) == ("stable", [("headroom-before", A, 1)])
    assert run({}, little, little, {("activation.headroom_bits", A): 0.4}).verdict == "diverging"


def test_weights_that_never_move_are_a_note() -> None:
    still = {("update.norm", A): 0.0, ("update.norm", B): 0.0}
    diagnosis = run(still, still, still, still, still)
    assert (diagnosis.verdict, diagnosis.cause) == ("stable", "weights-unchanged")
    assert rules(diagnosis) == [("edits-lost", A, 3)]
    assert diagnosis.says.startswith("None of 4 edits moved a watched layer")
    assert (diagnosis.landed, diagnosis.lost_edits, diagnosis.nothing_lands) == ("none", 4, True)
    assert not run(still, still, still).nothing_lands


def test_edits_that_wait_for_their_step_are_not_lost() -> None:
    """A loop that accumulates over four edits: what was said before that could be seen is withdrawn."""
    waits, steps = {("update.norm", A): 0.0}, {("update.norm", A): 1.0}
    once = [waits, waits, waits, steps]
    assert rules(run({}, *once, *once)) == [("edits-lost", A, 3)]
    diagnosis = run({}, *once * 3, waits)
    assert (diagnosis.findings, diagnosis.landed) == ((), "some")
    assert rules(run({}, *once * 3, *[waits] * 20)) == [("edits-lost", A, 20)]
    assert rules(run({}, *[waits] * 5, *once * 3)) == [("edits-lost", A, 3)]


def test_edits_that_stop_landing_are_no_harm_to_the_model() -> None:
    still, moved = (
        {("update.norm", A): 0.0, ("update.norm", B): 0.0},
        {("update.norm", A): 0.0, ("update.norm", B): 2.0},
    )
    assert run(still, moved, still, still, moved, still, still).verdict == "stable"
    diagnosis = run(still, moved, still, still, still)
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.onset_edit) == ("stable", "weights-unchanged", None)
    assert (diagnosis.landed, diagnosis.lost_edits, diagnosis.nothing_lands) == ("some", 3, False)
    assert diagnosis.alarm_edit is None
    long = run(still, moved, *[still] * 10)
    assert (long.landed, long.nothing_lands) == ("some", True)
    assert long.says.startswith("None of the last 10 edits moved a watched layer")
    assert not run(still, moved, *[still] * 9).nothing_lands


def test_edits_that_raise_are_lost_with_the_words_that_most_of_them_said() -> None:
    failed = [
        EditRow(edit, "", "failed", 0.0, 1.0, 0.0, 0.0, words, {("update.norm", A): np.zeros(1)})
        for edit, words in enumerate(["LinAlgError: singular", "KeyError: 'x'", "LinAlgError: singular"], start=1)
    ]
    diagnosis = diagnose([row(0, {("update.norm", A): 0.0}), *failed])
    assert (diagnosis.verdict, diagnosis.landed, diagnosis.nothing_lands) == ("stable", "none", True)
    assert (diagnosis.cause, diagnosis.confidence) == ("edits-failing", "high")
    assert "each raised an exception (LinAlgError: singular)" in diagnosis.says
    moved = [row(edit, {("update.norm", A): 1.0}) for edit in range(4, 10)]
    some = diagnose([row(0, {("update.norm", A): 0.0}), *failed, *moved])
    assert some.landed == "some"
    assert some.says.endswith("3 of 9 edits raised an exception, mostly: LinAlgError: singular.")


M = "model"
MASKED: Reading = {("logits.nonfinite", M): 20.0, ("logits.min", M): -math.inf, ("logits.max", M): 9.0}
SKIPPED: Reading = {("gradient.nonfinite", A): 5.0, ("update.norm", A): 0.0, ("weight.nonfinite", A): 0.0}
SOUND: Reading = {("gradient.nonfinite", A): 0.0, ("update.norm", A): 1.0, ("weight.nonfinite", A): 0.0}


def test_a_logit_that_is_masked_by_design_is_a_note_and_one_that_becomes_infinite_is_not() -> None:
    diagnosis = run({}, *[MASKED | SOUND] * 5)
    assert (diagnosis.verdict, diagnosis.alarm_edit) == ("stable", None)
    assert [finding.rule for finding in diagnosis.findings] == ["masked-by-design"]
    sound = {("logits.nonfinite", M): 0.0, ("logits.min", M): -3.0, ("logits.max", M): 9.0}
    assert run({}, sound | SOUND, MASKED | SOUND).verdict == "non-finite"
    lost = {("logits.nonfinite", M): 20.0, ("logits.min", M): math.nan, ("logits.max", M): math.nan}
    assert run({}, lost | SOUND).verdict == "non-finite"


def test_a_step_that_is_skipped_for_a_sum_that_overflows_is_a_note_too() -> None:
    summed: Reading = {("gradient.nonfinite", A): 0.0, ("gradient.nonfinite_steps", A): 2.0}
    skipped = run({}, SOUND, summed | {("update.norm", A): 0.0}, SOUND)
    assert (skipped.verdict, [finding.rule for finding in skipped.findings]) == ("stable", ["step-skipped"])
    assert not run({}, SOUND, summed | {("update.norm", A): 1.0}, SOUND).findings


def test_a_step_that_is_skipped_passes_and_one_that_is_made_stays() -> None:
    diagnosis = run({}, SKIPPED, SOUND, SOUND, SKIPPED, SOUND)
    assert (diagnosis.verdict, diagnosis.landed, diagnosis.alarm_edit) == ("stable", "some", None)
    assert [finding.rule for finding in diagnosis.findings] == ["step-skipped"]
    assert run({}, SKIPPED | {("update.norm", A): 1.0}).verdict == "non-finite"
    assert run({}, SKIPPED | {("weight.nonfinite", A): 3.0}).verdict == "non-finite"


def test_a_forward_that_is_not_finite_twice_in_a_row_is_the_models_unless_a_canary_is_sound() -> None:
    bad = SKIPPED | {("activation.nonfinite", A): 7.0}
    assert run({}, bad, SOUND, bad).verdict == "stable"
    assert run({}, bad, bad).verdict == "non-finite"
    watched = bad | {("canary.nonfinite", M): 0.0}
    assert run({}, *[watched] * 4).verdict == "stable"


def test_a_size_is_no_harm_while_the_canary_holds_still_and_is_when_it_leaves_soon_after() -> None:
    def edit(step: float, kl: float, agreement: float = 1.0) -> Reading:
        norm, way, far = ("update.norm", A), ("drift.norm", A), ("drift.ratio", A)
        return {norm: step, way: step, far: step / 0.1, ("canary.kl", M): kl, ("canary.agreement", M): agreement}

    calm, large = edit(0.001, 0.0), edit(2.0, 0.001)
    diagnosis = run({}, calm, large, calm)
    assert ("large-step", "drifting") in [(finding.rule, finding.verdict) for finding in diagnosis.findings]
    assert (diagnosis.verdict, diagnosis.alarm_edit) == ("drifting", None)
    assert run({}, calm, edit(2.0, 0.5)).verdict == "diverging"
    assert run({}, calm, {key: value for key, value in large.items() if key[0] != "canary.kl"}).verdict == "diverging"
    left = run({}, calm, large, edit(0.001, 0.4))
    assert (left.verdict, left.alarm_edit, left.onset_edit) == ("diverging", 3, 2)


def test_edits_that_were_right_already_are_not_counted_as_still() -> None:
    def edit(loss: float, update: float) -> Reading:
        return {("update.norm", A): update, ("logits.loss", "model"): loss}

    assert run({}, edit(3.0, 1.0), *[edit(0.05, 0.0)] * 9).verdict == "stable"
    wrong = [edit(3.0 + number, 0.0) for number in range(3)]
    assert run({}, edit(3.0, 1.0), wrong[0], edit(0.05, 0.0), *wrong[1:]).lost_edits == 3


def test_an_update_that_is_a_single_entry() -> None:
    def edit(largest: float, update: float) -> Reading:
        return {("weight.max_abs", A): largest, ("update.norm", A): update}

    before = edit(0.5, 0.1)
    diagnosis = run(before, before, edit(3e38, 3e38), edit(3e38, 0.1))
    assert rules(diagnosis)[0] == ("one-entry", A, 2)
    assert (diagnosis.verdict, diagnosis.first_bad_edit, diagnosis.first_bad_site) == ("diverging", 2, A)
    for other in (edit(40.0, 39.5), edit(60.0, 90.0), edit(math.inf, math.inf), edit(0.5, 0.5)):
        assert "one-entry" not in [rule for rule, _, _ in rules(run(before, before, other))]
    for largest in (0.0, 0.3):  # zeros that stay, and zeros of which one becomes something
        assert run(edit(0.0, 0.0), edit(largest, largest)).verdict == "stable"


def test_a_normaliser_that_begins_anew() -> None:
    def edit(one: float, other: float) -> Reading:
        return {("editor.std_min", U): one, ("editor.std_min", V): other}

    assert ("statistics-restarted", U, 3) in rules(run(*[edit(0.2, 0.01)] * 3, edit(0.1, 0.0)))
    assert run(*[edit(0.2, 0.0)] * 3, edit(0.1, 0.0)).verdict == "stable"  # what stays 0 says nothing, one site neither
    assert run(*[edit(0.0, 0.0)] * 3, edit(0.1, 0.2)).verdict == "stable"  # it had seen nothing yet
    sizes = (0.2, 0.24, 0.19, 0.26, 0.18, 0.25)
    assert run(*(edit(size, size / 10) for size in sizes)).verdict == "stable"  # the usual course of small batches
    assert run(*[edit(0.2, 0.01)] * 3, edit(0.1, 0.01)).verdict == "stable"
    assert run(*[edit(0.2, 0.0)] * 3).verdict == "stable"


def test_a_search_that_ends_on_its_clamp_after_every_step_is_a_note() -> None:
    def search(hits: float, steps: float = 12.0) -> Reading:
        return {("editor.clamp_hits", A): hits, ("logits.passes", "model"): steps}

    assert rules(run({}, *[search(12)] * 8)) == [("clamp-pinned", A, 8)]
    assert run({}, *[search(12)] * 8).verdict == "stable"
    (finding,) = run({}, *[search(12)] * 8).findings
    assert 0.9 * 12 <= finding.threshold <= 12.0 == finding.value
    assert rules(run({}, *[search(12)] * 3, search(9), *[search(12)] * 4)) == [("clamp-pinned", A, 8)]
    assert run({}, *[search(11)] * 19).findings == ()
    assert run({}, *[search(12)] * 7, search(1), *[search(12)] * 7).findings == ()
    assert run({}, *[search(0, 0)] * 9).findings == ()
    assert run({}, *[{("editor.clamp_hits", A): 12.0}] * 9).findings == ()


def test_a_frozen_normaliser_with_zero_std_is_a_note() -> None:
    diagnosis = run({}, {("editor.std_zeros", U): 7.0, ("editor.std_min", V): 1e-9, ("editor.std_min", U): 1e-8})
    assert diagnosis.verdict == "stable"
    assert rules(diagnosis) == [("zero-std", U, 1), ("tiny-std", U, 1)]  # gradients (v) are small by nature
    assert "7 units" in diagnosis.findings[0].says


def test_a_lost_canary_counts_when_it_stays_lost() -> None:
    def canary(agreement: float) -> Reading:
        return {("canary.agreement", "model"): agreement}

    assert run(*map(canary, [1.0, 0.9, 0.0, 0.8, 0.9, 0.05, 0.9])).verdict == "stable"
    assert run(*map(canary, [1.0, 0.9, 0.0, 0.0, 0.5, 0.05, 0.0])).verdict == "diverging"
    diagnosis = run(*map(canary, [1.0, 0.9, 0.4, 0.1, 0.0, 0.05, 0.0]))
    assert (diagnosis.verdict, diagnosis.first_bad_edit) == ("collapsed", 3)
    assert diagnosis.alarm_edit in {3, 4}  # by the limits that are shipped


def test_the_canarys_divergence() -> None:
    def canary(kl: float) -> Reading:
        return {("canary.kl", "model"): kl}

    assert run(*map(canary, [0.0, 0.1, 0.4, 0.6, 0.9])).verdict == "stable"
    assert run(*map(canary, [0.0, 1.1, 1.2, 1.4])).verdict == "drifting"
    assert run(*map(canary, [0.0, 5.0, 6.0, 7.0])).verdict == "collapsed"


def test_a_verdict_never_recovers() -> None:
    diagnosis = run({}, {("gradient.nonfinite", A): 1.0}, *[{("gradient.nonfinite", A): 0.0}] * 30)
    assert (diagnosis.verdict, diagnosis.alarm_edit, diagnosis.edits) == ("non-finite", 1, 31)


def test_a_vector_that_is_bad_further_on() -> None:
    spectrum = row(1, {("gradient.spectrum", A): [3.0, math.nan]})  # type: ignore[dict-item]
    finding = diagnose([spectrum]).findings[0]
    assert (finding.rule, finding.metric) == ("non-finite", "gradient.spectrum")
    assert math.isnan(finding.value)


def test_a_failed_edit_counts_as_evidence_but_not_as_still() -> None:
    rows = [row(0, {}), row(1, {("update.norm", A): 1.0})]
    rows += [row(edit, {("update.norm", A): 0.0}, "failed") for edit in range(2, 9)]
    assert diagnose(rows).verdict == "stable"
    assert diagnose([*rows, row(9, {("activation.nonfinite", A): 4.0}, "failed")]).verdict == "non-finite"


def test_headroom_before_a_normalisation_is_headroom() -> None:
    metric = ("activation.norm_headroom_bits", A)
    assert run({metric: math.inf}, {metric: math.inf}).verdict == "stable"  # nothing but zeros went in
    near = run({metric: 40.0}, {metric: 1.5})
    assert near.verdict == "diverging"
    assert "the normalisation after" in near.findings[0].says
    assert "where its square overflows" in near.findings[0].says
    assert run({metric: 40.0}, {metric: -math.inf}).verdict == "non-finite"


@pytest.mark.parametrize("metric", ["weight.condition_number", "canary.perplexity", "editor.system_condition"])
def test_what_may_rightly_be_infinite_proves_nothing(metric: str) -> None:
    assert run({}, {(metric, A): math.inf}).verdict == "stable"


def test_perplexity_that_is_lost_may_be_infinite() -> None:
    def canary(ratio: float) -> Reading:
        return {("canary.perplexity_ratio", "model"): ratio}

    assert run(*map(canary, [1.0, 200.0, math.inf, 40.0, 300.0])).verdict == "stable"
    assert run(*map(canary, [1.0, 200.0, math.inf, 300.0])).verdict == "collapsed"
    assert run(*map(canary, [1.0, math.nan, math.nan, math.nan])).verdict == "stable"


@pytest.mark.parametrize("beside", [("editor.keys", 4.0), ("editor.side_norm", 9.0)])
def test_weights_stand_still_by_design_beside_an_adapter(beside: tuple[str, float]) -> None:
    diagnosis = run(*[{("update.norm", A): 0.0, (beside[0], B): beside[1]} if edit else {} for edit in range(6)])
    assert diagnosis.findings == ()


def test_an_empty_codebook_answers_nothing() -> None:
    still = {("update.norm", A): 0.0, ("editor.keys", B): 0.0}
    assert rules(run(*[still] * 4)) == [("edits-lost", A, 3)]


@pytest.mark.parametrize(
    ("metric", "sound", "odd", "rule"),
    [
        ("attention.masked_sequences", 0.0, 1.0, "masked-sequence"),
        ("editor.denominator", 0.4, -0.4, "denominator-negative"),
        ("editor.system_condition", 1e6, math.inf, "ill-conditioned"),
        ("editor.covariance_condition", 1e6, 1e8, "covariance-singular"),
        ("editor.null_space_share", 0.9, 0.995, "nothing-preserved"),
        ("editor.null_space_share", 0.9, 0.05, "no-room"),
        ("editor.radius_min", 0.2, -0.1, "key-unreachable"),
    ],
)
def test_notes(metric: str, sound: float, odd: float, rule: str) -> None:
    assert run({}, {(metric, A): sound}).findings == ()
    diagnosis = run({}, {(metric, A): sound}, {(metric, A): odd}, {(metric, A): odd})
    assert (diagnosis.verdict, rules(diagnosis)) == ("stable", [(rule, A, 2)])


@pytest.mark.parametrize(("value", "said"), [(900.0, False), (2_000.0, True)])
def test_an_original_that_is_lost_already(value: float, said: bool) -> None:
    reading = {("canary.perplexity", "model"): value}
    assert bool(run(reading, reading).findings) == said
    assert run({}, reading).findings == ()


def test_a_frozen_loss_is_a_note() -> None:
    def losses(*values: float) -> Diagnosis:
        return run({}, *[{("logits.loss", "model"): value} for value in values])

    assert rules(losses(2.0, 3.0, 3.0, 3.0, 3.0, 3.0)) == [("frozen-loss", "model", 6)]
    assert losses(3.0, 3.0, 3.0, 3.0, 3.1, 3.0).findings == ()
    assert losses(*[0.0] * 9).findings == ()


def test_a_gradient_that_never_was_is_a_note() -> None:
    def edit(number: int) -> Reading:
        return {("logits.loss", "model"): 3.0 + number, ("gradient.norm", A): 0.0, ("gradient.norm", B): 0.0}

    assert run({}, edit(1), edit(2)).findings == ()
    diagnosis = run({}, *map(edit, range(4)))
    assert (diagnosis.verdict, rules(diagnosis)) == ("stable", [("zero-gradient", A, 3)])
    reached = edit(9) | {("gradient.norm", B): 1e-9}
    assert run({}, edit(1), edit(2), reached, edit(3), edit(4)).findings == ()
    assert run({}, reached, *map(edit, range(4))).verdict == "drifting"


def test_of_a_loop_that_never_moves_anything_the_whole_is_told() -> None:
    analyzer = Analyzer(METRICS)
    for edit in range(1, 61):
        analyzer.observe_note(Note(edit, NOTHING_MOVED, f"edit {edit} moved no parameter of the model"))
        analyzer.observe(row(edit, {}))
    diagnosis = analyzer.diagnosis()
    assert diagnosis.says == "None of 60 edits moved any parameter of the model; the model is as it was."
    assert diagnosis.cause_says == "none of 60 edits moved any parameter of the model."
    assert (diagnosis.landed, diagnosis.nothing_lands) == ("none", True)


@pytest.mark.filterwarnings("error")
def test_a_weight_that_became_infinite_is_no_warning_of_numpys() -> None:
    analyzer = Analyzer(METRICS)
    for edit in range(4):
        size = np.inf if edit > 1 else 1.0
        readings = {("update.norm", "fc"): size, ("drift.norm", "fc"): size, ("canary.kl", "model"): 0.1}
        analyzer.observe(row(edit, readings))
    assert analyzer.diagnosis().verdict == "non-finite"
