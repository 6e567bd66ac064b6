"""The failure zoo: that each mechanism really happens, by plain torch and not by our analyzer, and what is listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo import (
    HEALTHY,
    SCENARIOS,
    Outcome,
    Scenario,
    State,
    by_name,
    foreign,
    run,
    words,
)
from benchmarks.zoo.scenario import Loop, watched
from stabilitylab.errors import UsageError
from stabilitylab.record.run import load
from tests.benchmarks.zoo_loops import nobody

FINDINGS_MECHANISMS = range(1, 21)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The run of a scenario with seed 0, made once."""

    @cache
    def made(name: str) -> Outcome:
        return run(by_name(name), 0, tmp_path_factory.mktemp("zoo") / name, trace=False)

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


@pytest.mark.parametrize("seed", [0, 1])
def test_the_small_language_models_know_their_language(seed: int) -> None:
    assert words.knows(foreign.word_model(seed)[0]) > 0.95


def test_the_same_seed_makes_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (
        run(by_name("empty-mask"), seed, tmp_path / str(n), trace=False) for n, seed in enumerate((0, 0, 1))
    )
    assert first.truth == again.truth
    assert [state.updates for state in first.states[:9]] == [state.updates for state in again.states[:9]]
    assert first.states[1].updates != other.states[1].updates


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(by_name("normaliser-never-loaded"), 0, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not s.held_out], ids=lambda scenario: scenario.name)
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
)
LOST_WHILE_FINITE = (
    "not-restored",
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
    assert site in {*state.bad_weights, *state.bad_outputs}


@pytest.mark.parametrize("name", LOST_WHILE_FINITE)
def test_the_model_is_lost_and_every_value_is_finite(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    assert found.truth.lost_edit is not None
    assert not found.states[0].lost
    assert not found.states[found.truth.lost_edit].nonfinite


@pytest.mark.parametrize("name", NEVER_LOST)
def test_the_fault_is_silent(name: str, outcome: Callable[[str], Outcome]) -> None:
    assert outcome(name).truth.lost_edit is None


def test_an_update_over_next_to_nothing_is_far_beyond_the_others(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("unstable-denominator")
    edit, site = found.truth.first_bad_edit, found.truth.site
    assert edit is not None
    assert site is not None
    assert found.states[edit].updates[site] > 30 * max(state.updates[site] for state in found.states[:edit])
    assert min(state.agreement for state in found.states[:edit]) == 1.0
    assert found.states[edit].agreement < 0.5
    assert not any(state.nonfinite for state in found.states)


def test_a_flipped_bit_leaves_one_weight_that_is_finite_and_far_beyond_the_others(
    outcome: Callable[[str], Outcome],
) -> None:
    found = outcome("bit-flip")
    edit, site = found.truth.first_bad_edit, found.truth.site
    assert edit is not None
    assert edit == found.truth.nonfinite_edit
    state = found.states[edit]
    assert not state.bad_weights
    assert [name for name, update in state.updates.items() if update > 1e30] == [site]
    after = list(state.drift)[list(state.drift).index(site or "") + 1 :]
    assert {*after} <= {*state.bad_outputs}


def _largest(states: Sequence[State]) -> list[float]:
    return [max(state.updates.values()) for state in states[1:] if not state.nonfinite]


@pytest.mark.parametrize(("precision", "factor"), [("fp16", 30.0), ("bf16", 1e6), ("fp32", 1e6)])
def test_feedback_grows_to_the_end_and_the_canary_goes_first(
    precision: str, factor: float, outcome: Callable[[str], Outcome]
) -> None:
    """How far depends on where the dtype ends: in float16 at 65,504."""
    found = outcome(f"mend-feedback-{precision}")
    lost, end = found.truth.lost_edit, found.truth.nonfinite_edit
    assert lost is not None
    assert end is not None
    assert lost < end
    largest = _largest(found.states)
    assert largest[-1] > factor * largest[0]


def test_without_feedback_the_same_edits_do_not_grow() -> None:
    """The factors are those of the unedited model: what fed back is gone, and the growth with it."""

    def make(seed: int, **variant: Any) -> Loop:
        loop = by_name("mend-feedback-fp32").make(seed)
        mend, unedited = loop.editor, foreign.digit_model("fp32")
        of = mend.factors
        mend.factors = lambda model, batch: of(unedited, batch)
        return loop

    states = watched(replace(by_name("mend-feedback-fp32"), make=make), 0, nobody)
    assert len(states) == 61
    largest = _largest(states)
    assert max(largest) < 3 * largest[0]


def test_a_unit_without_spread_fires_and_that_edit_is_the_models_end(outcome: Callable[[str], Outcome]) -> None:
    """The loop testifies to the unit by the normaliser's own numbers; with a spread, the same edit does no harm."""
    truth = outcome("normaliser-zero-std").truth
    edit = truth.first_bad_edit
    assert edit is not None
    assert edit == truth.lost_edit

    def make(seed: int, **variant: Any) -> Loop:
        loop = by_name("normaliser-zero-std").make(seed)
        for transform in foreign.transforms_of(loop.editor):
            for std in (transform.u_std, transform.v_std):
                std[std == 0] = float(std[std > 0].median())
        return replace(loop, steps=islice(loop.steps, edit))

    states = watched(replace(by_name("normaliser-zero-std"), make=make), 0, nobody)
    assert not states[edit].lost


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


@cache
def _unwatched(name: str) -> tuple[State, ...]:
    return watched(by_name(name), 0, nobody)


@pytest.mark.parametrize("name", ["healthy-finetune-words", "healthy-large-drift", "healthy-spikes"])
def test_nothing_is_wrong_in_a_healthy_loop(name: str) -> None:
    states = _unwatched(name)
    assert not any(state.lost for state in states)
    assert len(states) == 121
    assert min(state.agreement for state in states) >= 0.5


def test_large_drift_leaves_the_function_as_it_was() -> None:
    last = _unwatched("healthy-large-drift")[-1]
    assert max(last.drift.values()) > 0.5
    assert last.agreement > 0.9
