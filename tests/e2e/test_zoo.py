"""The failure zoo: that each mechanism really happens, by plain torch and not by our analyzer, and what is listed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from stabilitylab.errors import UsageError
from stabilitylab.run import load
from stabilitylab.testbed.zoo import HEALTHY, HELD_OUT_SEEDS, SCENARIOS, Outcome, Scenario, by_name, foreign, run, words

FINDINGS_MECHANISMS = range(1, 21)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The run of a scenario with seed 0, made once."""

    @cache
    def made(name: str) -> Outcome:
        return run(by_name(name), 0, tmp_path_factory.mktemp("zoo") / name)

    return made


def test_names_are_unique_and_every_mechanism_of_the_findings_is_there() -> None:
    names = [scenario.name for scenario in (*SCENARIOS, *HEALTHY)]
    assert len(set(names)) == len(names)
    assert {*FINDINGS_MECHANISMS} <= {scenario.mechanism for scenario in SCENARIOS}
    assert all(scenario.cause for scenario in SCENARIOS)
    assert all(scenario.healthy for scenario in HEALTHY)


def test_mechanisms_without_a_rule_share_no_cause_with_the_others() -> None:
    unknown = {scenario.cause for scenario in SCENARIOS if not scenario.known}
    assert len(unknown) >= 3
    assert not unknown & {scenario.cause for scenario in SCENARIOS if scenario.known}


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'empty-mask'"):
        by_name("empty-maks")


@pytest.mark.parametrize("seed", [0, 1, HELD_OUT_SEEDS, HELD_OUT_SEEDS + 1])
def test_the_small_language_models_know_their_language(seed: int) -> None:
    assert words.knows(foreign.word_model(seed)[0]) > 0.95


def test_a_held_out_seed_chooses_models_that_smaller_seeds_never_choose() -> None:
    """Their numbers; that they are others, too: trained from other weights on other sentences."""
    small, held_out = ({words.number_of(s, s) for s in range(start, start + 9)} for start in (0, HELD_OUT_SEEDS))
    assert len(small) == len(held_out) == 3
    assert not small & held_out
    (one, _), (other, _) = foreign.word_model(0), foreign.word_model(HELD_OUT_SEEDS)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_the_same_seed_makes_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (run(by_name("empty-mask"), seed, tmp_path / str(n)) for n, seed in enumerate((0, 0, 1)))
    assert first.truth == again.truth
    assert [state.updates for state in first.states[:9]] == [state.updates for state in again.states[:9]]
    assert first.states[1].updates != other.states[1].updates


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(by_name("normaliser-never-loaded"), 0, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_what_is_true_of_a_run_is_in_its_file(scenario: Scenario, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(scenario.name)
    stored = load(found.run)
    truth = found.truth
    assert truth.cause == scenario.cause
    assert truth.first_bad_edit in {edit.edit for edit in stored.edits}
    assert truth.onset is not None
    assert truth.first_bad_edit is not None
    assert truth.onset <= truth.first_bad_edit
    assert truth.site is None or truth.site in stored.manifest["sites"]
    assert len(found.states) == len(stored.edits)


LOST_IN_NAN = (
    "empty-mask",
    "masked-row",
    "normaliser-never-loaded",
    "single-row-std",
    "fp16-overflow",
    "adam-eps-fp16",
    "bit-flip",
)
LOST_WHILE_FINITE = (
    "not-restored",
    "unstable-denominator",
    "singular-solve",
    "learning-rate-too-high",
    "slow-norm-growth",
    "dead-logits",
    "sign-flipped",
    "update-misplaced",
    "update-transposed",
)
NEVER_LOST = (
    "reference-edited",
    "labels-ignored",
    "statistics-restart",
    "target-pinned",
    "leaking-cache",
    "bf16-absorption",
    "gradients-skipped",
)


@pytest.mark.parametrize("name", LOST_IN_NAN)
def test_it_ends_in_nan_at_the_edit_that_strikes(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    edit = found.truth.first_bad_edit
    assert edit is not None
    assert edit == found.truth.nonfinite_edit
    assert not any(state.lost for state in found.states[:edit])
    state = found.states[edit]
    site = found.truth.site
    assert site is not None
    # A flipped bit leaves a weight that is finite, and 2^128 times what it was.
    assert site in {*state.bad_weights, *state.bad_outputs} or state.updates[site] > 1e30


@pytest.mark.parametrize("name", LOST_WHILE_FINITE)
def test_the_model_is_lost_and_every_value_is_finite(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    assert found.truth.lost_edit is not None
    assert not found.states[0].lost
    assert not found.states[found.truth.lost_edit].nonfinite


@pytest.mark.parametrize("name", NEVER_LOST)
def test_the_fault_is_silent(name: str, outcome: Callable[[str], Outcome]) -> None:
    assert outcome(name).truth.lost_edit is None


@pytest.mark.parametrize("name", ["mend-feedback-fp16", "mend-feedback-bf16", "mend-feedback-fp32"])
def test_feedback_grows_to_the_end_and_the_canary_goes_first(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    lost = found.truth.lost_edit
    assert lost is not None
    assert not found.states[lost].nonfinite
    largest = [max(state.updates.values()) for state in found.states[1:] if not state.nonfinite]
    assert largest[-1] > 10 * largest[0]


def test_a_unit_without_spread_fires_and_that_edit_is_the_models_end(outcome: Callable[[str], Outcome]) -> None:
    """The loop testifies to the unit by the normaliser's own numbers; the canary is lost at that very edit."""
    truth = outcome("normaliser-zero-std").truth
    assert truth.first_bad_edit is not None
    assert truth.first_bad_edit == truth.lost_edit


@pytest.mark.parametrize("name", ["labels-ignored", "gradients-skipped"])
def test_from_the_strike_on_no_weight_moves(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    edit = found.truth.first_bad_edit
    assert edit is not None
    assert all(any(state.updates.values()) for state in found.states[1:edit])
    assert not any(any(state.updates.values()) for state in found.states[edit:])


def test_the_update_is_swallowed(outcome: Callable[[str], Outcome]) -> None:
    """Meant: every weight of both 64 × 256 layers by at least 1e-6."""
    meant = 1e-6 * math.sqrt(64 * 256)
    for state in outcome("bf16-absorption").states[1:]:
        assert all(update < 0.5 * meant for update in state.updates.values())


def test_all_logits_are_zero(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("dead-logits")
    edit = found.truth.first_bad_edit
    assert edit is not None
    assert found.states[edit].finite
    assert max(found.states[edit].drift.values()) > 1e18


def test_one_of_four_layers_is_not_put_back(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("partly-restored")
    left = {site: found.states[3].drift[site] / found.states[1].drift[site] for site in found.states[1].drift}
    assert max(left, key=lambda site: left[site]) == found.truth.site


def test_a_sound_second_moment_preserves_more(outcome: Callable[[str], Outcome]) -> None:
    wrong, sound = outcome("wrong-null-space"), outcome("leaking-cache")
    assert min(state.agreement for state in wrong.states) < min(state.agreement for state in sound.states)


def test_the_monitor_came_late(outcome: Callable[[str], Outcome]) -> None:
    run_of = load(outcome("reference-edited").run)
    assert run_of.series("editor.keys")[0] > 0


@pytest.mark.parametrize("name", ["healthy-finetune-words", "healthy-large-drift", "healthy-spikes"])
def test_nothing_is_wrong_in_a_healthy_loop(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    assert found.truth.first_bad_edit is None
    assert found.truth.lost_edit is None
    assert len(found.states) > 100
    assert min(state.agreement for state in found.states) >= 0.5


def test_large_drift_leaves_the_function_as_it_was(outcome: Callable[[str], Outcome]) -> None:
    last = outcome("healthy-large-drift").states[-1]
    assert max(last.drift.values()) > 0.5
    assert last.agreement > 0.9
