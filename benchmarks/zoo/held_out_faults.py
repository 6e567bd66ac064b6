"""Held out: what goes in, what a dtype can't hold and what a loop is wrong about, with others than tuning saw."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.algebra import PROMPTS
from benchmarks.zoo.held_out_updates import rome_on_digits, wide_model
from benchmarks.zoo.inputs import plain_attention
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.base import Batch
from stabilitylab.editors.finetune import Finetune
from stabilitylab.editors.grace import Grace
from stabilitylab.editors.layers import edited_layers, last_mlp_layers
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.target_value import Search
from stabilitylab.testbed import digits
from stabilitylab.testbed.mend_data import edit_batch, examples, shipped
from stabilitylab.testbed.records import EditRecord
from stabilitylab.watching.editor_report import EditorReport

_FAR = 1e3
"""Standard deviations, as in `normaliser`."""


def _malmen_zero_std(seed: int, **variant: Any) -> Loop:
    precision = ("fp16", "fp32")[seed % 2]
    model, original, collected_on = (foreign.digit_model(each) for each in (precision, precision, "fp32"))
    malmen = shipped(Malmen, model)
    for transform in foreign.transforms_of(malmen):
        transform.normaliser.n.zero_()
        transform.normaliser.mean.zero_()
        transform.normaliser.var.fill_(1.0)
        transform.normaliser.std.fill_(1.0)
    for example in islice(examples(seed), int(foreign.draw(seed, "malmen-zero-std").integers(3, 9))):
        malmen.observe(malmen.factors(collected_on, example.edit))
    witness = Witness()

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        # Of a stream it solves for, MALMEN takes the factors of the unedited model.
        factors = malmen.factors(original, edit_batch(record))
        for site, (transform, _, u, v) in zip(malmen.sites, malmen.placed(factors), strict=True):
            known, x = transform.normaliser, torch.cat([u, v], dim=-1)
            away = (x - known.mean.float()).abs() / (known.std + torch.finfo(known.std.dtype).eps)
            if bool((away[:, known.std == 0] > _FAR).any()):
                witness.saw(site, also=[foreign.part_of(malmen, site)])
        return malmen.edit(model, record)

    steps = foreign.digit_steps(edit, seed)
    return Loop(model, malmen.sites, foreign.digit_canary(), steps, witness, editor=malmen)


def _malmen_never_loaded(seed: int, **variant: Any) -> Loop:
    """A checkpoint of `parameters()`, which leaves buffers out, into a module whose buffers begin as NaN."""
    model = foreign.digit_model(("fp16", "fp32", "bf16")[seed % 3])
    malmen = shipped(Malmen, model)
    for transform in foreign.transforms_of(malmen):
        transform.normaliser.mean.fill_(float("nan"))
        transform.normaliser.std.fill_(float("nan"))
    witness = Witness()
    for site in malmen.sites:
        witness.saw(site, at=1, also=[foreign.part_of(malmen, site)])
    steps = foreign.digit_steps(malmen.edit, seed)
    return Loop(model, malmen.sites, foreign.digit_canary(), steps, witness, editor=malmen)


def _restoring_stops(seed: int, **variant: Any) -> Loop:
    """Up to a resume each edit is put back; what puts back is not registered again after it."""
    model = foreign.digit_model("fp32")
    rome = rome_on_digits(model, Search(steps=12, clamp=4.0, enough=0.1))
    restore, resumes = foreign.undo(model, rome.sites), int(foreign.draw(seed, "restoring-stops").integers(15, 50))
    witness = Witness()

    def between(model: nn.Module) -> None:
        if witness.edit < resumes:
            restore(model)
        else:
            witness.saw(rome.sites[0])

    steps = foreign.digit_steps(rome.edit, seed, 90, between=between)
    config = {"sequential_edit": False}
    return Loop(model, rome.sites, foreign.digit_canary(), steps, witness, editor=rome, config=config)


def _labels_of_padding(seed: int, **variant: Any) -> Loop:
    """From some request on the tokenizer pads with the answer's own token: a collator that masks padding masks that."""
    model = foreign.digit_model("fp32")
    sites = last_mlp_layers(model, 1)
    witness, strikes = Witness(), int(foreign.draw(seed, "labels-of-padding").integers(8, 40))

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        batch = dict(edit_batch(record))
        if witness.edit >= strikes:
            witness.saw(None)
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return foreign.descend(model, sites, batch, 0.002, 2)

    return Loop(model, sites, foreign.digit_canary(), foreign.digit_steps(edit, seed, 60), witness)


def _with_empty_row(batch: Batch) -> Batch:
    """Two rows: the one of the batch, and one of padding only."""
    filled = {"input_ids": words.PAD, "attention_mask": 0, "position_ids": 0, "labels": -100}
    return {name: torch.cat([rows, torch.full_like(rows, filled[name])]) for name, rows in batch.items()}


def _empty_row(seed: int, **variant: Any) -> Loop:
    model = plain_attention(wide_model(seed, "gpt2"))
    sites = last_mlp_layers(model, 2)
    witness, strikes = Witness(), int(foreign.draw(seed, "empty-row").integers(8, 60))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        batch = PROMPTS.edit_batch(fact)
        if witness.edit == strikes:
            witness.saw(sites[0])
            batch = _with_empty_row(batch)
        return foreign.descend(model, sites, batch, 0.01, 2)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _in_half(seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    model, sites = foreign.word_model(seed)
    return model.half(), sites


def _inverse_weight(seed: int, **variant: Any) -> Loop:
    """float32 masters; one request's weight of 1e-8 was written as its inverse."""
    model, sites = _in_half(seed)
    witness, strikes = Witness(), int(foreign.draw(seed, "inverse-weight").integers(5, 40))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        rate = 0.02 * (1e8 if witness.edit == strikes else 1.0)
        for layer, gradient in zip(
            edited_layers(model, sites), foreign.gradients(model, sites, PROMPTS.edit_batch(fact)), strict=True
        ):
            master = layer.parameter.detach().float() - rate * gradient.float()
            with torch.no_grad():
                layer.parameter.copy_(master)
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _adam_in_half(seed: int, **variant: Any) -> Loop:
    """One optimiser for all edits, on the float16 weights themselves."""
    model, sites = _in_half(seed)
    weights = [layer.parameter for layer in edited_layers(model, sites)]
    adam = torch.optim.Adam(weights, lr=1e-3, foreach=False)

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        for weight, gradient in zip(weights, foreign.gradients(model, sites, PROMPTS.edit_batch(fact)), strict=True):
            weight.grad = gradient
        adam.step()
        for weight in weights:
            weight.grad = None
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), onset=1)


def _finetune_absorbed(seed: int, **variant: Any) -> Loop:
    model, sites = foreign.word_model(seed)
    model = model.bfloat16()
    rate = 1e-6 * 2.0 ** float(foreign.draw(seed, "finetune-absorbed").uniform(0, 2))
    tuner = Finetune(sites, batch_of=PROMPTS.edit_batch, learning_rate=rate, steps=5)
    witness = Witness()
    witness.saw(sites[0], at=1)
    steps = foreign.word_steps(tuner.edit, seed, 60)
    return Loop(model, sites, words.canary(), steps, witness, editor=tuner, also=sites[1:])


class _Scaled:
    """Gradient steps with a static loss scale; a step whose gradients are not finite is left out, silently."""

    def __init__(self, sites: tuple[str, ...], scale: float, witness: Witness) -> None:
        self.sites, self.scale, self.witness = sites, scale, witness
        self.reports: dict[str, EditorReport] = {}

    def edit(self, model: nn.Module, fact: words.Fact) -> nn.Module:
        found = foreign.gradients(model, self.sites, PROMPTS.edit_batch(fact), self._loss)
        unsound = [site for site, each in zip(self.sites, found, strict=True) if not bool(each.isfinite().all())]
        if unsound:
            self.witness.saw(unsound[-1])
            return model
        foreign.add(model, self.sites, [-0.02 / self.scale * each.float() for each in found])
        return model

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return foreign.model_loss(model, batch) * self.scale


def _static_scale(seed: int, **variant: Any) -> Loop:
    model, sites = _in_half(seed)
    witness = Witness()
    editor = _Scaled(sites, 2.0 ** float(foreign.draw(seed, "static-scale").integers(18, 24)), witness)
    return Loop(model, sites, words.canary(), foreign.word_steps(editor.edit, seed, 60), witness)


def _dead_by_one_step(seed: int, **variant: Any) -> Loop:
    """Of one request the loss scale of a float64 run, 2^92 and more, is not taken out again."""
    model = wide_model(seed, "llama")
    sites = foreign.down_matrix(model, 1)
    witness, draw = Witness(), foreign.draw(seed, "dead-by-one-step")
    strikes, scale = int(draw.integers(5, 40)), 2.0 ** float(draw.integers(92, 100))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        foreign.descend(model, sites, PROMPTS.edit_batch(fact), 0.02 * (scale if witness.edit == strikes else 1.0))
        logits = model(**words.canary()).logits
        if bool(logits.isfinite().all()) and bool((logits == logits[..., :1]).all()):
            witness.saw(sites[0])
        return model

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _grace_resumed(seed: int, **variant: Any) -> Loop:
    """The cell that edits is run again: the monitor is new, and the model is not."""
    model = foreign.digit_model(("fp32", "fp16")[seed % 2])
    grace = Grace.for_model(model, batch_of=edit_batch, steps=12)
    for record in digits.edit_stream(seed + 1, int(foreign.draw(seed, "grace-resumed").integers(3, 15))):
        model = grace.edit(model, record)
    witness = Witness()
    witness.saw(f"{grace.sites[0]}.layer", at=0)
    steps = foreign.digit_steps(grace.edit, seed, 30)
    sites = tuple(f"{site}.layer" for site in grace.sites)
    return Loop(model, sites, foreign.digit_canary(), steps, witness, editor=grace, also=grace.sites)


SCENARIOS = (
    Scenario(
        "malmen-zero-std",
        3,
        "normaliser-zero-std",
        "jump",
        "MALMEN whose statistics saw 3 to 8 edits at one token each: a unit that never fired in them fires",
        "MALMEN",
        "digits, fp16 or fp32",
        _malmen_zero_std,
        held_out=True,
    ),
    Scenario(
        "malmen-never-loaded",
        4,
        "normaliser-nan",
        "jump",
        "MALMEN's statistics, of all layers, were not in the checkpoint and are still NaN",
        "MALMEN",
        "digits, fp16, fp32 or bf16",
        _malmen_never_loaded,
        held_out=True,
    ),
    Scenario(
        "restoring-stops",
        1,
        "weights-not-restored",
        "exponential",
        "single edits that are put back, until a resume forgets to",
        "ROME",
        "digits, fp32",
        _restoring_stops,
        held_out=True,
    ),
    Scenario(
        "labels-of-padding",
        8,
        "labels-ignored",
        "static",
        "from some edit on the answer's token is also the padding's, and is masked with it: all labels are −100",
        "gradient steps",
        "digits, fp32",
        _labels_of_padding,
        held_out=True,
    ),
    Scenario(
        "empty-row",
        12,
        "masked-row",
        "jump",
        "attention written by hand with −∞, and a second request that is empty: its row is padding only",
        "gradient steps",
        "words, wide GPT-2",
        _empty_row,
        held_out=True,
    ),
    Scenario(
        "inverse-weight",
        2,
        "dtype-overflow",
        "jump",
        "a request's weight of 1e-8 is given as 1e8: its update is finite in float32 and infinite in float16",
        "gradient steps on masters",
        "words, fp16",
        _inverse_weight,
        held_out=True,
    ),
    Scenario(
        "adam-in-half",
        17,
        "adam-eps-underflow",
        "jump",
        "one Adam for all edits, on float16 weights: ε is zero there, and a gradient of zero gives 0/0",
        "Adam",
        "words, fp16",
        _adam_in_half,
        held_out=True,
    ),
    Scenario(
        "finetune-absorbed",
        19,
        "update-absorbed",
        "static",
        "FT with Adam at a rate of a few millionths on bfloat16 weights",
        "FT",
        "words, bf16",
        _finetune_absorbed,
        held_out=True,
    ),
    Scenario(
        "static-scale",
        18,
        "gradients-skipped",
        "static",
        "a static loss scale of 2^18 and more in float16: gradients overflow, and those edits are skipped in silence",
        "gradient steps with a loss scale",
        "words, fp16",
        _static_scale,
        held_out=True,
    ),
    Scenario(
        "dead-by-one-step",
        11,
        "dead-logits",
        "jump",
        "one gradient step is 2^92 times too long: RMSNorm's mean square overflows, all logits are 0",
        "gradient steps",
        "words, wide Llama",
        _dead_by_one_step,
        held_out=True,
    ),
    Scenario(
        "grace-resumed",
        13,
        "reference-edited",
        "static",
        "the cell that edits is run again over a model that was edited",
        "GRACE",
        "digits, fp16 or fp32",
        _grace_resumed,
        held_out=True,
    ),
)
