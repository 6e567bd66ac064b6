"""A language of facts and language models that know it: three layers, trained in about two seconds.

A sentence is ``<s> filler… subject relation value``: 96 facts, each a value for a subject and a relation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stabilitylab.editors.base import Batch, Example, Located, Part

Family = Literal["llama", "gpt2"]
FAMILIES: Final[tuple[Family, ...]] = ("llama", "gpt2")

PAD, START = 0, 1
FILLERS: Final = range(2, 10)
SUBJECTS: Final = range(10, 34)
RELATIONS: Final = range(34, 38)
VALUES: Final = range(38, 62)
WORDS: Final = 62
EDITED: Final = range(10, 26)
"""Subjects that edits are about; the canary asks about the others."""
_WIDTH, _LAYERS, _STEPS = 32, 3, 220
_MODELS = 3
"""Of each family and part, see `number_of`."""
HELD_OUT_SEEDS: Final = 1000
"""From here on a seed is held out: tuning uses smaller ones only, which never choose the models that these choose."""
_IGNORED = -100


@dataclass(frozen=True)
class Fact:
    """A sentence: subject, relation and value are words' numbers; before: the fillers in front."""

    subject: int
    relation: int
    value: int
    before: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """In a few words."""
        return f"subject {self.subject}, relation {self.relation} → {self.value}"


def true_value(subject: int, relation: int) -> int:
    """What the language says."""
    return int(VALUES[(5 * subject + 7 * relation + subject * relation) % len(VALUES)])


def stream(seed: int, n: int) -> list[Fact]:
    """`n` facts with wrong values. After the first 64 the same questions come again, with other answers."""
    rng = np.random.default_rng([seed, 7])
    found: list[Fact] = []
    while len(found) < n:
        for place in rng.permutation(len(EDITED) * len(RELATIONS)):
            subject, relation = EDITED[int(place) // len(RELATIONS)], RELATIONS[int(place) % len(RELATIONS)]
            right = true_value(subject, relation)
            wrong = int(rng.choice([value for value in VALUES if value != right]))
            found.append(Fact(subject, relation, wrong))
    return found[:n]


def batch(facts: Sequence[Fact], *, answered: bool) -> dict[str, Tensor]:
    """The sentences as arguments of a model, left-padded; with labels at the values where they are `answered`."""
    rows = [[START, *fact.before, fact.subject, fact.relation, *([fact.value] if answered else [])] for fact in facts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if answered:
        found["labels"] = torch.full_like(ids, _IGNORED)
        found["labels"][:, -1] = ids[:, -1]
    return found


def canary() -> dict[str, Tensor]:
    """Sixteen questions about subjects that are never edited."""
    others = [subject for subject in SUBJECTS if subject not in EDITED]
    return batch([Fact(s, r, true_value(s, r)) for s in others for r in list(RELATIONS)[:2]], answered=False)


class WordPrompts:
    """`Prompts` of this language."""

    def edit_batch(self, request: Fact) -> Batch:
        """One row, with the value as label."""
        return batch([request], answered=True)

    def located(self, request: Fact) -> Located:
        """The sentence, bare and behind fillers; the place is the subject."""
        befores: tuple[tuple[int, ...], ...] = ((), (3,), (5, 8), (9, 2, 6))
        rows = batch(
            [Fact(request.subject, request.relation, request.value, before) for before in befores], answered=True
        )
        return Located(rows, torch.full((len(befores),), rows["input_ids"].shape[1] - 3))

    def examples(self, seed: int, part: Part = "train") -> Iterator[Example]:
        """None: no editor is trained on this language."""
        return iter(())

    def texts(self) -> Iterator[Batch]:
        """All facts, behind fillers."""
        rng = np.random.default_rng(11)
        for _ in range(20):
            yield batch(_sentences(rng), answered=False)


def _sentences(rng: np.random.Generator) -> list[Fact]:
    lengths = rng.integers(0, 4, size=len(SUBJECTS) * len(RELATIONS))
    pairs = [(subject, relation) for subject in SUBJECTS for relation in RELATIONS]
    return [
        Fact(subject, relation, true_value(subject, relation), tuple(int(w) for w in rng.choice(FILLERS, size=length)))
        for (subject, relation), length in zip(pairs, lengths, strict=True)
    ]


def _untrained(family: Family, width: int, layers: int) -> nn.Module:
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                pad_token_id=PAD,
                bos_token_id=START,
                eos_token_id=None,
                use_cache=False,
                initializer_range=0.1,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=32,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=None,
            use_cache=False,
            initializer_range=0.1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


@cache
def _trained(family: Family, number: int, width: int, layers: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + number)
        model = _untrained(family, width, layers)
        rng = np.random.default_rng(number)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        for step in range(_STEPS):
            for group in adam.param_groups:
                group["lr"] = 1e-2 * min(1.0, (step + 1) / 20, (_STEPS - step) / (_STEPS / 2))
            loss = model(**batch(_sentences(rng), answered=True)).loss
            adam.zero_grad()
            loss.backward()
            adam.step()
    return model.eval().requires_grad_(False)


def number_of(seed: int, which: int) -> int:
    """The number of one of three models, chosen by `which`: of three others where the seed is held out."""
    return which % _MODELS + (_MODELS if seed >= HELD_OUT_SEEDS else 0)


def model_of(family: Family, number: int = 0, *, width: int = _WIDTH, layers: int = _LAYERS) -> Any:
    """A trained model, float32, in eval mode: a new object each time.

    number: which of several, up to you. width, layers: of the decoder; the width a multiple of 8.
    """
    return copy.deepcopy(_trained(family, number, width, layers))


def knows(model: nn.Module) -> float:
    """Share of all true facts that the model answers."""
    rng = np.random.default_rng(0)
    facts = _sentences(rng)
    with torch.no_grad():
        said = model(**batch(facts, answered=False)).logits[:, -1].argmax(-1)
    return float((said == torch.tensor([fact.value for fact in facts])).double().mean())
