"""Adapters, copies and wrappers: the layer inside is found again, and nothing changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.layers import (
    Read,
    Step,
    assert_gradients_read,
    assert_outputs_read,
    assert_weights_read,
    catching,
    product,
    read_at,
    watch,
    wide,
)
from tests.one_layer import LAYER, Net, descend


class LoRALinear(nn.Module):
    """PEFT's shape: the frozen layer inside, its weight shown as a property, two trained matrices beside it."""

    def __init__(self, base_layer: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        self.merged = False

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B(self.lora_A(x))

    def merge(self, sign: float = 1.0) -> None:
        self.base_layer.weight.data += sign * self.lora_B.weight.data @ self.lora_A.weight.data
        self.merged = sign > 0


ADAPTER: Read = {
    "layer.base_layer": lambda model: model.layer.base_layer.weight,
    "layer.lora_A": lambda model: model.layer.lora_A.weight,
    "layer.lora_B": lambda model: model.layer.lora_B.weight,
}


def train_adapter(net: Any) -> Step:
    """One step on the adapter's matrices, with their gradients by the chain rule."""
    down, up = wide(net.layer.lora_A.weight), wide(net.layer.lora_B.weight)
    step = descend(net, *ADAPTER)
    whole = step.gradients["layer"]
    step.gradients |= {"layer.lora_A": up.T @ whole, "layer.lora_B": whole @ down.T}
    return step


def test_lora_adapters_and_the_layer_they_wrap(tmp_path: Path) -> None:
    run, loop = watch(
        tmp_path,
        lambda: Net(LoRALinear(nn.Linear(8, 6))),
        train_adapter,
        ADAPTER,
        sites=["*.lora_A*", "*.lora_B*", "*.base_layer"],
    )
    for site in ADAPTER:
        assert_weights_read(run, loop, site)
        assert_outputs_read(run, loop, site, sequence=True)
    assert_gradients_read(run, loop, "layer.lora_A")
    assert_gradients_read(run, loop, "layer.lora_B")
    assert not read_at(run, "layer.base_layer", "gradient.")  # frozen, and nothing before it is trained
    assert (run.series("update.norm", "layer.base_layer") == 0).all()


class Trained(Net):
    """With a trained layer before the one in question, so that a backward passes it even where it is frozen."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(self.first(x))


def test_the_layer_inside_adapters_that_appear_during_the_first_edit(tmp_path: Path) -> None:
    """The layer is found by its old name inside the adapter, whatever the adapter shows as its own weight."""

    def edit(net: Any) -> Step:
        if isinstance(net.layer, nn.Linear):
            net.layer = LoRALinear(net.layer)
        step = train_adapter(net)
        step.outputs["layer"] = step.outputs["layer.base_layer"]
        return step

    read: Read = {"layer": lambda model: getattr(model.layer, "base_layer", model.layer).weight}
    run, loop = watch(tmp_path, lambda: Trained(nn.Linear(8, 6)), edit, read)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    assert_gradients_read(run, loop, "layer")


def test_adapters_that_are_merged_and_unmerged(tmp_path: Path) -> None:
    def edit(net: Any) -> Step:
        if net.layer.merged:
            net.layer.merge(-1.0)
        step = train_adapter(net)
        net.layer.merge()
        return step

    run, loop = watch(tmp_path, lambda: Net(LoRALinear(nn.Linear(8, 6))), edit, ADAPTER)
    for site in ADAPTER:
        assert_weights_read(run, loop, site)
    assert (run.series("update.norm", "layer.base_layer")[1:] > 0).all()
    assert_gradients_read(run, loop, "layer.lora_A")
    # Merged, the edit's call passes no adapter, but the base layer that holds what they were merged to.
    assert run.sites_of("feedback.share") == ("layer.base_layer",)


class Codebook(nn.Module):
    """GRACE's shape: the layer inside, and a value that takes the place of its last position."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.value = layer, nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([y[..., :-1, :], self.value.expand_as(y[..., -1:, :])], dim=-2)


def test_a_layer_that_is_wrapped_in_the_edit_and_put_back_as_a_copy(tmp_path: Path) -> None:
    def edit(net: Any) -> Step:
        original = net.layer
        net.layer = Codebook(original, 6)
        x = net.data()
        y = net(x)["logits"]
        net.layer = copy.deepcopy(original)
        step = descend(net)
        return Step(net, y.detach(), step.gradients, {"layer": wide(original(x))})

    run, loop = watch(tmp_path, lambda: Net(nn.Linear(8, 6)), edit, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)


def test_a_layer_that_stays_wrapped(tmp_path: Path) -> None:
    def edit(net: Any) -> Step:
        if isinstance(net.layer, nn.Linear):
            net.layer = Codebook(net.layer, 6)
        return descend(net)

    read: Read = {"layer": lambda model: getattr(model.layer, "layer", model.layer).weight}
    run, loop = watch(tmp_path, lambda: Net(nn.Linear(8, 6)), edit, read)
    assert_weights_read(run, loop, "layer")
    assert run.present("activation.rms", "layer").tolist() == [False, True, True, True]


def test_a_model_that_the_editor_copies_and_hands_over(tmp_path: Path) -> None:
    def edit(net: Any) -> Step:
        clone = copy.deepcopy(net)
        return descend(clone)

    run, loop = watch(tmp_path, lambda: Net(nn.Linear(8, 6)), edit, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_gradients_read(run, loop, "layer")  # the copy took the hooks along
    assert_outputs_read(run, loop, "layer", sequence=True)


def test_a_functional_clone_that_is_copied_into_the_parameters(tmp_path: Path) -> None:
    """MEND's shape: forward with new weights in the module's place, and then p.copy_(new)."""

    def edit(net: Any) -> Step:
        new = {name: (p + 0.1 * torch.randn(p.shape)).detach().requires_grad_() for name, p in net.named_parameters()}
        with catching(net, "layer") as caught:
            answer = torch.func.functional_call(net, new, net.data())
        x, y = caught["layer"]
        delta, *gradients = torch.autograd.grad(answer["loss"], [y, *new.values()])
        with torch.no_grad():
            for (name, parameter), gradient in zip(net.named_parameters(), gradients, strict=True):
                parameter.copy_(new[name] - gradient)
        return Step(net, answer["logits"].detach(), {"layer": product(delta, x)}, {"layer": wide(y)})

    run, loop = watch(tmp_path, lambda: Net(nn.Linear(8, 6)), edit, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_gradients_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)


def test_without_sites_adapters_of_the_first_edit_are_discovered_when_they_move(tmp_path: Path) -> None:
    def edit(net: Any) -> Step:
        if isinstance(net.layer, nn.Linear):
            net.layer = LoRALinear(net.layer)
        return train_adapter(net)

    run, _ = watch(tmp_path, lambda: Net(nn.Linear(8, 6)), edit, {}, sites=None)
    assert run.manifest["sites"] == ["layer.lora_A", "layer.lora_B"]
