"""The loop's own gradient, against what plain torch holds at the same moment, in loops of every habit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.probes.accumulated_gradient import END, FACTORS, SCALED_FACTORS, STEP
from stabilitylab.probes.gradient_factors import reduce_matrix
from tests.numbers import numpy64, random

WIDTH, TOKENS = 12, 7


class Net(nn.Module):
    """Two layers; the first may be shared, subclassed or called by keyword."""

    def __init__(self, first: nn.Module | None = None, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = first or nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, 5)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(self.first(hidden)) if self.twice else hidden
        logits: Tensor = self.last(hidden)
        return logits


def batch(seed: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(net: Net, seed: int = 0) -> Tensor:
    return nn.functional.cross_entropy(net(batch(seed)), torch.arange(TOKENS) % 5)


def norm(gradient: Tensor | None) -> float:
    assert gradient is not None
    return float(np.linalg.norm(numpy64(gradient)))


def edits(tmp_path: Path, net: Net, loop: Callable[[], float], times: int = 2) -> tuple[sl.Run, list[float]]:
    """`loop` once an edit, and what it says that its gradient's norm was."""
    run = tmp_path / "run"
    true = []
    with sl.attach(net, sites="first", run=run) as monitor:
        for _ in range(times):
            with monitor.edit():
                true.append(loop())
    return sl.load(run), true


def read(run: sl.Run, name: str) -> np.ndarray:
    return run.series(f"gradient.{name}", "first")[1:]


def check(run: sl.Run, true: list[float], source: float) -> None:
    np.testing.assert_allclose(read(run, "norm"), true, rtol=1e-5)
    assert set(read(run, "source")) == {source}
    whole = np.linalg.norm(np.nan_to_num(run.series("gradient.spectrum", "first")[1:]), axis=1)
    np.testing.assert_allclose(whole, true, rtol=1e-5)  # all singular values are among the 32 that are kept


def stepping(net: Net, batches: int = 1) -> Callable[[], float]:
    """One step of descent an edit, on the sum over some batches."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def loop() -> float:
        optimizer.zero_grad()
        for seed in range(batches):
            loss_of(net, seed).backward()
        size = norm(net.first.weight.grad)
        optimizer.step()
        return size

    return loop


def test_a_step(tmp_path: Path) -> None:
    net = Net()
    run, true = edits(tmp_path, net, stepping(net))
    check(run, true, STEP)
    np.testing.assert_allclose(read(run, "norm_stepped"), true, rtol=1e-6)


def test_accumulation_over_micro_batches(tmp_path: Path) -> None:
    net = Net()
    check(*edits(tmp_path, net, stepping(net, batches=3)), STEP)


def test_several_steps_give_the_first_the_last_and_the_worst(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    seen: list[float] = []

    def loop() -> float:
        seen.clear()
        for factor in (1.0, 50.0, 2.0):
            optimizer.zero_grad()
            (factor * loss_of(net)).backward()
            seen.append(norm(net.first.weight.grad))
            optimizer.step()
        return seen[0]

    run, true = edits(tmp_path, net, loop, times=1)
    check(run, true, STEP)
    np.testing.assert_allclose(read(run, "norm_last"), seen[-1], rtol=1e-5)
    np.testing.assert_allclose(read(run, "norm_worst"), max(seen), rtol=1e-5)


def test_clipping_is_seen_before_and_after(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    clipped: list[float] = []

    def loop() -> float:
        optimizer.zero_grad()
        (100 * loss_of(net)).backward()
        size = norm(net.first.weight.grad)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        clipped.append(norm(net.first.weight.grad))
        optimizer.step()
        return size

    run, true = edits(tmp_path, net, loop)
    check(run, true, STEP)
    np.testing.assert_allclose(read(run, "norm_stepped"), clipped, rtol=1e-5)


@pytest.mark.parametrize("early", [False, True])
def test_a_loss_scale_is_divided_out(tmp_path: Path, early: bool) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def loop() -> float:
        optimizer.zero_grad()
        scaler.scale(loss_of(net)).backward()
        size = norm(net.first.weight.grad) / scaler.get_scale()
        if early:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        return size

    run, true = edits(tmp_path, net, loop)
    check(run, true, STEP)
    assert set(read(run, "loss_scale")) == {2.0**14}


def test_a_step_that_the_scaler_skips_is_not_finite(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)

    def loop() -> float:
        optimizer.zero_grad()
        scaler.scale(1e10 * loss_of(net)).backward()
        scaler.step(optimizer)
        scaler.update()
        return 0.0

    run, _ = edits(tmp_path, net, loop, times=1)
    assert not np.isfinite(read(run, "norm")[0])
    assert read(run, "source")[0] == END
    assert read(run, "nonfinite_steps")[0] == 1


def test_a_scaler_that_the_editor_holds_is_known_before_it_lets_a_step_pass(tmp_path: Path) -> None:
    net, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with sl.attach(net, sites="first", run=tmp_path / "run", editor={"scaler": scaler}) as monitor, monitor.edit():
        scaler.scale(loss_of(net)).backward()
        size = norm(net.first.weight.grad) / scaler.get_scale()
        net.last.weight.grad.fill_(torch.inf)  # why this step is skipped
        scaler.step(optimizer)
        scaler.update()
    run = sl.load(tmp_path / "run")
    assert read(run, "norm")[0] == pytest.approx(size, rel=1e-5)
    assert run.series("update.norm", "first")[1] == 0


def test_growth_of_the_scale_is_not_growth_of_the_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    with sl.attach(net, sites="0", run=tmp_path / "run") as monitor:
        for _ in range(70):
            with monitor.edit():
                optimizer.zero_grad()
                scaler.scale((net(torch.randn(16, WIDTH)) - torch.randn(16, WIDTH)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
    diagnosis = sl.load(tmp_path / "run").diagnosis()
    assert (diagnosis.verdict, diagnosis.findings, diagnosis.landed) == ("stable", (), "all")
    assert scaler.get_scale() > 2.0**20


class Tripled(nn.Linear):
    """Computes with 3·W."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 3 * self.weight)


@pytest.mark.parametrize(
    "make", [lambda: Net(Tripled(WIDTH, WIDTH, bias=False)), lambda: Net(twice=True)], ids=["3·W", "used twice"]
)
def test_layers_whose_factors_are_not_their_gradient(tmp_path: Path, make: Callable[[], Net]) -> None:
    net = make()
    check(*edits(tmp_path, net, stepping(net)), STEP)


def by_hand(net: Net, clear: Callable[[], None]) -> Callable[[], float]:
    def loop() -> float:
        loss_of(net).backward()
        size = norm(net.first.weight.grad)
        with torch.no_grad():
            net.first.weight -= 0.1 * net.first.weight.grad
        clear()
        return size

    return loop


def test_no_optimizer(tmp_path: Path) -> None:
    net = Net()
    check(*edits(tmp_path, net, by_hand(net, net.zero_grad)), END)


def test_a_weight_that_asks_for_gradients_inside_the_edit_alone(tmp_path: Path) -> None:
    net = Net()
    net.requires_grad_(False)

    def loop() -> float:
        net.first.weight.requires_grad_(True)
        optimizer = torch.optim.SGD([net.first.weight], 0.1)
        loss_of(net).backward()
        size = norm(net.first.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        net.first.weight.requires_grad_(False)
        return size

    check(*edits(tmp_path, net, loop), STEP)


@pytest.mark.parametrize(("clear", "carried"), [("none", [1, 2]), ("in place", [0, 0]), ("anew", [0, 0])])
def test_gradients_that_nobody_clears(tmp_path: Path, clear: str, carried: list[int]) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def loop() -> float:
        for _ in range(2):
            loss_of(net).backward()
            optimizer.step()
            if clear != "none":
                optimizer.zero_grad(set_to_none=clear == "anew")
        return 0.0

    run, _ = edits(tmp_path, net, loop)
    assert read(run, "carried").tolist() == carried


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("first", ["own", "other"])
def test_a_gradient_that_another_loss_leaves_is_cleared_before_the_next_step(
    tmp_path: Path, first: str, anew: bool
) -> None:
    """Two players: the loss of one sends a gradient through the other, after its step or before it."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def own() -> None:
        optimizer.zero_grad(set_to_none=anew)
        for _ in range(2):
            loss_of(net).backward()
        optimizer.step()

    def other() -> None:
        net(batch(0)).sum().backward()

    def loop() -> float:
        for player in (own, other) if first == "own" else (other, own):
            player()
        return 0.0

    run, _ = edits(tmp_path, net, loop)
    assert read(run, "carried").tolist() == [0, 0]


def test_gradients_that_nobody_clears_are_found_where_each_edit_is_one_backward(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    made: list[int] = []

    def loop() -> float:
        loss_of(net).backward()
        made.append(1)
        if len(made) % 2 == 0:
            optimizer.step()
        return 0.0

    run, _ = edits(tmp_path, net, loop, times=6)
    assert read(run, "carried")[1::2].tolist() == [0, 1, 1]


def test_a_functional_gradient_is_that_of_the_factors(tmp_path: Path) -> None:
    net = Net()

    def loop() -> float:
        (gradient,) = torch.autograd.grad(loss_of(net), [net.first.weight])
        with torch.no_grad():
            net.first.weight -= 0.1 * gradient
        return norm(gradient)

    check(*edits(tmp_path, net, loop), FACTORS)


def test_a_gradient_that_nobody_steps_with_is_not_the_loops(tmp_path: Path) -> None:
    """The search for a value leaves `.grad` on every weight, and never clears it."""
    net = Net()
    value = nn.Parameter(torch.zeros(WIDTH))
    optimizer = torch.optim.SGD([value], 0.1)

    def loop() -> float:
        before = None if net.first.weight.grad is None else net.first.weight.grad.clone()
        nn.functional.cross_entropy(net(batch(0) + value), torch.arange(TOKENS) % 5).backward()
        optimizer.step()
        grown = net.first.weight.grad
        assert grown is not None
        return norm(grown if before is None else grown - before)

    check(*edits(tmp_path, net, loop), FACTORS)


def test_float16_factors_without_a_known_scaler_are_marked(tmp_path: Path) -> None:
    net = Net().half()

    def loop() -> float:
        logits = net(batch(0).half()).float()
        loss = 256 * nn.functional.cross_entropy(logits, torch.arange(TOKENS) % 5)
        (gradient,) = torch.autograd.grad(loss, [net.first.weight])
        return norm(gradient)

    run, _ = edits(tmp_path, net, loop, times=1)
    assert read(run, "source")[0] == SCALED_FACTORS


def test_an_overflow_in_the_gradient_itself(tmp_path: Path) -> None:
    """Both factors are finite in float16, and their product is not."""
    net = Net().half()
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)

    def loop() -> float:
        optimizer.zero_grad()
        (100 * net.first(torch.full((TOKENS, WIDTH), 200.0).half()).float()).sum().backward()
        optimizer.step()
        return 0.0

    run, _ = edits(tmp_path, net, loop, times=1)
    assert read(run, "nonfinite")[0] == 0
    assert read(run, "nonfinite_steps")[0] == 1
    assert not np.isfinite(read(run, "norm")[0])


def test_watching_changes_no_gradient(tmp_path: Path) -> None:
    bare, watched = Net(), Net()

    def loop(net: Net, optimizer: torch.optim.Optimizer) -> None:
        for seed in range(2):
            optimizer.zero_grad()
            for part in range(2):
                loss_of(net, seed + part).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()

    made = [torch.optim.Adam(net.parameters(), 0.05) for net in (bare, watched)]
    loop(bare, made[0])
    with sl.attach(watched, sites="*", run=tmp_path / "run") as monitor, monitor.edit():
        loop(watched, made[1])
    for one, other in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert not watched.first.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (9, 5), (40, 40), (300, 280)])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_a_matrix_against_numpy(rows: int, columns: int, size: float) -> None:
    gradient = random(7, rows, columns) * size
    packed, rebuild = reduce_matrix(gradient)
    seen = rebuild(packed.numpy())
    exact = np.linalg.svd(numpy64(gradient), compute_uv=False)
    # Beyond 256 only leading values that converged are given, and a flat spectrum converges slowly.
    np.testing.assert_allclose(seen.singular_values[:1], exact[:1], rtol=1e-5 if seen.exact else 0.02)
    np.testing.assert_allclose(seen.norm, np.linalg.norm(exact), rtol=1e-5 if seen.exact else 0.2)
    if seen.exact:
        np.testing.assert_allclose(seen.singular_values, exact, rtol=1e-4)


def test_zeros_and_nonfinite_entries_of_a_matrix() -> None:
    gradient = random(1, 6, 8)
    gradient[:, 2] = 0
    gradient[4] = 0
    packed, rebuild = reduce_matrix(gradient)
    assert rebuild(packed.numpy()).zero_share == pytest.approx(float((gradient == 0).double().mean()))
    gradient[0, 0] = float("inf")
    packed, rebuild = reduce_matrix(gradient)
    assert rebuild(packed.numpy()).nonfinite == 1
