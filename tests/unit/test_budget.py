"""When the dear probes measure: the decisions alone, and what they do to a run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.analysis.pace import Movement
from stabilitylab.errors import RunError, UsageError
from stabilitylab.probes import GradientNorm, SpectralNorm, Spectrum, probes_of
from stabilitylab.record.store import RunWriter
from stabilitylab.reports.html import write_report
from stabilitylab.reports.pacing import time_in_probes
from stabilitylab.watching.budget import CADENCES, CHEAP, FIRST, WATCHFUL, Budget, Recorded, decisions_of, share_of

STILL = Movement(moving=False, leaping=False)
MOVES = Movement(moving=True, leaping=False)
LEAPS = Movement(moving=True, leaping=True)
LOOP = 1.0


def decided(
    budget: Budget, edits: int, full: float, otherwise: float, like: dict[int, Movement] | None = None
) -> list[int]:
    """The edits in full of a loop whose probes take so many seconds of each edit's one."""
    in_full = []
    for edit in range(1, edits + 1):
        wanted = budget.wants(edit)
        in_full += [edit] * wanted
        budget.heard((like or {}).get(edit, STILL), alert=False)
        budget.timed(edit, wanted, LOOP, full if wanted else otherwise)
    return in_full


def test_what_fits_is_measured_at_each_edit_and_nothing_is_left_out_to_find_that() -> None:
    budget = Budget(0.03)
    assert decided(budget, 50, full=0.03, otherwise=0.01) == list(range(1, 51))
    assert budget.every == 1
    assert budget.always


@pytest.mark.parametrize("every", CADENCES[1:])
def test_the_smallest_cadence_that_keeps_to_the_share(every: int) -> None:
    otherwise, allowed = 0.01, 0.03
    full = otherwise + (allowed - otherwise) * every * 0.99
    budget = Budget(allowed)
    in_full = decided(budget, 200, full, otherwise)
    assert budget.every == every
    assert in_full[:FIRST] == list(range(1, FIRST + 1))
    later = [edit for edit in in_full if edit > FIRST + CHEAP]
    assert [b - a for a, b in itertools.pairwise(later)] == [every] * (len(later) - 1)
    spent = sum(full if edit in in_full else otherwise for edit in range(101, 201))
    assert spent / 100 <= allowed


def test_where_no_cadence_keeps_to_it_the_longest_is_taken() -> None:
    budget = Budget(0.03)
    decided(budget, 40, full=2.0, otherwise=0.5)
    assert budget.every == CADENCES[-1]


def test_a_burst_of_other_work_does_not_set_the_cadence() -> None:
    budget = Budget(0.03)
    for edit in range(1, FIRST + 1):
        full = budget.wants(edit)
        budget.heard(STILL, alert=False)
        budget.timed(edit, full, LOOP, 5.0 if edit in (1, 4) else 0.02)
    assert budget.every == 1


def test_where_all_the_first_edits_failed_the_others_are_measured_in_full() -> None:
    budget = Budget(0.03)
    for edit in range(1, FIRST + 1):
        assert budget.wants(edit)  # and nothing is timed of an edit that failed
    assert not budget.wants(FIRST + 1)
    budget.timed(FIRST + 1, False, LOOP, 0.01)
    assert budget.always


def test_edits_that_do_nothing_take_the_longest_cadence_and_stay_in_the_manifest(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with sl.attach(model, "*", tmp_path / "run", announce=False, trace=False, budget=0.03) as monitor:
        for _ in range(14):
            with monitor.edit():
                pass
    run = sl.load(tmp_path / "run")
    assert run.manifest["budget"]["every"] == CADENCES[-1]
    assert not [note for note in run.notes if note.kind == "probe-off"]


def test_a_leap_is_followed_by_edits_in_full_and_movement_by_a_denser_cadence() -> None:
    quiet = decided(Budget(0.03), 100, full=0.3, otherwise=0.01)
    leapt = decided(Budget(0.03), 100, full=0.3, otherwise=0.01, like={50: LEAPS})
    assert set(range(51, 51 + WATCHFUL)) <= set(leapt)
    assert [edit for edit in leapt if edit <= 50] == [edit for edit in quiet if edit <= 50]
    moving = decided(Budget(0.03), 100, full=0.3, otherwise=0.01, like=dict.fromkeys(range(30, 101), MOVES))
    assert len(quiet) < len(moving) < 60


def test_what_goes_on_leaping_is_movement() -> None:
    """Else a run whose end is long would cost what the budget forbids, for as long as it goes on."""
    lasting = decided(Budget(0.03), 200, full=0.3, otherwise=0.01, like=dict.fromkeys(range(50, 201), LEAPS))
    assert set(range(51, 51 + WATCHFUL)) <= set(lasting)
    assert len([edit for edit in lasting if edit > 100]) <= 100 / CADENCES[2]


def test_without_a_share_everything_is_measured() -> None:
    assert decided(Budget(None), 30, full=9.0, otherwise=1.0) == list(range(1, 31))


def test_another_runs_edits_are_repeated_and_then_its_cadence() -> None:
    recorded = Recorded(in_full=frozenset({1, 2, 7}), last=10, every=5)
    assert decided(Budget(None, (), recorded), 20, full=9.0, otherwise=1.0) == [1, 2, 7, 12, 17]


@pytest.mark.parametrize(
    ("wrong", "says"), [(0, "above 0"), (-0.1, "above 0"), (3, "3 percent are 0.03"), ("3%", "'3%'"), (True, "True")]
)
def test_a_share_that_can_not_be_one(wrong: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        share_of(wrong)


def test_who_says_how_often_is_not_overruled() -> None:
    assert Spectrum().is_paced
    assert SpectralNorm().is_paced
    assert not Spectrum(every=1).is_paced
    assert not GradientNorm().is_paced


def loop(folder: Path, edits: int = 30, **options: object) -> sl.Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=1e-3), torch.randn(5, 6)
    with sl.attach(model, "*", folder, announce=False, trace=False, **options) as monitor:  # type: ignore[arg-type]
        for _ in range(edits):
            with monitor.edit():
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
    return sl.load(folder)


def read_at(run: sl.Run, metric: str) -> list[int]:
    site = run.sites_of(metric)[0]
    return [int(edit) for edit in run.edit_numbers[run.present(metric, site)]]


def test_a_tight_budget_leaves_out_what_is_dear_and_nothing_else(tmp_path: Path) -> None:
    """Edits of microseconds: whatever the machine, probes take more than a millionth of them."""
    run = loop(tmp_path / "tight", budget=1e-6)
    seldom = [*range(1, FIRST + 1), FIRST + CADENCES[-1]]
    assert read_at(run, "gradient.spectrum") == read_at(run, "gradient.stable_rank") == seldom
    assert read_at(run, "weight.spectral_norm") == [0, *seldom]
    assert read_at(run, "gradient.norm") == list(range(1, 31))
    assert read_at(run, "update.norm")[-30:] == list(range(1, 31))
    assert run.manifest["budget"]["every"] == CADENCES[-1]
    assert run.manifest["budget"]["share_in_full"] >= run.manifest["budget"]["share_otherwise"] > 0
    assert run.diagnosis().verdict == "stable"


def test_where_nothing_is_dear_there_is_nothing_to_leave_out(tmp_path: Path) -> None:
    run = loop(tmp_path / "light", budget=1e-6, probes="light")
    assert run.manifest["budget"] == {"every": 1, "metrics": []}
    assert read_at(run, "weight.norm")[-30:] == list(range(1, 31))


def test_what_is_measured_is_the_same_as_without_a_budget(tmp_path: Path) -> None:
    tight, whole = loop(tmp_path / "tight", budget=1e-6), loop(tmp_path / "whole", budget=None)
    for metric in ("gradient.norm", "gradient.stable_rank", "weight.norm", "drift.norm", "logits.max"):
        for site in tight.sites_of(metric):
            there = tight.present(metric, site)
            torch.testing.assert_close(
                torch.tensor(tight.series(metric, site)[there]), torch.tensor(whole.series(metric, site)[there])
            )


def test_a_schedule_repeats_a_run(tmp_path: Path) -> None:
    first = loop(tmp_path / "first", budget=1e-6)
    again = loop(tmp_path / "again", schedule=tmp_path / "first")
    third = loop(tmp_path / "third", edits=50, schedule=again)
    assert read_at(first, "gradient.spectrum") == read_at(again, "gradient.spectrum")
    assert read_at(third, "gradient.spectrum") == [*read_at(first, "gradient.spectrum"), 48]


def test_a_schedule_of_a_run_in_full_is_in_full(tmp_path: Path) -> None:
    loop(tmp_path / "first", edits=12, budget=None)
    assert len(read_at(loop(tmp_path / "again", schedule=tmp_path / "first"), "gradient.spectrum")) == 30


def test_a_schedule_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        loop(tmp_path / "run", schedule=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("forged", [{"every": "often", "metrics": 3}, {"every": 2**60, "share": "x"}, {}])
def test_decisions_of_a_forged_file(tmp_path: Path, forged: dict[str, object]) -> None:
    metrics = [metric for probe in probes_of("light") for metric in probe.metrics]
    RunWriter(tmp_path / "run", {"budget": forged}, metrics).close()
    assert decisions_of(sl.load(tmp_path / "run")).every == 1


def test_a_spike_at_an_edit_that_was_passed_over_is_found_by_the_next_in_full(tmp_path: Path) -> None:
    """The spike's direction is in no later update, and orthogonal to the one that was followed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    weight = model[0].weight
    left, sizes, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    along, spike = (torch.outer(left[:, at], right[at]) * sizes[0] for at in (0, -1))
    with sl.attach(model, "0", tmp_path / "run", announce=False, trace=False, budget=1e-6) as monitor:
        for edit in range(1, 30):
            with monitor.edit(), torch.no_grad():
                # Each as large as the others: nothing leaps, and nothing is measured in full for it.
                weight += 0.12 * (spike if 9 <= edit < 19 else along * (-1) ** edit)
    run = sl.load(tmp_path / "run")
    assert read_at(run, "weight.spectral_norm")[-1] > 20
    last = read_at(run, "weight.spectral_norm")[-1]
    assert run.series("weight.spectral_norm", "0")[last] == pytest.approx(float(1.2 * sizes[0] + sizes[-1]), rel=0.01)


def test_every_surface_says_how_seldom_what_is_dear_was_measured(tmp_path: Path) -> None:
    tight, whole = loop(tmp_path / "tight", budget=1e-6), loop(tmp_path / "whole", budget=None)
    assert f"every {CADENCES[-1]} edits" in time_in_probes(tight)
    assert ";" not in time_in_probes(whole)
    for run, said in ((tight, True), (whole, False)):
        page = write_report(run, run.path / "report.html").read_text("utf-8")
        assert (f"Exact spectra and σ₁ every {CADENCES[-1]} edits" in page) is said
