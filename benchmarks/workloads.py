"""What is edited in the benchmark: each workload builds one model and hands out twins of it, each with its own edit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stabilitylab.editors.mend import Mend
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.mend_data import shipped
from stabilitylab.watching.monitor import Monitor

CONTROL = ("a_a", "light", "default", "whole")
TIERS = (*CONTROL, "deep")
CHEAP = (*TIERS, "canary", "tracer", "floor", "set_detect_anomaly")
COSTLY = ("debug_underflow_overflow", "tensorboard_histograms", "svdvals_loop", "wandb_watch", "weightwatcher")
EVERYTHING = (*CHEAP, *COSTLY)
TRACED = ("bare", "bare_armed", "bare_traced", "bare_ranges", "traced")
POSSIBLE = (*EVERYTHING, *TRACED)

_RATE = 1e-4
_CANARY_SHAPE = (4, 16)  # rows x positions


def _nothing() -> None:
    """After an edit that nobody evaluates."""


@dataclass(frozen=True)
class Subject:
    """One model with the edit that moves it. Its edited weights are its own; all others are shared with its twins."""

    model: nn.Module
    sites: tuple[str, ...]
    """Names of the edited layers."""
    edit: Callable[[], Sequence[Tensor]]
    """One edit in place; returns the last gradient of each edited weight (nothing where the editor makes none)."""
    canary: Tensor | Mapping[str, Any]
    editor: object | None = None
    evaluate: Callable[[], object] = _nothing
    """What the loop does after each edit, watched or not."""
    host: Callable[..., AbstractContextManager[Monitor]] | None = None
    """What watches it, given options of `attach`, where `edit` is a host's own loop, which opens its edits itself."""

    def round(self) -> Sequence[Tensor]:
        """One edit, and what comes after it; returns what the edit does."""
        gradients = self.edit()
        self.evaluate()
        return gradients

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The edited weight of each site."""
        return {site: weight_of(self.model, site) for site in self.sites}


@dataclass(frozen=True)
class Workload:
    """One model, one kind of edit. says: both in a line. seconds: wall time to spend on pairs before giving up on the
    wished-for interval. variants: those measured unless others are asked for. possible: those that can be asked for.
    start: from a seed, builds the model and returns what makes twins of it.
    """

    name: str
    says: str
    seconds: float
    start: Callable[[int], Callable[[], Subject]]
    variants: tuple[str, ...]
    possible: tuple[str, ...] = POSSIBLE


def weight_of(model: nn.Module, site: str) -> nn.Parameter:
    weight = model.get_submodule(site).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def twin(model: nn.Module, sites: Sequence[str]) -> nn.Module:
    """A copy with edited weights of its own. A monitor would notice, and pay for, weights that another edit moved."""
    own = {id(weight_of(model, site)) for site in sites}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own}
    return copy.deepcopy(model, shared)


def fine_tuning_edit(model: nn.Module, weights: Sequence[nn.Parameter], ids: Tensor, steps: int) -> list[Tensor]:
    """`steps` steps of forward, backward and SGD in place; returns the last gradients."""
    gradients: Sequence[Tensor] = ()
    for _ in range(steps):
        gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=_RATE)
    return list(gradients)


def language_model(
    build: Callable[[], nn.Module], sites: tuple[str, ...], shape: tuple[int, int], steps: int, seed: int
) -> Callable[[], Subject]:
    """Twins of a causal language model with random weights. shape: rows x positions of the edit's batch."""
    torch.manual_seed(seed)
    model = build().eval().requires_grad_(False)
    for site in sites:
        weight_of(model, site).requires_grad_(True)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids, canary = (torch.randint(0, vocabulary, size) for size in (shape, _CANARY_SHAPE))

    def make() -> Subject:
        own = twin(model, sites)
        weights = [weight_of(own, site) for site in sites]
        return Subject(own, sites, partial(fine_tuning_edit, own, weights, ids, steps), canary)

    return make


def demo_model(seed: int) -> Callable[[], Subject]:
    """Twins of the demo's BLIP2-OPT, see `demo_subject`."""
    return demo_subject(seed)[0]


def demo_subject(seed: int) -> tuple[Callable[[], Subject], PreTrainedTokenizerFast]:
    """Twins of the demo's BLIP2-OPT, decoder in float16, edited with the shipped MEND; and the model's tokenizer.

    Each edit begins by putting the trained weights back: never restored, the model would be NaN after some 30 edits.
    """
    model, tokenizer = blip2_digits.load()
    sites = shipped(Mend, model).sites
    record = next(iter(digits.edit_stream(seed, 1)))
    canary = blip2_digits.canary(tokenizer)

    def make() -> Subject:
        own = twin(model, sites)
        mend = shipped(Mend, own)
        pairs = [(weight_of(own, site), weight_of(model, site).detach().clone()) for site in sites]

        def edit() -> list[Tensor]:
            with torch.no_grad():
                for weight, trained in pairs:
                    weight.copy_(trained)
            mend.edit(own, record)
            return []

        return Subject(own, sites, edit, canary, mend)

    return make, tokenizer


def gpt2(
    name: str, seconds: float, variants: tuple[str, ...], shape: tuple[int, int] = (4, 32), steps: int = 1
) -> Workload:
    sites = tuple(f"transformer.h.{block}.mlp.{layer}" for block in (9, 10, 11) for layer in ("c_fc", "c_proj"))
    says = f"GPT-2-small shape, {_batch(shape, steps)}; c_fc and c_proj of the last 3 of 12 blocks"
    start = partial(language_model, lambda: GPT2LMHeadModel(GPT2Config()), sites, shape, steps)
    return Workload(name, says, seconds, start, variants)


def llama135m(
    name: str, seconds: float, variants: tuple[str, ...], shape: tuple[int, int] = (4, 32), steps: int = 1
) -> Workload:
    sites = tuple(f"model.layers.{block}.mlp.{layer}" for block in (24, 26, 28) for layer in ("up_proj", "down_proj"))
    says = f"SmolLM2-135M shape, {_batch(shape, steps)}; up_proj and down_proj of 3 late of 30 blocks"
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    start = partial(language_model, lambda: LlamaForCausalLM(config), sites, shape, steps)
    return Workload(name, says, seconds, start, variants)


def demo260k(seconds: float) -> Workload:
    variants = (*TIERS, "canary", "tracer")
    says = "the demo's 260k BLIP2-OPT with MEND: too small for watching to be cheap, shown as what it is"
    return Workload("demo260k", says, seconds, demo_model, variants, (*variants, *TRACED))


def _batch(shape: tuple[int, int], steps: int) -> str:
    tokens = f"{shape[0]}x{shape[1]} tokens"
    return tokens if steps == 1 else f"{tokens}, {steps} gradient steps an edit"


# An edit of t1024 and ft25 takes 4 to 5 s, so only what fits into some minutes is measured unless asked for: what deep
# adds (its spectra, each tenth edit) doesn't depend on T and is to be seen in the others.
WORKLOADS: tuple[Workload, ...] = (
    gpt2("gpt2", 170, EVERYTHING),
    gpt2("gpt2_t32", 80, CHEAP, (1, 32)),
    gpt2("gpt2_t256", 100, TIERS, (2, 128)),
    gpt2("gpt2_t1024", 150, CONTROL, (4, 256)),
    gpt2("gpt2_ft25", 140, CONTROL, (4, 8), steps=25),
    llama135m("llama135m", 160, EVERYTHING),
    llama135m("llama135m_t32", 80, CHEAP, (1, 32)),
    llama135m("llama135m_t256", 100, TIERS, (2, 128)),
    llama135m("llama135m_t1024", 150, CONTROL, (4, 256)),
    demo260k(30),
)
