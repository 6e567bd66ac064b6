"""The optimizer's learning rate: read from whoever steps, and named as the cause where it was raised."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from tests.loops import CANARY, make_model
from tests.synthetic_runs import diagnose, row

METRIC = "gradient.learning_rate"


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def watched(tmp_path: Path, model: nn.Module, edit: Callable[[int], None], times: int = 3) -> sl.Run:
    with sl.attach(model, "*", tmp_path / "run", canary=CANARY, announce=False) as monitor:
        for number in range(1, times + 1):
            with monitor.edit():
                edit(number)
    return sl.load(tmp_path / "run")


def test_each_layer_has_the_rate_of_its_group_and_a_schedule_is_followed(tmp_path: Path) -> None:
    model = make_model()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def edit(number: int) -> None:
        step(model, optimizer, number)
        schedule.step()

    run = watched(tmp_path, model, edit)
    np.testing.assert_allclose(run.series(METRIC, "0")[1:], [0.1, 0.05, 0.025])
    np.testing.assert_allclose(run.series(METRIC, "3")[1:], [0.01, 0.005, 0.0025])


def test_of_several_steps_the_largest_rate_counts(tmp_path: Path) -> None:
    model = make_model()

    def edit(_: int) -> None:
        for rate in (0.01, 0.02, 0.005):
            step(model, torch.optim.SGD(model.parameters(), lr=rate), 0)

    np.testing.assert_allclose(watched(tmp_path, model, edit).series(METRIC, "0")[1:], [0.02] * 3)


def test_a_rate_that_is_kept_in_a_tensor_is_read(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    run = watched(tmp_path, model, lambda number: step(model, optimizer, number))
    np.testing.assert_allclose(run.series(METRIC, "0")[1:], [0.25] * 3)


def test_a_loop_without_an_optimizer_has_none(tmp_path: Path) -> None:
    model = make_model()

    def edit(_: int) -> None:
        model(torch.randn(2, 5, 8)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None

    assert METRIC not in {metric for metric, _ in watched(tmp_path, model, edit).edits[-1].row.readings}


def paced(rate: float, update: float, lost: bool = False) -> dict[tuple[str, str], float]:
    readings = {(METRIC, "fc"): rate, ("update.norm", "fc"): update, ("update.ratio", "fc"): update / 100}
    readings |= {("drift.ratio", "fc"): 0.01, ("canary.kl", "model"): 9.0 if lost else 0.01}
    return readings


def cause_of(*edits: dict[tuple[str, str], float]) -> tuple[str, str]:
    found = diagnose(row(number, readings) for number, readings in enumerate([{}, *edits]))
    return found.cause, found.confidence


def test_a_rate_that_was_raised_is_the_cause_where_updates_rose_with_it() -> None:
    calm, lost = [paced(0.01, 1.0)] * 9, [paced(0.5, 50.0, lost=True)] * 3
    assert cause_of(*calm, *lost) == ("learning-rate-too-high", "high")


@pytest.mark.parametrize(
    ("rate", "update"),
    [(0.01, 50.0), (0.02, 50.0), (0.05, 500.0), (0.5, 1.5)],
    ids=["the same rate", "hardly raised", "updates outgrow it by far", "updates don't follow"],
)
def test_another_growth_is_not_laid_on_the_rate(rate: float, update: float) -> None:
    calm, lost = [paced(0.01, 1.0)] * 9, [paced(rate, update, lost=True)] * 3
    assert cause_of(*calm, *lost)[0] == "unknown"


def test_a_schedule_that_ends_well_is_no_fault() -> None:
    warm = [paced(0.001 * number, 0.1 * number) for number in range(1, 40)]
    assert cause_of(*warm) == ("unknown", "none")


def test_edits_that_are_all_too_large_and_lead_nowhere_may_have_another_fault_too() -> None:
    def large(edit: int, rate: float | None) -> dict[tuple[str, str], float]:
        readings = {("update.norm", "fc"): 9.0, ("update.ratio", "fc"): 0.9, ("drift.norm", "fc"): 9.0 * edit}
        readings |= {("drift.ratio", "fc"): 0.9 * edit, ("canary.kl", "model"): 9.0}
        return readings if rate is None else readings | {(METRIC, "fc"): rate}

    assert cause_of(*[large(edit, 30.0) for edit in range(1, 8)]) == ("learning-rate-too-high", "low")
    assert cause_of(*[large(edit, None) for edit in range(1, 8)])[0] == "unknown"


def test_a_loop_whose_rate_is_raised_by_mistake(tmp_path: Path) -> None:
    model = make_model()

    def edit(number: int) -> None:
        rate = 0.01 if number < 10 else 300.0
        step(model, torch.optim.SGD(model.parameters(), lr=rate), number)

    found = watched(tmp_path, model, edit, times=14).diagnosis()
    assert (found.cause, found.confidence, found.first_bad_metric) == ("learning-rate-too-high", "high", METRIC)
    assert found.first_bad_edit == 10


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_rate_that_is_lost_is_the_cause_and_not_the_steps_own_arithmetic(tmp_path: Path, lost: float) -> None:
    model = make_model()

    def edit(number: int) -> None:
        groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.02}]
        groups[0]["lr"] = lost if number == 4 else 0.01
        step(model, torch.optim.SGD(groups, lr=0.01), number)

    run = watched(tmp_path, model, edit, times=6)
    np.testing.assert_array_equal(run.series(METRIC, "0")[1:], [0.01] * 3 + [lost] + [0.01] * 2)
    assert run.present(METRIC, "0")[4]
    found = run.diagnosis()
    assert (found.cause, found.confidence) == ("learning-rate-not-finite", "high")
    assert (found.first_bad_edit, found.first_bad_metric) == (4, METRIC)
    assert "optimiser-nan" not in {link.cause for link in found.causes}
    assert found.first_bad_site in {"0", "0.bias"}


def test_of_several_steps_one_that_is_lost_counts(tmp_path: Path) -> None:
    model = make_model()

    def edit(_: int) -> None:
        for rate in (0.01, math.nan, 0.02):
            step(model, torch.optim.SGD(model.parameters(), lr=rate), 0)

    run = watched(tmp_path, model, edit, times=1)
    assert math.isnan(run.series(METRIC, "0")[1])
    assert run.present(METRIC, "0")[1]


def by_hand(model: nn.Module, number: int, rate: float) -> None:
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(number))
    model.zero_grad()
    model(inputs).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def test_a_loop_that_steps_by_hand_and_raises_its_rate(tmp_path: Path) -> None:
    model = make_model()
    run = watched(tmp_path, model, lambda number: by_hand(model, number, 0.01 * 3.0 ** max(0, number - 8)), times=18)
    found = run.diagnosis()
    assert (found.cause, found.confidence) == ("learning-rate-too-high", "high")
    assert "0.01 times its gradient" in found.cause_says


def unpaced(
    number: int, rates: tuple[float, float], update: float, aligned: float = 0.3, lost: bool = False
) -> dict[tuple[str, str], float]:
    readings: dict[tuple[str, str], float] = {("canary.kl", "model"): 9.0 if lost else 0.01}
    for site, rate in zip(("fc", "proj"), rates, strict=True):
        readings |= {("update.norm", site): update, ("update.ratio", site): update / 100}
        readings |= {("drift.norm", site): aligned * update * number, ("drift.ratio", site): 0.01}
        readings |= {("gradient.norm", site): update / rate, ("gradient.nonfinite", site): 0.0}
    return readings


@pytest.mark.parametrize(
    ("rates", "update", "blamed"),
    [
        ((0.5, 0.5), 50.0, True),
        ((0.02, 0.02), 50.0, False),
        ((0.5, 0.5), 2.0, False),
        ((0.5, 0.8), 50.0, False),
        ((0.05, 0.05), 50.0, False),
    ],
    ids=["raised", "hardly raised", "updates don't follow", "not the same at each layer", "gradients grew more"],
)
def test_without_an_optimizer_it_is_what_the_gradient_is_multiplied_with(
    rates: tuple[float, float], update: float, blamed: bool
) -> None:
    calm = [unpaced(number, (0.01, 0.01), 1.0) for number in range(1, 10)]
    lost = [unpaced(number, rates, update, lost=True) for number in range(10, 13)]
    assert (cause_of(*calm, *lost) == ("learning-rate-too-high", "high")) is blamed


def test_gradients_that_add_up_by_hand_are_no_rate_that_was_raised() -> None:
    def once_more(number: int, growth: float) -> dict[tuple[str, str], float]:
        rate = 0.01 * (1 + growth * (number - 1))
        return unpaced(number, (rate, rate), 100 * rate, aligned=1.0, lost=number > 14)

    assert cause_of(*[once_more(number, 1.0) for number in range(1, 19)])[0] == "gradients-not-cleared"
    assert cause_of(*[once_more(number, 5.0) for number in range(1, 19)])[0] == "learning-rate-too-high"


def noise(model: nn.Module) -> Tensor:
    with torch.no_grad():
        weight: Tensor = model[3].weight
        return weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))


def test_edits_of_a_layer_that_is_not_watched_are_told_by_the_canary(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "0", tmp_path / "run", canary=CANARY, announce=False) as monitor:
        for _ in range(5):
            with monitor.edit():
                noise(model)
    found = sl.load(tmp_path / "run").diagnosis()
    assert (found.cause, found.confidence, found.landed) == ("others-edited", "high", "none")
    assert "the model is as it was" not in found.says
    assert "others are edited" in found.says
