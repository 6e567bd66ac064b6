"""Causes: claimed where the evidence shows them, and not where it does not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from stabilitylab.analysis import Analyzer, Diagnosis, severity
from stabilitylab.record.readings import Key
from tests.synthetic_runs import METRICS, diagnose, row

A, B, U, V = "decoder.layers.1.fc2", "decoder.layers.2.fc2", "editor.mlp.0.u", "editor.mlp.0.v"
ACTION = ("restore", "batch", "floor", "bfloat16", "check", "go back", "see whether")
Reading = dict[Key, float]


def run(*edits: Reading) -> Diagnosis:
    diagnosis = diagnose(row(edit, readings) for edit, readings in enumerate(edits))
    assert diagnosis.cause == "unknown" or any(word in diagnosis.advice.lower() for word in ACTION)
    return diagnosis


def editor(largest: float, unit: int, std: float, update: float = 4.0) -> Reading:
    return {
        ("editor.input_max", U): largest,
        ("editor.input_unit", U): float(unit),
        ("editor.input_unit_std", U): std,
        ("update.norm", A): update,
    }


def test_the_reported_case() -> None:
    """FINDINGS.md, section 1: 11, 95, 56, and 3.2e5 at the fatal edit, with a unit whose std is 0 from the start on."""
    spread = {("editor.std_min", U): 0.0, ("editor.seen_rows", U): 9_000.0}
    dead = {("weight.nonfinite", A): 300.0, ("update.norm", A): math.inf}
    edits = (
        {},
        editor(11, 4, 0.1),
        editor(50, 4, 0.1),
        editor(95, 4, 0.1),
        editor(60, 4, 0.1),
        editor(56, 4, 0.1),
        editor(3.2e5, 117, 0.0) | dead,
        editor(2.2e8, 200, 0.1) | dead,
    )
    diagnosis = run(*(spread | readings for readings in edits))
    assert diagnosis.cause == "normaliser-zero-std"
    assert (diagnosis.first_bad_edit, diagnosis.first_bad_site, diagnosis.onset_edit) == (6, U, 6)
    assert diagnosis.says == (
        "Non-finite since edit 6: first in editor.mlp.0.u (editor.input_max 3.2e5 at edit 6) — unit 117 of the editor's"
        " frozen normaliser at editor.mlp.0.u was divided by a std of 0: its normalised input reached 3.2e5 at edit 6."
    )


def test_a_large_input_over_an_ordinary_std_is_not_the_normalisers_fault() -> None:
    assert run({}, editor(11, 4, 0.1), editor(5e4, 117, 0.3)).cause == "unknown"


def test_feedback() -> None:
    growing = [editor(5 * math.exp(0.4 * edit), edit, 0.3, math.exp(0.5 * edit)) for edit in range(12)]
    diagnosis = run({}, *growing, {("weight.nonfinite", A): 4.0})
    assert diagnosis.cause == "feedback-growth"
    assert "restore the weights" in diagnosis.advice.lower()


def test_growing_inputs_without_growing_updates_are_no_feedback() -> None:
    growing = [editor(5 * math.exp(0.4 * edit), edit, 0.3, 1.0 + 0.01 * (edit % 3)) for edit in range(12)]
    assert run({}, *growing, {("weight.nonfinite", A): 4.0}).cause == "unknown"


def test_feedback_is_remembered_when_the_run_saturates() -> None:
    growing = [editor(5 * math.exp(0.4 * edit), edit, 0.3, math.exp(0.5 * edit)) for edit in range(20)]
    assert run({}, *growing, *[growing[-1]] * 60).cause == "feedback-growth"


def weights(largest: float, limit: float) -> Reading:
    bits = math.log2(limit / largest) if math.isfinite(largest) else -math.inf
    return {
        ("weight.max_abs", A): largest,
        ("weight.headroom_bits", A): bits,
        ("weight.nonfinite", A): 0.0 if math.isfinite(largest) else 8.0,
    }


def test_overflow_of_float16() -> None:
    for steps in ([0.3, 900.0, 3e4], [0.3, 0.4, math.inf]):
        diagnosis = run(*[weights(largest, 65_504.0) for largest in steps])
        assert (diagnosis.cause, diagnosis.first_bad_site) == ("dtype-overflow", A)


def test_the_dtype_is_not_blamed_without_evidence() -> None:
    wide = [weights(largest, 3.4e38) for largest in (0.3, 900.0, math.inf)]
    assert run(*wide).cause == "unknown"
    nan = weights(0.3, 65_504.0) | {("weight.max_abs", A): math.nan, ("weight.nonfinite", A): 8.0}
    assert run(weights(0.3, 65_504.0), nan).cause == "unknown"  # NaN, not infinite: something else made it
    first = {("activation.nonfinite", A): 3.0} | weights(math.inf, 65_504.0)
    assert run(weights(0.3, 65_504.0), first).cause == "unknown"


def test_a_stable_run_needs_no_cause() -> None:
    diagnosis = run({}, *[editor(5.0, 4, 0.1)] * 20)
    assert (diagnosis.cause, diagnosis.cause_says, diagnosis.advice) == ("unknown", "", "")


M = "model"


def claimed(*edits: Reading) -> tuple[str, str]:
    diagnosis = diagnose(row(edit, readings) for edit, readings in enumerate(edits))
    return diagnosis.cause, diagnosis.confidence


def step(ratio: float, drift: float, norm: float = 1.0) -> Reading:
    return {
        ("update.norm", A): norm,
        ("update.ratio", A): ratio,
        ("drift.norm", A): norm * drift / ratio if ratio else 0.0,
        ("drift.ratio", A): drift,
        ("canary.kl", M): 0.1,
    }


LOST = {("canary.kl", M): 9.0}
SOUND = {
    ("activation.nonfinite", A): 0.0,
    ("logits.nonfinite", M): 0.0,
    ("gradient.norm", A): 1.0,
    ("gradient.nonfinite", A): 0.0,
}


def test_labels_that_are_all_masked() -> None:
    loss, logits = ("logits.loss", M), ("logits.nonfinite", M)
    assert claimed({}, {loss: 2.0, logits: 0.0}, {loss: math.nan, logits: 0.0}) == ("labels-ignored", "high")
    assert claimed({}, {loss: 2.0, logits: 0.0}, {loss: math.nan, logits: 4.0})[0] == "unknown"


@pytest.mark.parametrize("first", [2.0, math.nan])
def test_labels_that_are_missed_in_several_passes_move_nothing_either(first: float) -> None:
    def still(loss: float, last: float, bad_passes: float = 0.0) -> dict[tuple[str, str], float]:
        return {
            ("logits.loss", M): loss,
            ("logits.loss_last", M): last,
            ("logits.nonfinite", M): 0.0,
            ("logits.nonfinite_passes", M): bad_passes,
            ("update.norm", A): 0.0,
        }

    assert claimed(still(2.0, 1.0), still(2.0, 1.0), still(first, math.nan)) == ("labels-ignored", "high")
    assert claimed(still(2.0, 1.0), still(2.0, 1.0), still(2.0, math.nan, bad_passes=1.0))[0] != "labels-ignored"


def test_a_masked_row_is_blamed_only_when_it_is_new() -> None:
    rows, bad = ("attention.masked_rows", M), ("activation.nonfinite", A)
    broken = {rows: 3.0, bad: 8.0}
    assert claimed({}, {rows: 0.0, bad: 0.0}, broken) == ("masked-row", "medium")
    assert claimed({}, {rows: 3.0, bad: 0.0}, broken)[0] == "unknown"
    assert claimed({}, {rows: 0.0, bad: 0.0}, {rows: 0.0, bad: 8.0})[0] == "unknown"
    assert claimed({}, broken) == ("masked-row", "low")  # padding on the left, for all that is known


def test_a_loss_over_no_token() -> None:
    finite = SOUND | {("weight.nonfinite", A): 0.0, ("weight.nonfinite", B): 0.0, ("gradient.nonfinite", B): 0.0}
    nan = {("gradient.nonfinite", A): 64.0, ("gradient.nonfinite", B): 64.0, ("gradient.norm", A): math.nan}
    bad = finite | nan | {("weight.nonfinite", A): 9.0, ("weight.nonfinite", B): 9.0}
    assert claimed(finite, finite, bad) == ("loss-not-finite", "medium")
    assert claimed(finite, finite, bad | {("activation.nonfinite", A): 3.0})[0] == "unknown"
    assert claimed(finite, finite, bad | {("gradient.nonfinite", B): 0.0})[0] == "unknown"
    # The model's own loss is sound, and may not be what was differentiated.
    assert claimed(finite, finite, bad | {("logits.loss", M): 2.0}) == ("loss-not-finite", "low")
    assert claimed(weights(0.3, 65_504.0) | finite, bad) == ("loss-not-finite", "medium")
    later = finite | {("gradient.nonfinite_passes", A): 2.0, ("weight.nonfinite", A): 9.0}
    assert claimed(finite, finite, later) == ("loss-not-finite", "medium")
    assert claimed(finite, finite, later | {("activation.nonfinite_passes", A): 2.0})[0] == "optimiser-nan"


def test_statistics_that_are_nan() -> None:
    bad = {("editor.nonfinite", U): 12.0}
    assert claimed(bad) == ("normaliser-nan", "high")
    assert claimed({("editor.nonfinite", U): 0.0}, {("editor.nonfinite", U): 0.0}, bad)[0] == "normaliser-nan"
    broken = {("editor.nonfinite", U): 0.0, ("weight.nonfinite", A): 1.0}
    assert claimed(broken, bad) == ("broken-before", "high")


def test_statistics_that_restart() -> None:
    still, moved = ({("editor.std_min", U): a, ("editor.std_min", V): b} for a, b in ((0.2, 0.01), (0.5, 0.03)))
    alone = ({("editor.std_min", U): size} for size in (0.2, 0.2, 0.5))
    assert claimed(*alone)[0] == "unknown"  # of one site that proves nothing
    assert claimed(still, still, moved) == ("statistics-restarted", "medium")
    assert claimed(still, still, still | {("editor.input_max", U): 300.0}, moved)[0] == "unknown"
    running = [{("editor.std_min", U): 0.2 * 1.1**edit} for edit in range(9)]
    assert claimed(*running, running[-1] | {("editor.input_max", U): 300.0})[0] == "unknown"
    other = {("editor.std_min", "editor.mlp.1.u"): 0.3}
    assert claimed(still | other, still | other, moved | other)[0] == "unknown"


def test_an_unstable_denominator() -> None:
    def denominator(ratio: float, kl: float = 0.1) -> Reading:
        return {("editor.denominator_ratio", A): ratio, ("canary.kl", M): kl}

    usual = [denominator(0.2)] * 6
    assert claimed({}, denominator(1e-5)) == ("unstable-denominator", "high")
    assert claimed({}, *usual, denominator(0.01), *[denominator(0.2, 9.0)] * 3) == ("unstable-denominator", "medium")
    assert claimed({}, *usual, denominator(0.1), *[denominator(0.2, 9.0)] * 3)[0] == "unknown"
    assert claimed({}, *usual, denominator(0.01), *usual, *[denominator(0.2, 9.0)] * 3)[0] == "unknown"


def test_a_singular_solve() -> None:
    def solve(condition: float, residual: float) -> Reading:
        return {("editor.system_condition", A): condition, ("editor.solve_residual", A): residual}

    assert claimed({}, solve(6e10, 0.4)) == ("singular-solve", "high")
    assert claimed({}, solve(6e10, 1e-6))[0] == "unknown"
    assert claimed({}, solve(50.0, 0.4))[0] == "unknown"  # least squares leave a residual rightly
    assert claimed({}, solve(6e10, 1e-6), {("weight.nonfinite", A): 3.0}) == ("singular-solve", "low")


def test_a_direction_that_is_noise() -> None:
    def denominator(value: float, ratio: float) -> Reading:
        return {("editor.denominator", A): value, ("editor.denominator_ratio", A): ratio}

    noise = denominator(-4e6, 0.01)
    assert claimed({}, noise, *[noise | LOST] * 3) == ("singular-solve", "medium")
    assert claimed({}, noise, *[denominator(2e6, 1e-5)] * 2) == ("singular-solve", "medium")  # explains that too
    assert claimed({}, denominator(-0.4, 0.01), *[noise | LOST] * 3)[0] == "unknown"  # another key may do that
    assert claimed({}, *[LOST] * 3, *[LOST] * 5, noise)[0] == "unknown"


def test_a_null_space_of_everything() -> None:
    assert claimed({("editor.null_space_share", A): 1.0}, *[LOST] * 3) == ("null-space-wrong", "medium")
    assert claimed({("editor.null_space_share", A): 0.9}, *[LOST] * 3)[0] == "unknown"


def test_a_null_space_without_room() -> None:
    little, still = {("editor.null_space_share", A): 0.04}, {("update.norm", A): 0.0}
    assert claimed(little, *[little | still] * 3) == ("null-space-wrong", "medium")
    assert claimed(little, little | {("update.norm", A): 1.0}) == ("null-space-wrong", "low")
    assert claimed({("editor.null_space_share", A): 0.3}, *[still] * 3)[0] == "weights-unchanged"


def test_a_search_that_is_pinned() -> None:
    def search(hits: float) -> Reading:
        return {("editor.clamp_hits", A): hits, ("logits.passes", M): 12.0}

    assert claimed({}, *[search(12)] * 8) == ("target-pinned", "medium")
    assert claimed({}, *[search(12)] * 8, *[search(12) | LOST] * 3) == ("target-pinned", "medium")
    assert claimed({}, *[search(10)] * 19)[0] == "unknown"  # most steps, and not the first ones: usual
    assert claimed({}, *[search(12)] * 7, search(1), *[search(12) | LOST] * 3)[0] == "unknown"
    assert claimed({}, *[LOST] * 3, search(1) | LOST, *[search(12) | LOST] * 9)[0] == "unknown"


def test_what_an_earlier_run_left() -> None:
    assert claimed({("editor.cache_energy", A): 7.0}) == ("cache-leaked", "medium")
    assert claimed({("editor.cache_energy", A): 7.0}, *[LOST] * 3) == ("cache-leaked", "low")
    assert claimed({("editor.cache_energy", A): 0.0}, {("editor.cache_energy", A): 7.0})[0] == "unknown"
    assert claimed({("editor.keys", A): 7.0})[0] == "reference-edited"


def test_weights_that_are_no_longer_restored() -> None:
    single, carried = step(0.1, 0.1), step(0.1, 0.3)
    assert claimed({}, *[single] * 5, *[carried] * 3, *[carried | LOST] * 3) == ("weights-not-restored", "medium")
    assert claimed({}, *[single] * 5, *[single | LOST] * 3, *[carried] * 5)[0] != "weights-not-restored"
    assert claimed({}, *[carried] * 9, *[carried | LOST] * 3)[0] != "weights-not-restored"


def test_single_edits_that_nobody_puts_back() -> None:
    def diagnosis(*rows: Reading, single: bool = True) -> tuple[str, str]:
        analyzer = Analyzer(METRICS, single_edits=single)
        for edit, readings in enumerate(({}, *rows)):
            analyzer.observe(row(edit, readings))
        found = analyzer.diagnosis()
        return found.cause, found.confidence

    first, carried = step(0.1, 0.1), step(0.1, 0.3)
    lost = [carried | LOST] * 3
    assert diagnosis(first, carried, carried, *lost) == ("weights-not-restored", "high")
    assert diagnosis(first, carried, carried, *lost, single=False)[0] != "weights-not-restored"
    assert diagnosis(first, first, *lost)[0] != "weights-not-restored"  # one was put back
    assert diagnosis(first, *[carried] * 5) == ("weights-not-restored", "high")  # said whenever single edits were meant


def test_one_layer_that_is_not_restored() -> None:
    def edit(number: int, *, other: bool) -> Reading:
        drift = 0.1 * number if other else 0.1
        both = (
            (("update.norm", A), 0.2),
            (("drift.norm", A), 0.2),
            (("update.norm", B), 0.1),
            (("drift.norm", B), drift),
        )
        return dict(both) | {("canary.kl", M): 0.1}

    diagnosis = run({}, *[edit(number, other=True) for number in range(1, 8)])
    assert (diagnosis.cause, diagnosis.confidence) == ("weights-not-restored", "high")
    assert (diagnosis.first_bad_edit, diagnosis.first_bad_site) == (2, B)
    assert (diagnosis.verdict, diagnosis.alarm_edit) == ("diverging", 6)
    assert [finding.site for finding in diagnosis.findings if finding.rule == "not-put-back"] == [B]
    few = run({}, *[edit(number, other=True) for number in range(1, 5)])
    assert (few.cause, few.verdict) == ("unknown", "stable")
    assert run({}, *[edit(number, other=False) for number in range(1, 12)]).cause == "unknown"


def test_weights_that_overflow_say_nothing_of_restoring() -> None:
    infinite = {("update.norm", A): math.inf, ("drift.norm", A): math.inf, ("weight.nonfinite", A): 2.0}
    assert claimed({}, *[step(0.1, 0.1)] * 3, infinite)[0] == "unknown"


def test_adam_in_float16() -> None:
    nan = weights(0.3, 65_504.0) | {("weight.max_abs", A): math.nan, ("weight.nonfinite", A): 90.0}
    before = weights(0.3, 65_504.0)
    assert claimed(before, nan | SOUND) == ("adam-eps-underflow", "medium")
    assert claimed(before, nan | SOUND | {("activation.max_abs_last", A): math.nan})[0] == "adam-eps-underflow"
    assert claimed(before, nan | SOUND | {("editor.denominator", A): 3.0})[0] == "unknown"
    assert claimed(before, nan | SOUND | {("gradient.norm", A): math.nan, ("gradient.nonfinite", A): 3.0})[0] != (
        "adam-eps-underflow"
    )
    assert claimed(weights(0.3, 3.4e38), nan | SOUND) == ("optimiser-nan", "medium")
    moved = before | SOUND | {("update.norm", A): 0.1}
    # Adam's first step is the one that divides by zero.
    assert claimed(before, moved, nan | SOUND) == ("optimiser-nan", "medium")
    unread = {key: value for key, value in (nan | SOUND).items() if not key[0].startswith("gradient.")}
    assert claimed(weights(0.3, 3.4e38), unread) == ("optimiser-nan", "medium")


def test_an_update_that_overflows_once_it_is_cast() -> None:
    before, after = weights(0.3, 65_504.0), weights(math.inf, 65_504.0)
    again = {("activation.max_abs_last", A): math.nan}
    assert claimed(before, after | SOUND | again) == ("dtype-overflow", "high")
    assert claimed(before, after | SOUND | again | {("activation.nonfinite", A): 2.0})[0] == "unknown"


def test_an_update_that_is_rounded_away() -> None:
    lost, half = {("update.swallowed_share", A): 1.0}, {("update.swallowed_share", A): 0.5}
    still = {("update.norm", A): 0.0}
    assert claimed({}, *[lost | still] * 3) == ("update-absorbed", "high")
    assert claimed({}, lost, lost, half, lost, lost)[0] == "unknown"


def passes(left: float) -> Reading:
    return {("gradient.norm", A): 1.0, ("gradient.norm_last", A): left}


def test_edits_that_are_all_too_large() -> None:
    learned = [step(0.9, 0.9 * edit) | passes(0.001) for edit in range(1, 6)]
    assert claimed({}, learned[0] | LOST, *[each | LOST for each in learned[1:]]) == (
        "learning-rate-too-high",
        "medium",
    )
    astray = [each | passes(0.6) | LOST for each in learned]
    assert claimed({}, *astray)[0] == "unknown"  # as far, and to no end: it may be the wrong way
    once = [step(0.01, 0.9) | passes(0.001) | LOST] * 5
    assert claimed({}, learned[0] | LOST, *once)[0] == "unknown"  # the first, and none after it
    single = [step(0.01, 0.1) | passes(0.001)] * 9
    assert claimed({}, *single, step(0.9, 0.9) | passes(0.001) | LOST, *[single[0] | LOST] * 5)[0] == "unknown"
    searched = [each | LOST | {("editor.value_ratio", A): 1.2} for each in learned]
    assert claimed({}, *searched)[0] == "unknown"


def test_many_edits_that_add_up() -> None:
    slow = [step(0.1, 0.1 * edit) for edit in range(1, 21)]
    assert claimed({}, *slow, *[step(0.1, 2.1) | LOST] * 3) == ("norm-growth", "medium")
    near = [step(0.05, 0.02 * edit) for edit in range(1, 21)]
    assert claimed({}, *near, *[step(0.05, 0.4) | LOST] * 3)[0] == "unknown"
    large = [step(0.4, 0.1 * edit) for edit in range(1, 21)]
    assert claimed({}, large[0], *slow[1:], *[step(0.1, 2.1) | LOST] * 3)[0] == "unknown"
    astray = [each | passes(0.6) for each in slow]
    assert claimed({}, *astray, *[step(0.1, 2.1) | LOST] * 3)[0] == "unknown"
    far = {("editor.input_max", U): 150.0}
    assert claimed({}, *[each | far for each in slow], *[step(0.1, 2.1) | LOST] * 3)[0] == "unknown"


def test_a_single_entry_that_leaps_has_no_cause_that_is_known() -> None:
    def weight(largest: float, update: float, bits: float) -> Reading:
        return {
            ("weight.max_abs", A): largest,
            ("update.norm", A): update,
            ("weight.headroom_bits", A): bits,
        }

    calm = weight(0.5, 0.1, 17.0)
    flipped = [weight(32_000.0, 31_999.5, 1.03)] * 2
    diagnosis = diagnose(row(edit, each) for edit, each in enumerate([calm, calm, *flipped]))
    assert (diagnosis.cause, diagnosis.first_bad_edit, diagnosis.first_bad_site) == ("unknown", 2, A)
    assert any(finding.rule == "one-entry" for finding in diagnosis.findings)
    assert claimed(calm, calm, *[weight(32_000.0, 90_000.0, 1.03)] * 2) == ("dtype-overflow", "high")


def test_a_codebook_that_answers_too_much() -> None:
    grace = {("update.norm", A): 0.0, ("editor.keys", A): 3.0}
    moved = {("canary.kl", M): 1.5}
    assert claimed({}, *[grace] * 9) == ("unknown", "none")
    assert claimed({}, grace, *[grace | moved] * 3) == ("codebook-overreach", "high")
    assert claimed({}, grace | {("update.norm", A): 1.0}, *[grace | moved] * 3)[0] == "unknown"


def test_gradients_that_are_skipped_and_gradients_of_zero() -> None:
    skipped = {("gradient.nonfinite", A): 5.0, ("update.norm", A): 0.0}
    moving = {("gradient.nonfinite", A): 0.0, ("update.norm", A): 1.0}
    assert claimed({}, moving, *[skipped] * 3) == ("gradients-skipped", "medium")
    assert claimed({}, moving, *[skipped | {("update.norm", A): 1.0}] * 3)[0] == "unknown"
    loss, norm = ("logits.loss", M), ("gradient.norm", A)
    assert claimed({}, {loss: 3.0, norm: 1.0}, *[{loss: 3.0 + n, norm: 0.0} for n in range(3)])[0] == "zero-gradient"
    assert claimed({}, {loss: 3.0, norm: 1.0}, *[{loss: 0.001, norm: 0.0}] * 3)[0] == "unknown"


def still(**others: float) -> Reading:
    """An edit with a sound gradient that wrote both layers and moved none. others: by metric, with ``__`` for a dot."""
    found: Reading = {}
    for site in (A, B):
        found |= {("update.norm", site): 0.0, ("update.writes", site): 1.0}
        found |= {("gradient.norm", site): 2.0, ("gradient.nonfinite", site): 0.0}
        found |= {(metric.replace("__", "."), site): value for metric, value in others.items()}
    return found


def test_why_edits_are_lost() -> None:
    assert claimed({}, *[still()] * 3) == ("weights-unchanged", "high")
    assert claimed(weights(0.3, 3.39e38), *[still()] * 3) == ("update-absorbed", "medium")
    assert claimed(weights(0.3, 65_504.0), *[still(gradient__norm=6e4)] * 3) == ("clip-overflow", "medium")
    undone = still(gradient__norm_last=0.5)
    assert claimed(weights(0.3, 3.39e38), *[undone] * 3) == ("edits-undone", "medium")
    searched = undone | {("update.writes", site): 0.0 for site in (A, B)}  # such as a search for a value
    assert claimed({}, *[searched] * 3) == ("weights-unchanged", "high")


def test_a_few_edits_that_land_among_many_that_do_not() -> None:
    moved = still() | {("update.norm", A): 1.0}
    rows = [moved if edit % 4 == 0 else still() for edit in range(12)]
    found = diagnose(row(edit, readings) for edit, readings in enumerate([{}, *rows]))
    assert (found.landed, found.nothing_lands, found.cause) == ("some", False, "weights-unchanged")
    assert found.says.startswith("Only 3 of 12 edits moved a watched layer")


def test_a_layer_that_is_written_and_never_moves() -> None:
    moves = still() | {("update.norm", A): 1.0}
    assert claimed(weights(0.3, 3.39e38), *[moves] * 10) == ("site-stalled", "medium")
    assert claimed(weights(0.3, 3.39e38), *[moves] * 9)[0] == "unknown"
    assert claimed({}, *[moves] * 10) == ("site-stalled", "low")
    assert claimed(weights(0.3, 3.39e38), *[moves | {("update.writes", B): 0.0}] * 10)[0] == "unknown"


def test_a_cache_that_outlives_its_edits() -> None:
    def edit(number: int, drift: float = 1.0) -> Reading:
        return {("update.norm", A): 1.0, ("drift.norm", A): drift, ("editor.cache_energy", A): 3.0 * number}

    assert claimed(edit(0), *map(edit, range(1, 9))) == ("cache-grows", "high")
    assert claimed(edit(0), *(edit(number, 0.9 * number) for number in range(1, 9)))[0] == "unknown"


@pytest.mark.parametrize(
    ("rates", "cause"),
    [((0.5, 0.5), "gradients-not-cleared"), ((0.5, 0.9), "update-repeated"), (None, "update-repeated")],
)
def test_updates_that_make_those_before_once_more(rates: tuple[float, float] | None, cause: str) -> None:
    rows, way = [], 0.0
    for edit in range(1, 25):
        way += float(edit)
        readings: Reading = {}
        for place, site in enumerate((A, B)):
            readings |= {("update.norm", site): float(edit), ("drift.norm", site): 0.95 * way}
            if rates is not None:
                readings |= {("gradient.norm", site): 1.0 / rates[place], ("gradient.nonfinite", site): 0.0}
        rows.append(readings | (LOST if edit > 20 else {}))
    assert claimed({}, *rows) == (cause, "medium")
    alone = [each | {("drift.norm", site): 0.3 * each["drift.norm", site] for site in (A, B)} for each in rows]
    assert claimed({}, *alone)[0] not in {"gradients-not-cleared", "update-repeated"}
    for source in (1.0, 4.0):  # momentum, or the two factors of an adapter, make updates of this look
        stepped = [each | {("gradient.source", site): source for site in (A, B)} for each in rows]
        assert claimed({}, *stepped)[0] not in {"gradients-not-cleared", "update-repeated"}
    unstepped = [each | {("gradient.source", site): 2.0 for site in (A, B)} for each in rows]
    assert claimed({}, *unstepped) == (cause, "medium")


def test_causes_are_a_chain_and_what_was_claimed_stays_in_it() -> None:
    """A unit over a std of 0 begins it, each edit feeds the next, float16 ends it, and nothing was put back."""
    analyzer, named, chains = Analyzer(METRICS, single_edits=True), [], []
    divided = {("editor.input_max", U): 3e5, ("editor.input_unit", U): 17.0, ("editor.input_unit_std", U): 0.0}
    for edit in range(0, 40):
        size = 1.5 ** min(edit, 24)
        here = weights(0.3 if edit < 30 else math.inf, 65_504.0)
        here |= {("update.norm", A): size, ("drift.norm", A): 3.0 * size, ("update.norm", B): size}
        here |= {("drift.norm", B): 3.0 * size, ("editor.input_max", V): 2.0 * size, ("weight.nonfinite", A): 0.0}
        here |= divided if edit == 12 else {}
        here |= {("weight.nonfinite", A): 9.0} if edit >= 30 else {}
        analyzer.observe(row(edit, here if edit else weights(0.3, 65_504.0)))
        found = analyzer.diagnosis()
        if found.confidence in {"high", "medium"} and severity(found.verdict) >= severity("diverging"):
            named.append(found.cause)
            chains.append({link.cause for link in found.causes})
    assert all(before <= after for before, after in pairwise(chains))
    story = {link.cause: link.role for link in analyzer.diagnosis().causes}
    assert story["normaliser-zero-std"] == "trigger"
    assert story["feedback-growth"] == "amplifier"
    assert story["weights-not-restored"] == "condition"
    assert {"dtype-overflow", "float16-limit"} & set(story)
    roles = [link.role for link in analyzer.diagnosis().causes]
    assert roles == sorted(roles, key=["trigger", "amplifier", "limit", "condition"].index)
    assert analyzer.diagnosis().cause in story
