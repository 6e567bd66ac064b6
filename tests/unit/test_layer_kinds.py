"""Every kind of layer and tensor in a real little edit loop: what is read, what is not, and that nothing changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import stabilitylab as sl
from stabilitylab.errors import SiteError
from tests.layers import (
    Array,
    Read,
    Step,
    assert_gradients_read,
    assert_outputs_read,
    assert_weights_read,
    catching,
    close,
    product,
    read_at,
    skipped,
    watch,
    wide,
)
from tests.loops import make_model

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYER: Read = {"layer": lambda model: model.layer.weight}


class Net(nn.Module):
    """One layer and a loss on its output."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...] = (2, 5, 8), tokens: int | None = None) -> None:
        super().__init__()
        self.layer, self.shape, self.tokens = layer, shape, tokens

    def data(self) -> Tensor:
        if self.tokens is not None:
            return torch.randint(self.tokens, self.shape)
        return torch.randn(self.shape).to(next(p.dtype for p in self.parameters() if p.is_floating_point()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        logits = y.reshape(y.shape[0], -1)
        return {"logits": logits, "loss": (logits - 1).pow(2).mean()}


def descend(net: Any, *inner: str) -> Step:
    """A noisy gradient step on all parameters that are trained. inner: further layers whose output is told."""
    with catching(net, "layer", *inner) as caught:
        answer = net(net.data())
    x, y = caught["layer"]
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    *gradients, delta = torch.autograd.grad(answer["loss"], [*trained, y])
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            noise = gradient.abs().mean() * torch.randn(gradient.shape).to(gradient.dtype)
            parameter -= 3.0 * (gradient + noise)
    linear = x.is_floating_point() and x.shape[:-1] == delta.shape[:-1]
    factors = {"layer": product(delta, x)} if linear else {}
    return Step(net, answer["logits"].detach(), factors, {site: wide(y) for site, (_, y) in caught.items()})


# -- the kinds of layers, in each dtype -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), Conv1D(6, 8)], ids=repr)
def test_linear_layers(tmp_path: Path, layer: nn.Module, dtype: torch.dtype) -> None:
    run, loop = watch(tmp_path, lambda: Net(copy.deepcopy(layer)).to(dtype), descend, LAYER)
    conv1d = isinstance(layer, Conv1D)
    assert run.manifest["site_details"]["layer"]["kind"] == ("conv1d" if conv1d else "linear")
    assert_weights_read(run, loop, "layer")
    assert_gradients_read(run, loop, "layer", transposed=conv1d)
    assert_outputs_read(run, loop, "layer", sequence=True)
    bits = np.log2(torch.finfo(dtype).max) - np.log2([np.abs(w).max() for w in loop.weights["layer"]])
    close(run, "weight.headroom_bits", "layer", bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(tmp_path: Path, dtype: torch.dtype) -> None:
    run, loop = watch(tmp_path, lambda: Net(nn.Embedding(20, 8), (2, 5), tokens=20).to(dtype), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    assert not read_at(run, "layer", "gradient.", "activation.dead_share", "feedback.share")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {"layer.bias": lambda model: model.layer.bias}
    run, loop = watch(tmp_path, lambda: Net(nn.Linear(8, 6)).to(dtype), descend, read)
    assert_weights_read(run, loop, "layer.bias")
    assert not read_at(run, "layer.bias", "gradient.", "activation.", "weight.spectral", "weight.stable_rank")


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=repr)
def test_normalisation(tmp_path: Path, norm: nn.Module) -> None:
    run, loop = watch(tmp_path, lambda: Net(copy.deepcopy(norm)), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    assert not read_at(run, "layer", "gradient.", "weight.spectral", "weight.stable_rank")


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(3, 4, 3), (2, 3, 6, 6)), (nn.Conv1d(3, 4, 3), (2, 3, 7))], ids=["4-d", "3-d"]
)
def test_convolution(tmp_path: Path, layer: nn.Module, shape: tuple[int, ...]) -> None:
    run, loop = watch(tmp_path, lambda: Net(copy.deepcopy(layer), shape), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=False)
    assert not read_at(run, "layer", "gradient.")


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 4000), (4000, 2)], ids=str)
def test_very_small_and_very_flat_matrices(tmp_path: Path, size: tuple[int, int]) -> None:
    run, loop = watch(tmp_path, lambda: Net(nn.Linear(*size), (2, 3, size[0])), descend, LAYER)
    assert_weights_read(run, loop, "layer")
    assert_gradients_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)


class Scales(nn.Module):
    """Parameters with no or one entry to a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.zero_d = nn.Parameter(torch.tensor(1.5))
        self.single = nn.Parameter(torch.tensor([0.5]))
        self.cube = nn.Parameter(torch.full((1, 1, 1), -0.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.zero_d + self.single - self.cube


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_a_single_entry(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {f"layer.{name}": lambda model, name=name: getattr(model.layer, name) for name in ("zero_d", "single")}
    read = {**read, "layer.cube": lambda model: model.layer.cube}
    run, loop = watch(tmp_path, lambda: Net(Scales()).to(dtype), descend, read)
    for site in read:
        assert_weights_read(run, loop, site)
        assert not read_at(run, site, "gradient.", "activation.")


def strided_linear(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(8, 6).to(dtype)
    layer.weight = nn.Parameter(torch.randn(8, 6, dtype=dtype).T)
    layer.bias = nn.Parameter(torch.randn(12, dtype=dtype)[::2])
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_contiguous(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {**LAYER, "layer.bias": lambda model: model.layer.bias}
    run, loop = watch(tmp_path, lambda: Net(strided_linear(dtype)), descend, read)
    assert_weights_read(run, loop, "layer")
    assert_weights_read(run, loop, "layer.bias")
    assert_gradients_read(run, loop, "layer")
    assert [edit.outcome for edit in run.edits[1:]] == ["committed"] * 3


def packed_linear(dtype: torch.dtype) -> nn.Linear:
    """All in one buffer, as flattened parameters are, and so at odd places in it."""
    layer, buffer = nn.Linear(8, 6).to(dtype), torch.randn(1 + 48 + 6, dtype=dtype)
    layer.weight = nn.Parameter(buffer[1:49].view(6, 8))
    layer.bias = nn.Parameter(buffer[49:])
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_at_odd_places_of_one_buffer(tmp_path: Path, dtype: torch.dtype) -> None:
    read: Read = {**LAYER, "layer.bias": lambda model: model.layer.bias}
    run, loop = watch(tmp_path, lambda: Net(packed_linear(dtype)), descend, read)
    assert_weights_read(run, loop, "layer")
    assert_weights_read(run, loop, "layer.bias")


# -- the ways to write a weight ---------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Several wide layers, so that most of them are not read in full after an edit that seems to leave them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(100, 64, bias=False) for _ in range(4))


STACK: Read = {f"layers.{at}": lambda model, at=at: model.layers[at].weight for at in range(4)}


def replace_parameter(layer: nn.Module, new: Tensor) -> None:
    layer.weight = nn.Parameter(new)


def data_is(layer: nn.Module, new: Tensor) -> None:
    layer.weight.data = new


def data_copy(layer: nn.Module, new: Tensor) -> None:
    layer.weight.data.copy_(new)


def data_add(layer: nn.Module, new: Tensor) -> None:
    layer.weight.data += new - layer.weight.data


def in_place(layer: nn.Module, new: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(new)


def dense(weight: Tensor, _: int) -> Tensor:
    return weight + 0.1 * torch.outer(*map(torch.randn, weight.shape))


def one_row(weight: Tensor, edit: int) -> Tensor:
    new = weight.clone()
    new[5 + edit] += torch.randn(weight.shape[1])
    return new


def one_column(weight: Tensor, edit: int) -> Tensor:
    new = weight.clone()
    new[:, 95 + edit] += torch.randn(weight.shape[0])
    return new


@pytest.mark.parametrize("how", [dense, one_row, one_column], ids=lambda how: how.__name__)
@pytest.mark.parametrize(
    "write", [replace_parameter, data_is, data_copy, data_add, in_place], ids=lambda write: write.__name__
)
def test_each_way_to_write_a_weight(tmp_path: Path, write: Callable[..., None], how: Callable[..., Tensor]) -> None:
    edits = iter([*range(5)] * 2)

    def edit(model: Any) -> Step:
        layer, at = model.layers[2], next(edits)
        write(layer, how(layer.weight.detach(), at))
        return Step(model, layer(torch.randn(2, 100)).detach())

    run, loop = watch(tmp_path, Stack, edit, STACK, edits=5)
    for site in STACK:
        assert_weights_read(run, loop, site)


def test_a_row_that_was_written_through_data_is_seen_at_once_whichever_it_is(tmp_path: Path) -> None:
    """In-place writes through .data leave no trace in the version counter."""
    edits = iter([*range(64)] * 2)

    def edit(model: Any) -> Step:
        model.layers[1].weight.data[next(edits)] += 1.0
        return Step(model, torch.zeros(1))

    run, _ = watch(tmp_path, Stack, edit, STACK, edits=64)
    close(run, "update.norm", "layers.1", [0.0, *[10.0] * 64])
    close(run, "drift.norm", "layers.1", np.sqrt(100.0 * np.arange(65)))


def test_a_model_that_is_cast_between_edits(tmp_path: Path) -> None:
    read: Read = {**LAYER, "layer.bias": lambda model: model.layer.bias}
    dtypes = (torch.float32, torch.float16, torch.float64, torch.bfloat16)

    def cast(net: Any) -> None:
        net.to(dtypes[dtypes.index(net.layer.weight.dtype) + 1])

    batch = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
    run, loop = watch(
        tmp_path,
        lambda: Net(nn.Linear(8, 6)),
        descend,
        read,
        edits=4,
        between=cast,
        canary=lambda model: model(batch.to(model.layer.weight.dtype)),
    )
    assert_weights_read(run, loop, "layer")
    assert_weights_read(run, loop, "layer.bias")
    assert_gradients_read(run, loop, "layer")
    assert_outputs_read(run, loop, "layer", sequence=True)
    largest = [torch.finfo(dtype).max for dtype in dtypes]
    bits = np.log2(largest) - np.log2([np.abs(w).max() for w in loop.weights["layer"][1:]])
    close(run, "weight.headroom_bits", "layer", [*run.series("weight.headroom_bits", "layer")[:1], *bits])
    assert run.present("canary.kl").all()


# -- adapters ---------------------------------------------------------------------------------------------------------


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


# -- real language models ---------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=12, resid_pdrop=0.1, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).train()


def llama() -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=40,
        max_position_embeddings=12,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def factors_of(model: Any, ids: Tensor, sites: tuple[str, ...]) -> tuple[Any, dict[str, Array], list[Tensor]]:
    """(the answer, [out, in] gradient of each linear layer by its own input and output, those of all parameters)."""
    with catching(model, *sites) as caught:
        answer = model(input_ids=ids, labels=ids)
    parameters = list(model.parameters())
    found = torch.autograd.grad(answer.loss, [*parameters, *(y for _, y in caught.values())])
    deltas = zip(caught.items(), found[len(parameters) :], strict=True)
    factors = {site: product(delta, x) for (site, (x, _)), delta in deltas}
    return answer, factors, list(found[: len(parameters)])


def fine_tune(model: Any, sites: tuple[str, ...]) -> Step:
    """A step on all parameters."""
    answer, factors, gradients = factors_of(model, torch.randint(40, (2, 7)), sites)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.5 * gradient
    return Step(model, answer.logits.detach(), factors)


def reads(*names: str) -> Read:
    """Each parameter as its site: the layer of a weight, the parameter itself else."""
    return {name.removesuffix(".weight"): lambda model, name=name: model.get_parameter(name) for name in names}


def test_gpt2_with_its_embedding_watched_under_both_names(tmp_path: Path) -> None:
    block = "transformer.h.0"
    linear = (f"{block}.attn.c_attn", f"{block}.mlp.c_fc", "lm_head")
    read = reads(
        "transformer.wte.weight",
        f"{block}.ln_1.weight",
        f"{block}.attn.c_attn.weight",
        f"{block}.mlp.c_fc.weight",
        f"{block}.mlp.c_fc.bias",
        "lm_head.weight",
    )
    patterns = ["*.wte", "lm_head", "*.c_attn", "*.c_fc", "*.c_fc.bias", "*.ln_1"]
    run, loop = watch(tmp_path, gpt2, lambda model: fine_tune(model, linear), read, sites=patterns)
    assert run.manifest["sites"] == list(read)
    for site in read:
        assert_weights_read(run, loop, site)
    for site in linear:
        assert_gradients_read(run, loop, site, transposed=site != "lm_head")
    np.testing.assert_array_equal(run.series("drift.norm", "lm_head"), run.series("drift.norm", "transformer.wte"))
    assert not read_at(run, "transformer.wte", "gradient.")


def test_llama_with_its_embedding_watched_under_both_names(tmp_path: Path) -> None:
    linear = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head")
    read = reads(
        "model.embed_tokens.weight", *(f"{site}.weight" for site in linear[:2]), "model.norm.weight", "lm_head.weight"
    )
    patterns = ["*.embed_tokens", "lm_head", "*.q_proj", "*.down_proj", "model.norm"]
    run, loop = watch(tmp_path, llama, lambda model: fine_tune(model, linear), read, sites=patterns)
    assert run.manifest["sites"] == list(read)
    for site in read:
        assert_weights_read(run, loop, site)
    for site in linear:
        assert_gradients_read(run, loop, site)


def test_the_feedback_share_of_a_tied_weight_is_that_of_the_layer(tmp_path: Path) -> None:
    """The original weights are those of all sites, an embedding's too, and the gradient that of the head alone."""
    originals: dict[int, Any] = {}
    shares: list[float | None] = [None]

    def edit(model: Any) -> Step:
        original = originals.setdefault(id(model), copy.deepcopy(model))
        state = torch.get_rng_state()
        _, before, _ = factors_of(original, torch.randint(40, (2, 7)), ("lm_head",))
        torch.set_rng_state(state)
        step = fine_tune(model, ("lm_head",))
        shares.append(1 - float(np.linalg.norm(before["lm_head"]) / np.linalg.norm(step.gradients["lm_head"])))
        return step

    run, _ = watch(tmp_path, lambda: gpt2().eval(), edit, reads("lm_head.weight"), sites="*")
    close(run, "feedback.share", "lm_head", [None, *shares[4:]], rtol=1e-3, atol=1e-6)


# -- what can't be measured -------------------------------------------------------------------------------------------


class Int8Params(nn.Parameter):
    """As bitsandbytes has it: a parameter that holds int8, and never requires a gradient."""

    def __new__(cls, data: Tensor) -> Int8Params:
        return torch.Tensor._make_subclass(cls, data, False)  # type: ignore[return-value]


class Params4bit(Int8Params):
    """Two values to a byte, in one column."""


class Bitsandbytes(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Gptq(nn.Module):
    """No parameter at all: buffers with packed integers and their scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 8, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales.float()


class Sealed(nn.Module):
    """A backend that shows no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def int8_linear() -> nn.Module:
    return Bitsandbytes(Int8Params(torch.ones(8, 8, dtype=torch.int8)))


def four_bit_linear() -> nn.Module:
    return Bitsandbytes(Params4bit(torch.ones(32, 1, dtype=torch.uint8)))


def float8_linear() -> nn.Module:
    return Bitsandbytes(nn.Parameter(torch.ones(8, 8).to(torch.float8_e4m3fn), requires_grad=False))


def dynamic_linear() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and still in use
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))[0]


class Offloaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x


class TwoLayers(Net):
    """The layer in question, and one that can be measured."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__(nn.Linear(8, 6))
        self.other = other

    def data(self) -> Tensor:
        return torch.randn(2, 5, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(self.other(x))


_META = "its values are on the meta device (offloaded?): what an edit writes there is lost; load it to a device"
_FLOATS = "not one of float16, bfloat16, float32, float64 (quantised?)"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (int8_linear, f"its dtype is int8, {_FLOATS}"),
        (four_bit_linear, f"its dtype is uint8, {_FLOATS}"),
        (float8_linear, f"its dtype is float8_e4m3fn, {_FLOATS}"),
        (Gptq, f"its dtype is int32, {_FLOATS}"),
        (dynamic_linear, f"its dtype is qint8, {_FLOATS}"),
        (Offloaded, _META),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weight_that_can_not_be_measured_is_named_with_the_reason(
    tmp_path: Path, other: Callable[[], nn.Module], reason: str
) -> None:
    def train(net: Any) -> Step:
        for parameter in net.other.parameters():
            parameter.requires_grad_(False)
        return descend(net)

    run, loop = watch(tmp_path, lambda: TwoLayers(other()), train, LAYER, sites=["layer", "other"])
    assert skipped(run) == {"other": reason}
    assert run.manifest["sites"] == ["layer"]
    assert_weights_read(run, loop, "layer")
    with pytest.raises(SiteError) as caught:
        sl.attach(TwoLayers(other()), "oth*r", tmp_path / "none")
    assert str(caught.value) == f"none of the 1 matching sites can be measured; 'other': {reason}"
    assert not (tmp_path / "none").exists()


def test_a_layer_that_shows_no_tensor_is_told_apart_from_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"matches 'other', a Sealed that has no parameter \(quantised\?\); expected a"):
        sl.attach(TwoLayers(Sealed()), "other", tmp_path / "run")


class Wrapped(Tensor):
    """A tensor that is made of others, as torchao's quantised and PyTorch's sharded ones are."""

    @staticmethod
    def __new__(cls, packed: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Wrapped:
        return Wrapped(inner["packed"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Wrapped(args[0].packed) if func is torch.ops.aten.detach.default else NotImplemented


def test_a_weight_that_is_made_of_other_tensors_is_skipped(tmp_path: Path) -> None:
    model = make_model()
    model[0].weight = nn.Parameter(Wrapped(torch.ones(16, 8, dtype=torch.int8)), requires_grad=False)
    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        assert monitor.sites == ("3",)
    assert skipped(sl.load(tmp_path / "run")) == {
        "0": "it is a Wrapped, whose values are not held in one plain tensor (quantised? sharded?)"
    }


@pytest.mark.parametrize("becomes", [torch.int8, "meta"], ids=str)
def test_a_weight_that_is_quantised_or_offloaded_during_the_run_is_named_and_comes_back(
    tmp_path: Path, becomes: Any
) -> None:
    kept: list[Tensor] = []

    def edit(net: Any) -> Step:
        weight = net.other.weight
        if weight.is_meta or not weight.is_floating_point():
            net.other.weight = nn.Parameter(kept.pop(), requires_grad=False)
        elif not net.went:
            net.went = True
            kept.append(weight.data)
            net.other.weight = nn.Parameter(weight.data.to(becomes), requires_grad=False)
        return descend(net)

    def make() -> nn.Module:
        net = TwoLayers(Offloaded())
        net.went = False
        net.other.weight = nn.Parameter(torch.full((8, 8), 2.0), requires_grad=False)
        return net

    run, loop = watch(tmp_path, make, edit, LAYER, sites=["layer", "other"])
    reason = "its values are on the meta device" if becomes == "meta" else "its dtype is int8"
    assert skipped(run)["other"].startswith(reason)
    assert run.present("weight.norm", "other").tolist() == [True, False, True, True]
    assert run.series("drift.norm", "other")[2] == 0
    assert_weights_read(run, loop, "layer")
