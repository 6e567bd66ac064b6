"""Weights that are offloaded: read where they are kept, and what is written to their placeholder is said to be lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.errors import EditError, SiteError
from tests.loops import hooks_on


class AlignDevicesHook:
    """The shape of accelerate's: where the values are kept while the layer rests."""

    def __init__(self, weights_map: dict[str, Tensor]) -> None:
        self.weights_map = weights_map

    def around(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """The layer's forward, with its values brought in for it alone."""

        def forward(x: Tensor) -> Tensor:
            found: Tensor = nn.functional.linear(x, self.weights_map["weight"], self.weights_map["bias"])
            for name in self.weights_map:
                layer._parameters[name] = nn.Parameter(self.weights_map[name].to("meta"), requires_grad=False)
            return found

        return forward


def by_a_hook_of_this_shape(model: nn.Sequential) -> None:
    for layer in model:
        assert isinstance(layer, nn.Linear)
        hook = AlignDevicesHook({name: values.detach().clone() for name, values in layer.named_parameters()})
        layer._hf_hook = hook  # type: ignore[assignment]
        layer.to("meta")
        layer.forward = hook.around(layer)  # type: ignore[method-assign]


def by_accelerate(model: nn.Sequential) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the real offload needs accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize("offload", [by_a_hook_of_this_shape, by_accelerate])
def test_what_the_next_forward_takes_is_read_and_a_write_beside_it_is_told(
    tmp_path: Path, offload: Callable[[nn.Sequential], None]
) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    offload(model)
    kept = model[0]._hf_hook.weights_map["weight"]
    first = kept.clone()
    with sl.attach(model, "*", tmp_path / "run", canary={"input": torch.randn(3, 6)}, announce=False) as monitor:
        with monitor.edit(), torch.no_grad():
            kept.mul_(1.5)
        with monitor.edit(), torch.no_grad():
            model(torch.randn(2, 6))
            model[1].weight.add_(1)
    run = sl.load(tmp_path / "run")
    assert run.series("weight.norm", "0")[0] == pytest.approx(float(first.norm()), rel=1e-6)
    np.testing.assert_allclose(run.series("update.norm", "0"), [0, 0.5 * float(first.norm()), 0], rtol=1e-5)
    assert (run.series("canary.kl", "model")[1:] > 0).all()
    lost = [note for note in run.notes if note.kind == "lost-edit"]
    assert [note.edit for note in lost] == [2]
    assert lost[0].says.startswith("1: an edit wrote to the placeholder")


@pytest.mark.parametrize("offload", [by_a_hook_of_this_shape, by_accelerate])
def test_after_an_edit_that_was_lost_the_next_is_refused(
    tmp_path: Path, offload: Callable[[nn.Sequential], None]
) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    offload(model)
    with sl.attach(model, "*", tmp_path / "run", announce=False) as monitor, torch.no_grad():
        with monitor.edit():  # some of it arrives
            model[1].weight.add_(1)
            model[0]._hf_hook.weights_map["weight"].mul_(1.5)
        with monitor.edit():  # nothing is written
            model(torch.randn(2, 6))
        with monitor.edit():
            model(torch.randn(2, 6))
            model[1].weight.add_(1)
            model(torch.randn(2, 6))  # has a new placeholder
        for _ in range(2):
            with pytest.raises(EditError, match=r"edit 3 wrote to the placeholder of '1', .*weights_map"):
                monitor.edit()
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits] == [0, 1, 2, 3]
    assert hooks_on(model) == 0
    assert "lost-edit" in {note.kind for note in run.notes}


def test_values_that_nobody_can_find_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="what an edit writes there is lost; load it to a device"):
        sl.attach(nn.Sequential(nn.Linear(6, 5)).to("meta"), "0", tmp_path / "run")
    assert not (tmp_path / "run").exists()
