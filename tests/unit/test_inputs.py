"""What the model is called with: counted, and named as the cause where it was no number already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.probes.input_pass import count_bad_inputs
from tests.loops import make_model

METRIC = "inputs.bad_entries"
NAN, INF = float("nan"), float("inf")


class Mapped(nn.Module):
    """A model that takes its inputs in a dict, as EasyEdit's do, and whole numbers and masks beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, samples: Mapping[str, Any], ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        hidden: Tensor = samples["pixels"]
        logits: Tensor = self.net(hidden if mask is None else hidden + mask.clamp_min(0))
        return logits


def gradient_step(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    logits = model(*args, **kwargs)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(logits.square().mean(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.01 * gradient


def test_nan_and_positive_infinity_are_counted_and_negative_infinity_is_a_mask() -> None:
    tensor = torch.tensor([0.0, NAN, INF, -INF, 3e38, NAN])
    assert float(count_bad_inputs(tensor)) == 3
    assert float(count_bad_inputs(tensor.half()[:1])) == 0
    assert float(count_bad_inputs(torch.tensor([INF, -INF]))) == 1


def test_all_calls_of_an_edit_are_added_up_wherever_the_numbers_stand(tmp_path: Path) -> None:
    model = Mapped()
    good, bad = torch.randn(2, 8), torch.randn(2, 8)
    bad[0, 3] = NAN
    mask = torch.zeros(2, 8)
    mask[1] = -INF
    with sl.attach(model, "net.*", tmp_path / "run", announce=False) as monitor:
        with monitor.edit():
            model({"pixels": good}, ids=torch.tensor([1]), mask=mask)
        with monitor.edit():
            model({"pixels": bad})
            model({"pixels": good})
            model({"pixels": torch.full((2, 8), INF)})
    np.testing.assert_array_equal(sl.load(tmp_path / "run").series(METRIC, "model")[1:], [0, 17])


def test_whole_numbers_alone_are_no_reading(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(10, 8), *make_model())
    with sl.attach(model, "1", tmp_path / "run", announce=False) as monitor, monitor.edit():
        model(torch.arange(4))
    assert (METRIC, "model") not in sl.load(tmp_path / "run").edits[-1].row.readings


def run_with(tmp_path: Path, inputs: Mapping[int, Tensor], *, spoil: bool = False) -> sl.Diagnosis:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", announce=False) as monitor:
        for edit in range(1, 8):
            with monitor.edit():
                gradient_step(model, inputs.get(edit, torch.randn(2, 5, 8)))
                if spoil and edit == 5:
                    with torch.no_grad():
                        model[0].weight[0, 0] = NAN
    return sl.load(tmp_path / "run").diagnosis()


def test_a_request_that_is_no_number_is_the_cause(tmp_path: Path) -> None:
    bad = torch.randn(2, 5, 8)
    bad[1, 2, 3:5] = NAN
    found = run_with(tmp_path, {5: bad})
    assert (found.verdict, found.cause, found.confidence) == ("non-finite", "input-not-finite", "high")
    assert (found.first_bad_edit, found.first_bad_metric, found.first_bad_site) == (5, METRIC, "model")


def test_a_loss_that_spoils_all_weights_is_not_laid_on_those_that_nobody_watches(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", announce=False) as monitor:
        for edit in range(1, 6):
            with monitor.edit():
                loss = (model(torch.randn(2, 5, 8)).square() * (edit < 4)).sum()
                parameters = list(model.parameters())
                gradients = torch.autograd.grad(loss / loss.detach(), parameters)  # 0/0 at edit 4
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter -= 0.01 * gradient
    found = sl.load(tmp_path / "run").diagnosis()
    assert (found.first_nonfinite_edit, found.cause) == (4, "loss-not-finite")


def test_a_weight_that_was_spoilt_is_not_laid_on_the_input(tmp_path: Path) -> None:
    bad = torch.full((2, 5, 8), NAN)
    assert run_with(tmp_path, {6: bad}, spoil=True).cause != "input-not-finite"
    assert run_with(tmp_path / "sound", {}, spoil=True).cause != "input-not-finite"
