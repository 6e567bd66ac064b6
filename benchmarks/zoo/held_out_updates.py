"""Held out: how updates are made and how they add up, by other editors, models and parameters than tuning saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.algebra import PROMPTS, SEARCH
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.alphaedit import AlphaEdit
from stabilitylab.editors.base import Batch
from stabilitylab.editors.finetune import Finetune
from stabilitylab.editors.layers import edited_layers, last_mlp_layers
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.memit import Memit, Solved
from stabilitylab.editors.rome import Rome
from stabilitylab.editors.target_value import Search
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.mend_data import edit_batch, shipped

_NOISE = 0.5
"""How far a solution in float32 is from the same system's in float64, as a share of that one's norm."""
_WIDE, _DEEP = 48, 4


def wide_model(seed: int, family: words.Family | None = None) -> nn.Module:
    """A language model of 48 units in 4 layers; of the family that the seed gives, if none is given."""
    chosen = family or words.FAMILIES[seed % 2]
    model: nn.Module = words.model_of(chosen, words.number_of(seed, 0), width=_WIDE, layers=_DEEP)
    return model


def rome_on_digits(model: nn.Module, search: Search) -> Rome:
    """A sound ROME that has read the digit model's texts."""
    bed = DigitsBed("fp32")
    rome = Rome.for_model(model, locate=bed.located, search=search)
    rome.prepare(model, bed, seed=0)
    return rome


def _malmen_one_by_one(seed: int, **variant: Any) -> Loop:
    """Each edit's factors are of the model that the edits before left, as in MEND."""
    model = foreign.digit_model(("fp32", "fp16", "bf16")[seed % 3])
    malmen = shipped(Malmen, model, aggregate=False)
    steps = foreign.digit_steps(malmen.edit, seed)
    return Loop(model, malmen.sites, foreign.digit_canary(), steps, onset=1, editor=malmen, to_nonfinite=True)


def _rome_stream(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model("fp32")
    clamp = float(foreign.draw(seed, "rome-stream").uniform(4.0, 8.0))
    rome = rome_on_digits(model, Search(steps=12, clamp=clamp, enough=0.1))
    steps = foreign.digit_steps(rome.edit, seed, 250)
    return Loop(model, rome.sites, foreign.digit_canary(), steps, onset=1, editor=rome)


def _relative_signs(seed: int, **variant: Any) -> Loop:
    """Signed gradient steps, each as long as a share of the norm that the weight has by then."""
    model = wide_model(seed)
    sites = foreign.down_matrix(model, 2)
    share = float(foreign.draw(seed, "relative-signs").uniform(0.07, 0.10))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        signs = foreign.gradients(model, sites, PROMPTS.edit_batch(fact))[0].sign()
        weight = edited_layers(model, sites)[0].parameter.detach()
        foreign.add(model, sites, [-share * weight.norm() / signs.norm() * signs])
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed, 400), onset=1)


def _rate_on_digits(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model("fp32")
    rate = 0.2 * 2.0 ** float(foreign.draw(seed, "rate-on-digits").uniform(0, 2))
    tuner = Finetune(last_mlp_layers(model, 1 + seed % 2), batch_of=edit_batch, learning_rate=rate, steps=10)
    steps = foreign.digit_steps(tuner.edit, seed)
    return Loop(model, tuner.sites, foreign.digit_canary(), steps, onset=1, editor=tuner)


class _FewTexts(words.WordPrompts):
    """Some sentences of three tokens, and no more."""

    def __init__(self, sentences: int) -> None:
        self.sentences = sentences

    def texts(self) -> Iterator[Batch]:
        yield words.batch(words.stream(0, self.sentences), answered=False)


class _HastyMemit(Memit):
    """MEMIT without a ridge, whose solve is float32's."""

    strike: Callable[[str], None]

    def _solve(self, place: int, keys: Tensor, residual: Tensor) -> Solved:
        k1 = keys.float()
        system = self.preservation * len(k1) * self.known().matrices[self.sites[place]] + k1 @ k1.T
        solution = torch.linalg.solve(system, k1)
        # What is left of the right side is small: of many wrong solutions this is one.
        exact = torch.linalg.solve(system.double(), k1.double())
        if float((solution - exact).norm() / exact.norm()) > _NOISE:
            self.strike(self.sites[place])
        return Solved(system, k1, solution, residual @ solution.T.double())


def _memit_singular(seed: int, **variant: Any) -> Loop:
    model = wide_model(seed)
    memit = _HastyMemit.for_model(model, locate=PROMPTS.located, layers=[1, 2], search=SEARCH)
    memit.prepare(model, _FewTexts(6 + seed % 6), seed=0)
    witness = Witness()
    memit.strike = witness.saw
    steps = foreign.word_steps(memit.edit, seed)
    return Loop(model, memit.sites, words.canary(), steps, witness, editor=memit, probes="deep")


def _memit_pinned(seed: int, **variant: Any) -> Loop:
    model = wide_model(seed)
    clamp = float(foreign.draw(seed, "memit-pinned").uniform(0.05, 0.15))
    search = Search(steps=12, clamp=clamp, enough=0.1)
    memit = Memit.for_model(model, locate=PROMPTS.located, layers=[1, 2], search=search)
    memit.prepare(model, PROMPTS, seed=0)
    witness = Witness()
    witness.saw(memit.sites[-1], at=1)  # z is looked for at the last of its layers
    return Loop(model, memit.sites, words.canary(), foreign.word_steps(memit.edit, seed, 25), witness, editor=memit)


def _alphaedit(model: nn.Module, null_share: float) -> AlphaEdit:
    editor = AlphaEdit.for_model(model, locate=PROMPTS.located, layers=[2], search=SEARCH, null_share=null_share)
    editor.prepare(model, PROMPTS, seed=0)
    return editor


def _cache_of_a_sweep(seed: int, **variant: Any) -> Loop:
    """A sweep over seeds restores the weights between its runs, and forgets the cache."""
    model = wide_model(seed)
    editor = _alphaedit(model, 0.1)
    restore = foreign.undo(model, editor.sites)
    for fact in words.stream(seed + 1, int(foreign.draw(seed, "cache-of-a-sweep").integers(5, 60))):
        editor.edit(model, fact)
    restore(model)
    witness = Witness()
    witness.saw(editor.sites[0], at=0, also=[*editor.sites[1:], "editor.cache_c"])
    return Loop(model, editor.sites, words.canary(), foreign.word_steps(editor.edit, seed, 25), witness, editor=editor)


def _wrong_threshold(seed: int, **variant: Any) -> Loop:
    """A threshold that was right for another model: below it are all eigenvalues here, or none."""
    model = wide_model(seed)
    editor = _alphaedit(model, 1.01 if seed // 2 % 2 else 0.0)
    witness = Witness()
    witness.saw(editor.sites[0], at=0, also=[*editor.sites[1:], "editor.P"])
    return Loop(model, editor.sites, words.canary(), foreign.word_steps(editor.edit, seed, 40), witness, editor=editor)


SCENARIOS = (
    Scenario(
        "malmen-one-by-one",
        22,
        "feedback-growth",
        "super-exponential",
        "MALMEN solves for each edit alone, with the factors of the model that it has edited so far",
        "MALMEN",
        "digits, fp32, fp16 or bf16",
        _malmen_one_by_one,
        held_out=True,
    ),
    Scenario(
        "rome-stream",
        21,
        "norm-growth",
        "exponential",
        "ROME at one matrix, edit after edit, with a wide clamp: each is harmless and their sum is not",
        "ROME",
        "digits, fp32",
        _rome_stream,
        held_out=True,
    ),
    Scenario(
        "relative-signs",
        21,
        "norm-growth",
        "exponential",
        "every step is 7% to 10% of the norm that the weight has by then",
        "signed gradient steps",
        "words, wide",
        _relative_signs,
        held_out=True,
    ),
    Scenario(
        "rate-too-high-on-digits",
        20,
        "learning-rate-too-high",
        "jump",
        "FT with Adam at a rate of 0.2 to 0.8",
        "FT",
        "digits, fp32",
        _rate_on_digits,
        held_out=True,
    ),
    Scenario(
        "memit-singular",
        16,
        "singular-solve",
        "jump",
        "MEMIT with second moments of some ten tokens and no ridge, solved in float32",
        "MEMIT, unpadded",
        "words, wide",
        _memit_singular,
        held_out=True,
    ),
    Scenario(
        "memit-pinned",
        10,
        "target-pinned",
        "static",
        "MEMIT whose clamp is too small: z ends on it at every edit",
        "MEMIT",
        "words, wide",
        _memit_pinned,
        held_out=True,
    ),
    Scenario(
        "cache-of-a-sweep",
        14,
        "cache-leaked",
        "static",
        "a sweep puts the weights back between its runs, but not AlphaEdit's cache of keys",
        "AlphaEdit",
        "words, wide",
        _cache_of_a_sweep,
        held_out=True,
    ),
    Scenario(
        "wrong-threshold",
        15,
        "null-space-wrong",
        "static",
        "a null-space threshold of another model: all eigenvalues are below it, or none",
        "AlphaEdit",
        "words, wide",
        _wrong_threshold,
        held_out=True,
    ),
)
