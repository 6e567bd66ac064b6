"""How good the model and an edit are. Originals always come from the unedited model, stored before any edit.

An answer with a NaN or infinite logit is no answer: it counts neither as a success nor as preserved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.questions import KINDS
from stabilitylab.testbed.records import EditRecord

NO_ANSWER = -1
"""The token number that stands for an answer with non-finite logits; it equals no answer."""
Ask = tuple[str, str | None]
"""A question and the name of its image, or None."""


@dataclass(frozen=True)
class Scores:
    """Shares from 0 to 1 over a set of edits."""

    efficacy: float
    """`src` about `image` is answered with `alt`."""
    rephrase: float
    """`rephrase` about `image` is answered with `alt`."""
    image_rephrase: float
    """`src` about `image_rephrase` is answered with `alt`."""
    text_locality: float
    """The answer to `loc` is the unedited model's."""
    image_locality: float
    """The answer to `m_loc_q` about `m_loc` is the unedited model's."""

    @property
    def locality(self) -> float:
        """The mean of text and image locality."""
        return (self.text_locality + self.image_locality) / 2


@torch.no_grad()
def answers(model: nn.Module, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Ask]) -> Tensor:
    """The token number [N] of each answer, NO_ANSWER where a logit is NaN or infinite."""
    found = []
    for start in range(0, len(asked), 128):
        part = asked[start : start + 128]
        images = [None if name is None else digits.image(name) for _, name in part]
        logits = model(**blip2_digits.batch(tokenizer, [question for question, _ in part], images)).logits[:, -1]
        found.append(torch.where(logits.isfinite().all(-1), logits.argmax(-1), NO_ANSWER))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, part: digits.Split = "held_out") -> float:
    """Share of right answers, every kind of question about every image of a split, phrasings in turn."""
    asked, right = [], []
    for place, number in enumerate(digits.split(part)):
        name = digits.image_name(number)
        for kind in KINDS:
            asked.append((kind.phrasings[place % len(kind.phrasings)], name))
            right.append(kind.answer(digits.digit_of(name)))
    expected = torch.tensor(tokenizer.convert_tokens_to_ids(right))
    return float((answers(model, tokenizer, asked) == expected).float().mean())


def text_accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, part: digits.Split = "held_out") -> float:
    """Share of right answers to the text-only questions of a split."""
    known = digits.facts(part)
    expected = torch.tensor(tokenizer.convert_tokens_to_ids([answer for _, answer in known]))
    return float((answers(model, tokenizer, [(question, None) for question, _ in known]) == expected).float().mean())


def asks(record: EditRecord) -> list[Ask]:
    """The five questions of a record: edited, rephrased, about the rephrased image, text-only, about another image."""
    return [
        (record.src, record.image),
        (record.rephrase, record.image),
        (record.src, record.image_rephrase),
        (record.loc, None),
        (record.m_loc_q, record.m_loc),
    ]


@dataclass(frozen=True)
class Originals:
    """What the unedited model answers to the locality questions of some records."""

    records: tuple[EditRecord, ...]
    kept: Tensor
    """[records, 2]: token numbers of the answers to `loc` and `m_loc_q`."""

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerFast, records: Iterable[EditRecord]) -> Originals:
        """Ask the still unedited `model`."""
        chosen = tuple(records)
        asked = [ask for record in chosen for ask in asks(record)[3:]]
        return cls(chosen, answers(model, tokenizer, asked).reshape(-1, 2))

    def outcome(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, index: int) -> Tensor:
        """bool [5] for record `index` on an edited model, in the order of `Scores`."""
        return self.outcomes(model, tokenizer, [index])[0]

    def outcomes(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, indices: Sequence[int]) -> Tensor:
        """bool [len(indices), 5] on one edited model."""
        chosen = [self.records[index] for index in indices]
        found = answers(model, tokenizer, [ask for record in chosen for ask in asks(record)]).reshape(-1, 5)
        wanted = torch.tensor(tokenizer.convert_tokens_to_ids([record.alt for record in chosen])).unsqueeze(1)
        right = torch.cat([found[:, :3] == wanted, found[:, 3:] == self.kept[list(indices)]], dim=1)
        return right & (found != NO_ANSWER)


def scores(outcomes: Tensor) -> Scores:
    """Shares of bool outcomes [N, 5]; NaN without any."""
    return Scores(*(float(share) for share in outcomes.double().mean(0)))


def single_edits(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[EditRecord],
    edit: Callable[[nn.Module, EditRecord], nn.Module],
) -> Scores:
    """Scores of edits that each start from the unedited `model`, which is left as it was."""
    originals = Originals.of(model, tokenizer, records)
    before = copy.deepcopy(model.state_dict())
    found = []
    for index, record in enumerate(records):
        edited = edit(model, record)
        found.append(originals.outcome(edited, tokenizer, index))
        model.load_state_dict(before)
    return scores(torch.stack(found) if found else torch.zeros(0, 5, dtype=torch.bool))
