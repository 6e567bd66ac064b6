"""Several passes through a layer in one edit: the first, the last and the worst are kept, the others counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl

SITE = "2"
Pass = Callable[[nn.Module, int], tuple[Tensor, Tensor]]
"""One forward and backward of an edit, the n-th: the input of the watched layer, and δ at its output."""


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)).to(dtype)


def inputs(at: int, tokens: int = 10) -> Tensor:
    return torch.randn(2, tokens // 2, 8, generator=torch.Generator().manual_seed(at)) * (1 + at % 7)


def step(model: nn.Module, x: Tensor, rate: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """One gradient step; (G of the watched layer, its output), naively and in float64."""
    kept: dict[str, Tensor] = {}
    y = model[:2](x)
    kept["x"] = y.detach().clone().double()
    out = model[2](y)
    gradients = torch.autograd.grad(out.pow(2).mean(), [out, *model.parameters()])
    delta = gradients[0].double().reshape(-1, 4)
    gradient = (delta.T @ kept["x"].reshape(-1, 16)).numpy()
    with torch.no_grad():
        for parameter, change in zip(model.parameters(), gradients[1:], strict=True):
            if rate:
                parameter -= rate * change
    return gradient, out.detach().double().numpy()


def one_edit(folder: Path, edit: Callable[[nn.Module], Any], probes: Any = "default") -> tuple[sl.Run, Any]:
    """A run of one edit, and what its function returned."""
    model = make_model()
    with sl.attach(model, SITE, folder, probes=probes) as monitor, monitor.edit():
        told = edit(model)
    return sl.load(folder), told


def reading(run: sl.Run, metric: str, site: str = SITE) -> float:
    found = run.edits[-1].row.scalar(metric, site)
    assert found is not None, metric
    return found


def size(gradient: np.ndarray, x: np.ndarray | None = None) -> float:
    return float(np.linalg.norm(gradient))


@pytest.mark.parametrize("passes", [2, 25, 430])
def test_first_last_and_worst_of_many_are_what_a_naive_reader_sees(tmp_path: Path, passes: int) -> None:
    worst, largest = None, 0.0

    def edit(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
        nonlocal worst, largest
        seen = []
        for at in range(passes):
            hidden: list[Tensor] = []
            with model[2].register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach().double())):  # noqa: B023
                gradient, out = step(model, inputs(at))
            delta_norm = np.linalg.norm(2 * out / out.size)  # of mean(y²)
            factors = float(hidden[0].norm()) * delta_norm
            if factors > largest:
                largest, worst = factors, gradient
            seen.append((gradient, out))
        return seen

    run, seen = one_edit(tmp_path / "run", edit)
    for family, site in (("gradient", SITE), ("activation", SITE), ("logits", "model")):
        count = passes if family != "logits" else None
        if count is not None:
            assert reading(run, f"{family}.passes", site) == count
            assert reading(run, f"{family}.nonfinite_passes", site) == 0
    gradients = [gradient for gradient, _ in seen]
    assert reading(run, "gradient.norm") == pytest.approx(size(gradients[0]), rel=1e-5)
    assert reading(run, "gradient.norm_last") == pytest.approx(size(gradients[-1]), rel=1e-5)
    assert worst is not None
    assert reading(run, "gradient.norm_worst") == pytest.approx(size(worst), rel=1e-5)
    for name, gradient in (("", gradients[0]), ("_last", gradients[-1]), ("_worst", worst)):
        spectrum = run.edits[-1].row.readings[(f"gradient.spectrum{name}", SITE)]
        exact = np.linalg.svd(gradient, compute_uv=False)
        np.testing.assert_allclose(spectrum, exact, rtol=1e-4, atol=1e-5 * exact[0])
    outs = [float(np.abs(out).max()) for _, out in seen]
    assert reading(run, "activation.max_abs") == pytest.approx(outs[0], rel=1e-6)
    assert reading(run, "activation.max_abs_last") == pytest.approx(outs[-1], rel=1e-6)
    assert reading(run, "activation.max_abs_worst") == pytest.approx(max(outs), rel=1e-6)


def test_one_pass_has_no_last_and_no_worst(tmp_path: Path) -> None:
    run, _ = one_edit(tmp_path / "run", lambda model: step(model, inputs(0)))
    assert reading(run, "gradient.passes") == reading(run, "activation.passes") == 1
    for metric in ("gradient.norm", "activation.max_abs"):
        assert not run.sites_of(f"{metric}_last")
        assert not run.sites_of(f"{metric}_worst")


def test_a_nan_in_the_middle_that_is_gone_a_pass_later(tmp_path: Path) -> None:
    def edit(model: nn.Module) -> list[float]:
        sizes = []
        for at in range(25):
            x = inputs(at)
            if at == 6:
                x[0, 0, 0] = torch.nan
            gradient, _ = step(model, x, rate=0.0)
            sizes.append(size(gradient))
        return sizes

    run, sizes = one_edit(tmp_path / "run", edit)
    assert np.isnan(sizes[6])
    assert not np.isnan(sizes[7])
    for family in ("gradient", "activation"):
        assert reading(run, f"{family}.passes") == 25
        assert reading(run, f"{family}.nonfinite_passes") == 1
    assert reading(run, "gradient.norm") == pytest.approx(sizes[0], rel=1e-5)
    assert reading(run, "gradient.norm_last") == pytest.approx(sizes[-1], rel=1e-5)
    assert np.isnan(reading(run, "gradient.norm_worst"))
    assert np.isnan(reading(run, "activation.max_abs_worst"))
    assert np.isfinite(reading(run, "activation.max_abs_last"))
    # No weight moved, and the next pass was sound: it is over.
    assert run.diagnosis().verdict == "stable"
    assert [finding.rule for finding in run.diagnosis().findings][:1] == ["step-skipped"]


def test_every_pass_from_one_on_is_lost(tmp_path: Path) -> None:
    def edit(model: nn.Module) -> None:
        for at in range(25):
            x = inputs(at)
            if at >= 10:
                x[0, 0, 0] = torch.inf
            step(model, x, rate=0.0)

    run, _ = one_edit(tmp_path / "run", edit)
    assert reading(run, "gradient.nonfinite_passes") == reading(run, "activation.nonfinite_passes") == 15
    assert not np.isfinite(reading(run, "gradient.norm_last"))


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "no backward"])
def test_forwards_without_a_backward_are_outputs_only(tmp_path: Path, gradients: bool) -> None:
    def edit(model: nn.Module) -> list[float]:
        with torch.set_grad_enabled(gradients):
            return [float(model(inputs(at)).detach().abs().max()) for at in range(31)]

    run, largest = one_edit(tmp_path / "run", edit)
    assert reading(run, "activation.passes") == 31
    assert reading(run, "activation.max_abs_last") == pytest.approx(largest[-1])
    assert reading(run, "activation.max_abs_worst") == pytest.approx(max(largest))
    assert not run.sites_of("gradient.passes")
    assert not run.sites_of("gradient.norm")


def test_looks_between_the_steps_count_as_forwards_but_not_as_gradients(tmp_path: Path) -> None:
    """ROME looks at the logits before it optimises, and at the KL after: v₀, then steps, then the check."""

    def edit(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            model(inputs(100))
        steps = [step(model, inputs(at))[0] for at in range(20)]
        with torch.no_grad():
            model(inputs(101))
        return steps[0]

    run, first = one_edit(tmp_path / "run", edit)
    assert (reading(run, "activation.passes"), reading(run, "gradient.passes")) == (22, 20)
    assert reading(run, "gradient.norm") == pytest.approx(size(first), rel=1e-5)


class Adapter(nn.Module):
    """What GRACE puts in place of a layer: the layer itself, and a value that answers in its place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.value = layer, nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.value


def test_an_adapter_trained_for_40_passes(tmp_path: Path) -> None:
    """The layer is swapped inside the edit and stays frozen: its passes are counted where it now runs."""
    model = make_model().requires_grad_(False)
    x = inputs(1)
    with sl.attach(model, SITE, tmp_path / "run") as monitor, monitor.edit() as edit:
        model[2] = Adapter(model[2])
        optimiser = torch.optim.SGD([model[2].value], lr=0.1)
        for _ in range(40):
            optimiser.zero_grad()
            model(x).pow(2).mean().backward()
            optimiser.step()
        edit.returns(model)
    run = sl.load(tmp_path / "run")
    assert reading(run, "activation.passes") == 40
    assert not run.sites_of("gradient.passes")  # nothing below the value asks for a gradient
    assert reading(run, "activation.max_abs_last") == reading(run, "activation.max_abs")


# -- overwritten later ------------------------------------------------------------------------------------------------


def test_the_input_of_a_kept_pass_that_is_overwritten_later_is_not_misread(tmp_path: Path) -> None:
    """One buffer for each batch: of all but the last pass the input is gone by the end of the edit."""
    model = nn.Sequential(nn.Linear(8, 4))
    buffer = torch.empty(6, 8)
    gradients = []
    with sl.attach(model, "0", tmp_path / "run") as monitor, monitor.edit():
        for scale in (1.0, 50.0, 2.0, 3.0):
            buffer.copy_(torch.randn(6, 8) * scale)
            (gradient,) = torch.autograd.grad(model(buffer).pow(2).mean(), [model[0].weight])
            gradients.append(gradient)
    run = sl.load(tmp_path / "run")
    assert reading(run, "gradient.passes", "0") == 4
    assert reading(run, "gradient.norm", "0") == pytest.approx(gradients[0].norm().item(), rel=1e-5)
    assert reading(run, "gradient.norm_last", "0") == pytest.approx(gradients[-1].norm().item(), rel=1e-5)
    assert not run.sites_of("gradient.norm_worst")
    assert [note.says for note in run.notes if note.kind == "capture"] == [
        "last or worst gradient of 0 left out: its factors were overwritten after the backward"
    ]


def test_what_cannot_be_told_is_noted_once_however_many_passes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.requires_grad_(False)  # so that autograd keeps no input, and doesn't mind
    buffer = torch.randn(6, 8)
    with sl.attach(model, "0", tmp_path / "run") as monitor:
        for _ in range(2):
            with monitor.edit():
                for _ in range(30):
                    loss = model(buffer).pow(2).mean()
                    buffer.mul_(1.01)
                    loss.backward()
    run = sl.load(tmp_path / "run")
    assert reading(run, "activation.passes", "0") == 30
    assert not run.sites_of("gradient.passes")
    assert [note.says for note in run.notes if note.kind == "capture"] == [
        "gradient of 0 left out: its input was overwritten before the backward"
    ]


def test_the_gradient_of_the_edit_before_is_not_compared_once_it_was_overwritten(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    buffer = torch.randn(6, 8)
    with sl.attach(model, "0", tmp_path / "run", probes=[sl_probe("GradientAlignment")]) as monitor:
        for edit in range(4):
            if edit == 2:
                buffer.mul_(-1)
            with monitor.edit():
                x = buffer
                (gradient,) = torch.autograd.grad(model(x).pow(2).mean(), [model[0].weight])
                with torch.no_grad():
                    model[0].weight -= 0.01 * gradient
    run = sl.load(tmp_path / "run")
    assert run.edit_numbers[run.present("gradient.cosine_previous")].tolist() == [2, 4]


def sl_probe(name: str) -> Any:
    from stabilitylab import probes

    return getattr(probes, name)(every=1)


# -- what it costs ----------------------------------------------------------------------------------------------------


def live() -> tuple[int, int]:
    """(how many tensors there are, the bytes of their distinct storages)."""
    gc.collect()
    # By exact type: torch keeps fake tensors, which have no storage, among its own.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


def steps_of(kind: str, model: nn.Module) -> Iterator[None]:
    """An endless edit, a pass at a time."""
    at = 0
    while True:
        if kind == "steps":
            step(model, inputs(at), rate=0.0)
        elif kind == "no_grad":
            with torch.no_grad():
                model(inputs(at))
        else:
            model(inputs(at))
        at += 1
        yield


@pytest.mark.parametrize("kind", ["steps", "no_grad", "no backward"])
@pytest.mark.parametrize("probes", ["default", "deep"])
def test_what_is_held_inside_an_edit_does_not_grow_with_its_passes(tmp_path: Path, kind: str, probes: Any) -> None:
    model = make_model()
    passes = steps_of(kind, model)
    held = {}
    with sl.attach(model, "[02]", tmp_path / "run", probes=probes) as monitor, monitor.edit():
        for at in range(1, 431):
            next(passes)
            if at in (10, 25, 430):
                held[at] = live()
    assert held[430] == held[25] == held[10]


def test_nothing_of_a_pass_is_held_after_the_edit(tmp_path: Path) -> None:
    model = make_model()
    passes, held = steps_of("steps", model), []
    with sl.attach(model, "[02]", tmp_path / "run") as monitor:
        for count in (3, 3, 40):
            with monitor.edit():
                for _ in range(count):
                    next(passes)
            held.append(live())
    assert held[1] == held[2]


@pytest.mark.parametrize(("passes", "reductions"), [(1, 1), (25, 3), (430, 3)])
def test_the_full_reduction_runs_three_times_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int, reductions: int
) -> None:
    from stabilitylab.probes import gradient_passes
    from stabilitylab.watching.instruments import gradients

    calls = []
    for module in (gradients, gradient_passes):
        real = module.reduce_factors
        monkeypatch.setattr(module, "reduce_factors", lambda *factors, real=real: (calls.append(1), real(*factors))[1])
    one_edit(tmp_path / "run", lambda model: [step(model, inputs(at), rate=0.0) for at in range(passes)])
    assert len(calls) == reductions
