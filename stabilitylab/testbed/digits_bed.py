"""The testbed ``blip2-digits``: the small BLIP2-OPT that ships with the package, and edits about pictured digits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stabilitylab.editors.base import Batch, Example, Located, Part
from stabilitylab.errors import RecordError, UsageError
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.bed import SCORES, Outcomes
from stabilitylab.testbed.evaluation import Ask
from stabilitylab.testbed.evaluation import Originals as Answers
from stabilitylab.testbed.mend_data import edit_batch, examples
from stabilitylab.testbed.questions import FACTS, KINDS
from stabilitylab.testbed.records import EditRecord, as_record, load_records

NAME = "blip2-digits"
_PREDICTS = -2
"""The position before the answer in a row with an answer: the last word of the question."""
_MOVED = 4
"""Moved pictures of the edited image that an edit at one token also sees."""
_TEXT_ROWS = 64


class DigitsBed:
    """`Testbed` of the digit model. Requests are `EditRecord`s, or mappings of the same fields."""

    def __init__(self, precision: str = "fp16", data: str | Path | None = None) -> None:
        """
        Args:
            precision: the decoder's, as in `blip2_digits.load`.
            data: a file of records in MMEdit's layout about images of `digits`; by default held-out edits are drawn.

        Raises:
            UsageError: an unknown precision.
            RecordError: `data` can't be read, or a record asks about an image or word that the model doesn't have.
        """
        self.name = NAME
        self.shipped: Path | None = blip2_digits.CHECKPOINTS
        self.precision = precision
        self.data = None if data is None else Path(data)
        self._loaded, self.tokenizer = blip2_digits.load(precision)
        self._records = None if self.data is None else self._checked(self.data)

    def load(self) -> nn.Module:
        """The shipped model, unedited."""
        return blip2_digits.load(self.precision)[0]

    def describe(self) -> dict[str, Any]:
        """Name, precision and source of the records."""
        return {"model": self.name, "precision": self.precision, "data": None if self.data is None else str(self.data)}

    def stream(self, seed: int, n: int) -> list[EditRecord]:
        """Held-out edits (`digits.edit_stream`), or records of the file in an order that the seed gives."""
        if self._records is None:
            return digits.edit_stream(seed, n)
        if n > len(self._records):
            raise UsageError(f"{n} edits were asked for; '{self.data}' holds {len(self._records)} records")
        order = np.random.default_rng(seed).permutation(len(self._records))
        return [self._records[int(place)] for place in order[:n]]

    def label(self, request: Any) -> str:
        """``question → answer``."""
        record = as_record(request)
        return f"{record.src} → {record.alt}"

    def edit_batch(self, request: Any) -> Batch:
        """The question about the picture, with the wanted answer as label."""
        return edit_batch(request)

    def located(self, request: Any) -> Located:
        """The question about the picture and about the same handwriting moved; the place is the question's last word.

        No row is kept: whatever is asked shares that place with the edit.
        """
        record = as_record(request)
        number = int(record.image.removeprefix("digits/").partition("~")[0])
        names = [record.image, *(digits.image_name(number, variant) for variant in range(_MOVED))]
        pictures = [digits.image(name) for name in names if name != record.image_rephrase]
        rows = blip2_digits.batch(self.tokenizer, [record.src] * len(pictures), pictures, [record.alt] * len(pictures))
        width = rows["input_ids"].shape[1]
        return Located(rows, torch.full((len(pictures),), width + _PREDICTS))

    def learned_from(self) -> str:
        """A digest of the words; the pictures are scikit-learn's."""
        return hashlib.sha256(repr((KINDS, FACTS)).encode()).hexdigest()

    def examples(self, seed: int, part: Part = "train") -> Iterator[Example]:
        """Random edits about images of the part."""
        return examples(seed, part)

    def texts(self) -> Iterator[Batch]:
        """Every kind of question about every training image, and the text questions of the training split."""
        asked: list[Ask] = [(question, None) for question, _ in digits.facts("train")]
        for place, number in enumerate(digits.split("train")):
            asked += [(kind.phrasings[place % len(kind.phrasings)], digits.image_name(number)) for kind in KINDS]
        for start in range(0, len(asked), _TEXT_ROWS):
            yield self._rows(asked[start : start + _TEXT_ROWS])

    def canary(self) -> Batch:
        """Sixteen questions of which none is ever edited."""
        return blip2_digits.canary(self.tokenizer)

    def originals(self, model: nn.Module, requests: Sequence[Any]) -> _Originals:
        """What the unedited `model` answers."""
        return _Originals(self, model, [as_record(request) for request in requests])

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        """Of the true answers to a picture of each digit, every kind of question, and to the held-out text questions.

        There is no running text that this model could have learned.
        """
        first = {digits.digit_of(digits.image_name(number)): number for number in reversed(digits.split("validation"))}
        asked: list[Ask] = [(kind.phrasings[0], digits.image_name(n)) for n in first.values() for kind in KINDS]
        right = [kind.answer(digit) for digit in first for kind in KINDS]
        for question, answer in digits.facts("held_out"):
            asked.append((question, None))
            right.append(answer)
        logits = model(**self._rows(asked)).logits[:, -1].double()
        if not bool(logits.isfinite().all()):
            return float("nan")
        wanted = torch.tensor(self.tokenizer.convert_tokens_to_ids(right))
        loss = float(nn.functional.cross_entropy(logits, wanted))
        return math.exp(min(loss, 700.0))

    def _rows(self, asked: Sequence[Ask]) -> dict[str, Any]:
        pictures = [None if name is None else digits.image(name) for _, name in asked]
        return blip2_digits.batch(self.tokenizer, [question for question, _ in asked], pictures)

    def _checked(self, path: Path) -> list[EditRecord]:
        found = load_records(path)
        if not found:
            raise RecordError(f"{path}: holds no record")
        for index, record in enumerate(found):
            for field in ("image", "image_rephrase", "m_loc"):
                try:
                    digits.image(getattr(record, field))
                except UsageError as error:
                    raise RecordError(f"{path}: record {index}, field {field!r}: {error}") from None
            for field in ("src", "rephrase", "alt", "loc", "m_loc_q"):
                if not getattr(record, field).strip():
                    raise RecordError(f"{path}: record {index}, field {field!r}: expected words, found none")
                try:
                    blip2_digits.batch(self.tokenizer, [getattr(record, field)], [None])
                    if field == "alt":
                        edit_batch(record)
                except UsageError as error:
                    raise RecordError(f"{path}: record {index}, field {field!r}: {error}") from None
        return found


class _Originals:
    """The unedited model's answers to the locality questions of a stream."""

    def __init__(self, bed: DigitsBed, model: nn.Module, records: Sequence[EditRecord]) -> None:
        self._tokenizer = bed.tokenizer
        self._answers = Answers.of(model, bed.tokenizer, records)
        edited = {_subject(record.image, record.src) for record in records}
        self._edited = torch.tensor([_subject(record.m_loc, record.m_loc_q) in edited for record in records])

    def outcomes(self, model: nn.Module, indices: Sequence[int]) -> Outcomes:
        """float64 [len(indices), 5], see `bed.SCORES`."""
        found = self._answers.outcomes(model, self._tokenizer, indices).double()
        # What the stream itself asks to change need not stay.
        found[self._edited[list(indices)], SCORES.index("image_locality")] = float("nan")
        return found


def _subject(image: str, question: str) -> tuple[str, str]:
    """What a question is about, whatever its words: the handwriting, and the kind of question."""
    kind = next((kind.name for kind in KINDS if question in kind.phrasings), question)
    return image.partition("~")[0], kind
