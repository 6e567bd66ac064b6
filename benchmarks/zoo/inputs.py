"""What goes in: masks that leave nothing, labels that say nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from benchmarks.zoo import foreign, words
from benchmarks.zoo.scenario import Loop, Scenario, Witness
from stabilitylab.editors.base import Batch

_RATE, _STEPS = 0.004, 2
_CONTEXT = 5


def _masked_mean(model: nn.Module, batch: Batch) -> Tensor:
    """A user's own loss: the mean over the answer's tokens, by their mask."""
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
    counts = (labels != -100).flatten()
    found: Tensor = (each * counts).sum() / counts.sum()
    return found


def _truncated(fact: words.Fact, long: bool) -> Batch:
    """One row, cut on the right at the context's length: of a long prompt nothing is left of the answer."""
    before = (2, 4, 6, 3) if long else fact.before
    full = words.batch([words.Fact(fact.subject, fact.relation, fact.value, before)], answered=True)
    return {name: value[:, :_CONTEXT] for name, value in full.items()}


def _empty_mask(seed: int, **variant: Any) -> Loop:
    model, sites = foreign.word_model(seed)
    witness, strikes = Witness(), int(foreign.draw(seed, "empty-mask").integers(8, 60))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        batch = _truncated(fact, witness.edit == strikes)
        if not bool((batch["labels"] != -100).any()):
            witness.saw(sites[0])
        return foreign.descend(model, sites, batch, _RATE, _STEPS, _masked_mean)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


def _labels_ignored(seed: int, **variant: Any) -> Loop:
    model, sites = foreign.word_model(seed)
    witness, strikes = Witness(), int(foreign.draw(seed, "labels-ignored").integers(8, 40))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        # From some edit on the requests come with a preamble.
        batch = _truncated(fact, witness.edit >= strikes)
        if not bool((batch["labels"] != -100).any()):
            witness.saw(None)
        return foreign.descend(model, sites, batch, _RATE, _STEPS)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed, 60), witness)


def _plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as one writes it by hand: what is masked gets minus infinity, and a row with nothing left NaN."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask[..., : key.shape[2]] < -1.0, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


_PLAIN = "stabilitylab_zoo_plain"


def plain_attention(model: nn.Module) -> nn.Module:
    """The same model, with attention written by hand."""
    AttentionInterface.register(_PLAIN, _plain_attention)
    AttentionMaskInterface.register(_PLAIN, eager_mask)
    model.set_attn_implementation(_PLAIN)  # type: ignore[operator]
    return model


def _masked_row(seed: int, **variant: Any) -> Loop:
    model, sites = foreign.word_model(seed)
    plain_attention(model)
    witness, strikes = Witness(), int(foreign.draw(seed, "masked-row").integers(8, 60))

    def edit(model: nn.Module, fact: words.Fact) -> nn.Module:
        facts = [fact]
        if witness.edit == strikes:
            witness.saw(sites[0])
            facts.append(words.Fact(fact.subject, fact.relation, fact.value, (3, 5)))
        return foreign.descend(model, sites, words.batch(facts, answered=True), _RATE, _STEPS)

    return Loop(model, sites, words.canary(), foreign.word_steps(edit, seed), witness)


SCENARIOS = (
    Scenario(
        "empty-mask",
        7,
        "loss-not-finite",
        "jump",
        "a long prompt is truncated, no token of the answer is left, and the mean over the mask is 0/0",
        "gradient steps with an own loss",
        "words",
        _empty_mask,
    ),
    Scenario(
        "labels-ignored",
        8,
        "labels-ignored",
        "static",
        "from some edit on all labels are −100: the loss is NaN, the gradients are 0 and the weights stand still",
        "gradient steps",
        "words",
        _labels_ignored,
    ),
    Scenario(
        "masked-row",
        12,
        "masked-row",
        "jump",
        "attention written by hand with −∞: in the first left-padded batch rows see nothing, softmax is NaN",
        "gradient steps",
        "words",
        _masked_row,
    ),
)
