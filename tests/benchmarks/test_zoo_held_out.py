"""The zoo's held-out part: that each mechanism really happens, by plain torch and never by our analyzer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest

from benchmarks.zoo import HEALTHY, HELD_OUT_SEEDS, SCENARIOS, Outcome, Scenario, by_name, foreign, run, words
from benchmarks.zoo.held_out_updates import wide_model
from benchmarks.zoo.scenario import watched
from stabilitylab.analysis.causes import RULES
from stabilitylab.editors.layers import edited_layers
from stabilitylab.record.run import load
from tests.benchmarks.zoo_loops import nobody

SEED = HELD_OUT_SEEDS
FAILING = [scenario for scenario in SCENARIOS if scenario.held_out]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The run of a scenario with the first held-out seed, made once."""

    @cache
    def made(name: str) -> Outcome:
        return run(by_name(name), SEED, tmp_path_factory.mktemp("held-out") / name, trace=False)

    return made


def test_what_is_held_out_has_causes_of_its_own_or_known_ones() -> None:
    rules = {rule.name for rule in RULES}
    known = {scenario.cause for scenario in FAILING if scenario.known}
    unknown = {scenario.cause for scenario in FAILING if not scenario.known}
    assert known <= rules
    assert len(known) >= 14
    assert not unknown & {*rules, *(scenario.cause for scenario in SCENARIOS if not scenario.held_out)}
    assert len(unknown) >= 4
    assert any(scenario.held_out for scenario in HEALTHY)


def test_a_held_out_seed_chooses_models_that_smaller_seeds_never_choose() -> None:
    small, held_out = ({words.number_of(s, s) for s in range(start, start + 9)} for start in (0, HELD_OUT_SEEDS))
    assert len(small) == len(held_out) == 3
    assert not small & held_out


def test_the_held_out_models_know_their_language() -> None:
    for model in (foreign.word_model(SEED)[0], wide_model(SEED), wide_model(SEED, "gpt2")):
        assert words.knows(model) > 0.95


@pytest.mark.parametrize("scenario", FAILING, ids=lambda scenario: scenario.name)
def test_what_is_true_of_a_held_out_run_is_in_its_file(scenario: Scenario, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(scenario.name)
    stored, truth = load(found.run), found.truth
    assert truth.cause == scenario.cause
    assert truth.first_bad_edit in {edit.edit for edit in stored.edits}
    assert truth.onset is not None
    assert truth.first_bad_edit is not None
    assert truth.onset <= truth.first_bad_edit
    assert truth.site is None or truth.site in stored.manifest["sites"]
    assert len(found.states) == len(stored.edits)
    assert not found.states[0].lost


@pytest.mark.parametrize("name", ["malmen-never-loaded", "empty-row", "inverse-weight", "adam-in-half"])
def test_it_ends_in_nan_at_the_edit_that_strikes(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    edit = found.truth.first_bad_edit
    assert edit == found.truth.nonfinite_edit == found.truth.lost_edit
    assert edit is not None
    assert found.truth.site in {*found.states[edit].bad_weights, *found.states[edit].bad_outputs}


JUMPS = ["rate-too-high-on-digits", "dead-by-one-step", "malmen-zero-std", "layers-exchanged", "embedding-shifted"]


@pytest.mark.parametrize("name", JUMPS)
def test_the_edit_that_strikes_is_the_models_end_and_nothing_foretold_it(
    name: str, outcome: Callable[[str], Outcome]
) -> None:
    found = outcome(name)
    edit = found.truth.first_bad_edit
    assert edit is not None
    assert edit == found.truth.lost_edit
    assert found.states[edit - 1].agreement > 0.9


@pytest.mark.parametrize(
    "name", ["memit-pinned", "cache-of-a-sweep", "wrong-threshold", "finetune-absorbed", "grace-resumed"]
)
def test_the_fault_is_silent(name: str, outcome: Callable[[str], Outcome]) -> None:
    assert outcome(name).truth.lost_edit is None


@pytest.mark.parametrize("name", ["labels-of-padding", "static-scale"])
def test_from_the_strike_on_no_weight_moves(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    edit = found.truth.first_bad_edit
    assert edit is not None
    assert all(any(state.updates.values()) for state in found.states[1:edit])
    assert not any(any(state.updates.values()) for state in found.states[edit:])


def test_malmen_one_by_one_grows_to_the_end_and_the_canary_goes_first(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("malmen-one-by-one")
    lost, end = found.truth.lost_edit, found.truth.nonfinite_edit
    assert lost is not None
    assert end is not None
    assert lost < end
    largest = [max(state.updates.values()) for state in found.states[1:end]]
    assert max(largest[-5:]) > 30 * largest[0]


@pytest.mark.parametrize("name", ["rome-stream", "relative-signs"])
def test_no_edit_is_large_and_their_sum_is(name: str, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(name)
    (site,) = found.states[0].drift
    lost = found.truth.lost_edit
    assert lost is not None
    assert lost > 50
    assert found.states[lost].drift[site] > 1.0
    distance = found.states[1].updates[site] / found.states[1].drift[site] * found.states[lost].drift[site]
    assert max(state.updates[site] for state in found.states[1 : lost + 1]) < 0.5 * distance


def test_a_solve_that_is_noise_moves_a_weight_by_many_times_its_norm(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("memit-singular")
    assert found.truth.first_bad_edit == 1
    assert max(found.states[1].drift.values()) > 5.0
    assert found.truth.lost_edit is not None


def test_each_search_ends_on_its_clamp(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("memit-pinned")
    hits = load(found.run).series("editor.clamp_hits", found.truth.site)
    assert all(hit > 0 for hit in hits[1:])


def test_weights_are_put_back_up_to_the_resume_and_not_after_it(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("restoring-stops")
    (site,) = found.states[0].drift
    strikes = found.truth.first_bad_edit
    assert strikes is not None
    scale = found.states[1].updates[site] / found.states[1].drift[site]  # ‖W₀‖
    for state in found.states[2 : strikes + 1]:
        assert state.updates[site] == pytest.approx(scale * state.drift[site], rel=1e-3, abs=1e-3)
    last = found.states[-1]
    assert scale * last.drift[site] > 2 * last.updates[site]


def test_an_update_in_bfloat16_is_swallowed() -> None:
    loop = by_name("finetune-absorbed").make(SEED)
    before = {layer.name: layer.matrix.clone() for layer in edited_layers(loop.model, loop.sites)}
    next(loop.steps).apply(loop.model)
    for layer in edited_layers(loop.model, loop.sites):
        meant = loop.editor.reports[layer.name].update.norm()
        assert float((layer.matrix == before[layer.name]).double().mean()) > 0.9
        assert float((layer.matrix.float() - before[layer.name].float()).norm()) < 0.5 * float(meant)


def test_a_null_space_of_none_or_of_everything() -> None:
    """By the seed: nothing can be written, or the projection is the identity."""
    for seed, directions in ((SEED, 0.0), (SEED + 2, 1.0)):
        projection = by_name("wrong-threshold").make(seed).editor.P
        assert float(projection.diagonal(dim1=1, dim2=2).mean()) == pytest.approx(directions, abs=1e-3)


def test_what_was_there_before_the_first_edit(outcome: Callable[[str], Outcome]) -> None:
    assert load(outcome("grace-resumed").run).series("editor.keys")[0] > 0
    assert float(by_name("cache-of-a-sweep").make(SEED).editor.cache_c.norm()) > 0


def test_a_gain_is_edited_away_while_the_watched_weights_stay(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("gain-edited")
    assert found.truth.site is None
    assert found.truth.lost_edit is not None
    assert max(found.states[found.truth.lost_edit].drift.values()) < 0.05


def test_requantised_weights_shrink_to_nothing(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("requantised")
    assert found.states[-1].drift[found.truth.site or ""] > 0.7
    assert min(state.agreement for state in found.states) < 0.3


def test_momentum_makes_a_step_of_what_earlier_edits_wanted(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("momentum-kept")
    lost = found.truth.lost_edit
    assert lost is not None
    assert max(found.states[lost].updates.values()) > 2 * max(found.states[1].updates.values())


@pytest.mark.parametrize("name", ["healthy-low-rank", "healthy-uneven", "healthy-bf16"])
def test_nothing_is_wrong_in_a_healthy_loop(name: str) -> None:
    states = watched(by_name(name), SEED, nobody)
    assert len(states) == 121
    assert min(state.agreement for state in states) >= 0.8
    assert max(state.perplexity_ratio for state in states) < 3.0
    assert math.isfinite(max(max(state.drift.values()) for state in states))
