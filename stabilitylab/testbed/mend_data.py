"""The testbed for MEND and MALMEN: the editors that come with the package, batches to edit with, training examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from stabilitylab.editors.base import Example, Part
from stabilitylab.editors.hypernetwork import HypernetworkEditor
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.evaluation import asks
from stabilitylab.testbed.questions import KINDS
from stabilitylab.testbed.records import EditRecord, as_record

H = TypeVar("H", bound=HypernetworkEditor)


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return blip2_digits.tokenizer()


def edit_batch(request: EditRecord | Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's arguments for the edited question with the answer `alt` as label: one row."""
    record = as_record(request)
    return blip2_digits.batch(_tokenizer(), [record.src], [digits.image(record.image)], [record.alt])


def shipped(
    kind: type[H], model: nn.Module, folder: str | PathLike[str] = blip2_digits.CHECKPOINTS, **settings: Any
) -> H:
    """The trained `Mend` or `Malmen` of the digit model, from the package or from another folder.

    settings: further ones of its constructor. Raises as `HypernetworkEditor.load` does.
    """
    return kind.load(model, folder, batch_of=edit_batch, **settings)


def examples(seed: int, part: Part = "train") -> Iterator[Example]:
    """Endless random edits about images of a part: three rows wanted, up to seven kept (images and texts)."""
    rng = np.random.default_rng([seed, {"train": 2, "validation": 3}[part]])
    tokens = _tokenizer()
    numbers, texts = digits.split(part), digits.facts(part)
    while True:
        record = digits.record(rng, numbers, texts)
        asked = asks(record)
        shown = digits.digit_of(record.image)
        drawn = [int(number) for number in rng.choice(np.asarray(numbers), size=6, replace=False)]
        others = [number for number in drawn if digits.digit_of(digits.image_name(number)) != shown][:3]
        for number in others:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            asked.append((kind.phrasings[int(rng.integers(len(kind.phrasings)))], digits.image_name(number)))
        asked += [(texts[int(number)][0], None) for number in rng.integers(len(texts), size=2)]
        images = [None if name is None else digits.image(name) for _, name in asked]
        wanted = torch.tensor([tokens.convert_tokens_to_ids(record.alt)] * 3)
        rows = blip2_digits.batch(tokens, [question for question, _ in asked], images)
        yield Example(edit_batch(record), rows, wanted)
