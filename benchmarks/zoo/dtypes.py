"""What a dtype can't hold: infinity, an epsilon, a small step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import foreign, words
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.finetune import Finetune
from stabilitylab.editors.layers import edited_layers, last_mlp_layers
from stabilitylab.testbed.mend_data import edit_batch
from stabilitylab.testbed.records import EditRecord
from stabilitylab.watching.editor_report import EditorReport


def _fp16_overflow(seed: int, **variant: Any) -> Loop:
    """float32 masters are stepped with a scaled loss's gradient; once the unscaling is forgotten."""
    model = foreign.digit_model("fp16")
    sites = last_mlp_layers(model, 2)
    witness, draw = Witness(), foreign.draw(seed, "fp16-overflow")
    strikes = int(draw.integers(5, 40))
    scale = 2.0**24

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        layers = edited_layers(model, sites)
        masters = [layer.parameter.float() for layer in layers]
        undone = 1.0 if witness.edit == strikes else scale  # the path of that request lacks `scaler.unscale_`
        rate = 0.01
        for place, gradient in enumerate(foreign.gradients(model, sites, edit_batch(record))):
            masters[place] -= rate / undone * (scale * gradient.float())
        with torch.no_grad():
            for layer, master in zip(layers, masters, strict=True):
                layer.parameter.copy_(master)
        return model

    return Loop(model, sites, foreign.digit_canary(), foreign.digit_steps(edit, seed), witness)


def _adam_eps(seed: int, **variant: Any) -> Loop:
    """Adam on the float16 weights themselves: its epsilon of 1e-8 is zero there."""
    model = foreign.digit_model("fp16")
    sites = last_mlp_layers(model, 1 + seed % 2)

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        weights = [layer.parameter for layer in edited_layers(model, sites)]
        adam = torch.optim.Adam(weights, lr=1e-3, foreach=False)
        for _ in range(2):
            for weight, gradient in zip(weights, foreign.gradients(model, sites, edit_batch(record)), strict=True):
                weight.grad = gradient
            adam.step()
        for weight in weights:
            weight.grad = None
        return model

    witness = Witness()
    return Loop(model, sites, foreign.digit_canary(), foreign.digit_steps(edit, seed), witness, onset=1)


class _Absorbed:
    """FT in bfloat16 without masters; it reports what it meant to add."""

    def __init__(self, sites: tuple[str, ...], rate: float) -> None:
        self.sites, self.rate = sites, rate
        self.reports: dict[str, EditorReport] = {}

    def edit(self, model: nn.Module, record: EditRecord) -> nn.Module:
        found = foreign.gradients(model, self.sites, edit_batch(record))
        updates = [-self.rate * gradient.float().sign() for gradient in found]
        foreign.add(model, self.sites, updates)
        self.reports = {site: EditorReport(update=u) for site, u in zip(self.sites, updates, strict=True)}
        return model


def _bf16_absorbed(seed: int, **variant: Any) -> Loop:
    model = foreign.digit_model("bf16")
    sites = last_mlp_layers(model, 1)
    editor = _Absorbed(sites, rate=1e-6 * 2.0 ** float(foreign.draw(seed, "bf16-absorbed").uniform(0, 2)))
    witness = Witness()
    witness.saw(sites[0], at=1)
    steps = foreign.digit_steps(editor.edit, seed, 60)
    return Loop(model, sites, foreign.digit_canary(), steps, witness, editor=editor)


def _skipped(seed: int, **variant: Any) -> Loop:
    """A loss scale that doubles after every sound step and is never backed off; unsound steps are skipped, silently."""
    model = foreign.digit_model("fp16")
    sites = last_mlp_layers(model, 2)
    witness = Witness()
    scale = [2.0 ** float(foreign.draw(seed, "skipped").integers(2, 8))]

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        def scaled(model: nn.Module, batch: Any) -> Tensor:
            # The gradient is float16 from the logits on: it is there that the scale overflows.
            found: Tensor = foreign.model_loss(model, batch) * scale[0]
            return found

        found = foreign.gradients(model, sites, edit_batch(record), scaled)
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            witness.saw(next(s for s, g in reversed(list(zip(sites, found, strict=True))) if not g.isfinite().all()))
            return model
        foreign.add(model, sites, [-0.02 / scale[0] * gradient.float() for gradient in found])
        scale[0] *= 2.0
        return model

    steps = foreign.digit_steps(edit, seed, 60)
    return Loop(model, sites, foreign.digit_canary(), steps, witness, onset=1)


def _dead_logits(seed: int, **variant: Any) -> Loop:
    """One request's own rate has lost the minus of its exponent: 1e19. RMSNorm divides by the root of infinity."""
    model: nn.Module = words.model_of("llama", words.number_of(seed, seed))
    sites = foreign.down_matrix(model, 2)
    witness, draw = Witness(), foreign.draw(seed, "dead-logits")
    strikes, rate = int(draw.integers(5, 40)), 10.0 ** float(draw.uniform(19, 22))
    calm = Finetune(sites, batch_of=words.WordPrompts().edit_batch, learning_rate=1e-3, steps=3)
    wild = Finetune(sites, batch_of=words.WordPrompts().edit_batch, learning_rate=rate, steps=3)

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        edited = (wild if witness.edit == strikes else calm).edit(model, fact)
        logits = edited(**words.canary()).logits
        if bool(logits.isfinite().all()) and bool((logits == logits[..., :1]).all()):
            witness.saw(sites[0])
        return edited

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


SCENARIOS = (
    Scenario(
        "fp16-overflow",
        2,
        "dtype-overflow",
        "jump",
        "an update that float32 masters hold is infinite once it is cast to the weight's float16",
        "gradient steps on masters",
        "digits, fp16",
        _fp16_overflow,
    ),
    Scenario(
        "adam-eps-fp16",
        17,
        "adam-eps-underflow",
        "jump",
        "Adam without masters on float16 weights: ε and the squared gradients are zero, its step is 0/0 or x/0",
        "FT",
        "digits, fp16",
        _adam_eps,
    ),
    Scenario(
        "bf16-absorption",
        19,
        "update-absorbed",
        "static",
        "steps of a few millionths on bfloat16 weights are rounded away: the edits are lost",
        "signed gradient steps",
        "digits, bf16",
        _bf16_absorbed,
    ),
    Scenario(
        "gradients-skipped",
        18,
        "gradients-skipped",
        "static",
        "a loss scale that only grows: from some edit on the gradients overflow, and the step is skipped in silence",
        "gradient steps with a loss scale",
        "digits, fp16",
        _skipped,
    ),
    Scenario(
        "dead-logits",
        11,
        "dead-logits",
        "jump",
        "one edit's rate of about 1e19: the square of the hidden state overflows inside RMSNorm, all logits are 0",
        "FT",
        "words, Llama",
        _dead_logits,
    ),
)
