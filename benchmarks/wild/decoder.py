"""A tiny decoder that knows 160 made-up facts, trained in some seconds.

A sentence is ``<s> subject relation object``. Seen by a loop it is like any language model: `Output` holds its logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

START, PAD = 0, 1
SUBJECTS, RELATIONS, OBJECTS = 40, 4, 20
WORDS: Final = 2 + SUBJECTS + RELATIONS + OBJECTS + 14
"""The last fourteen words are in no sentence."""
SUBJECT_PLACE: Final = 1
"""Where in a sentence the subject is: at that token the closed-form editors work."""
_WIDTH, _LAYERS, _HEADS, _LENGTH = 48, 2, 4, 12
_STEPS = 500
_IGNORED = -100
_CANARY_ROWS = 24

UPS: Final = ("layers.0.mlp.fc1", "layers.1.mlp.fc1")
DOWNS: Final = ("layers.0.mlp.fc2", "layers.1.mlp.fc2")
MLPS: Final = (UPS[0], DOWNS[0], UPS[1], DOWNS[1])
"""What is edited, in the order of the dataflow."""

Norm = Literal["layer", "rms"]


@dataclass(frozen=True)
class Settings:
    """Of a decoder and its training. norm: of every sublayer. hidden: width of the MLPs. seed: of its first weights."""

    norm: Norm = "layer"
    hidden: int = 96
    weight_decay: float = 0.01
    layers: int = _LAYERS
    seed: int = 0


@dataclass(frozen=True)
class Fact:
    """A sentence, by the numbers of its subject, relation and object."""

    subject: int
    relation: int
    object: int

    @property
    def label(self) -> str:
        """In a few words."""
        return f"subject {self.subject}, relation {self.relation} → {self.object}"

    @property
    def words(self) -> list[int]:
        """The sentence."""
        return [START, subject_word(self.subject), 2 + SUBJECTS + self.relation, object_word(self.object)]


@dataclass(frozen=True, eq=False)
class Output:
    """What the decoder answers. hidden: what enters the head, [rows, tokens, width]. loss: given labels."""

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class RmsNorm(nn.Module):
    """Divides by the root mean square, in float32 as Llama and T5 do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        wide = hidden.float()
        scale = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return self.weight * (wide * scale).to(hidden.dtype)


class Attention(nn.Module):
    """Written out, not fused: what that gives a row that sees nothing depends on the version of torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """mask: added to the scores."""

        def heads(layer: nn.Module) -> Tensor:
            projected: Tensor = layer(hidden)
            return projected.view(*projected.shape[:2], _HEADS, -1).transpose(1, 2)

        query, key = heads(self.query), heads(self.key)
        scores = query @ key.mT * query.shape[-1] ** -0.5 + mask
        mixed: Tensor = self.output((scores.softmax(-1) @ heads(self.value)).transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """Two layers with a ReLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        changed: Tensor = self.fc2(functional.relu(self.fc1(hidden)))
        return changed


class Layer(nn.Module):
    """Attention and an MLP on a residual stream. limit: what the stream is clamped at, as T5 does in float16."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(settings), _norm(settings)
        self.attention = Attention(_WIDTH)
        self.mlp = Mlp(_WIDTH, settings.hidden)
        self.limit: float | None = None

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        hidden = self._limited(hidden + self.attention(self.norm1(hidden), mask))
        return self._limited(hidden + self.mlp(self.norm2(hidden)))

    def _limited(self, hidden: Tensor) -> Tensor:
        return hidden if self.limit is None else hidden.clamp(-self.limit, self.limit)


class Decoder(nn.Module):
    """Made of `Layer`.

    hides_with: what is added to the scores of keys that a token may not see; None for the lowest finite number.
    impossible: words whose logit is −∞ by design.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, _WIDTH)
        self.pos = nn.Embedding(_LENGTH, _WIDTH)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.norm = _norm(settings)
        self.lm_head = nn.Linear(_WIDTH, WORDS, bias=False)
        self.hides_with: float | None = None
        self.impossible: tuple[int, ...] = ()

    @property
    def stack(self) -> list[Layer]:
        """The layers, in the order of the dataflow."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        """labels: -100 where nothing is asked."""
        length = input_ids.shape[1]
        hidden = self.emb(input_ids) + self.pos(torch.arange(length))
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        hides_with = torch.finfo(hidden.dtype).min if self.hides_with is None else self.hides_with
        mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, hides_with)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.norm(hidden)
        logits = self.lm_head(hidden)
        if self.impossible:
            logits = logits.index_fill(-1, torch.tensor(self.impossible), float("-inf"))
        return Output(logits, hidden, None if labels is None else _loss_of(logits, labels))


def _norm(settings: Settings) -> nn.Module:
    return RmsNorm(_WIDTH) if settings.norm == "rms" else nn.LayerNorm(_WIDTH)


def _loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    said, wanted = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(said, wanted, ignore_index=_IGNORED)


# The language.


def subject_word(subject: int) -> int:
    """The word for a subject."""
    return 2 + subject


def object_word(number: int) -> int:
    """The word for an object."""
    return 2 + SUBJECTS + RELATIONS + number


@lru_cache
def true_facts() -> tuple[Fact, ...]:
    """All of them, subject by subject."""
    objects = torch.randint(0, OBJECTS, (SUBJECTS, RELATIONS), generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(Fact(s, r, objects[s][r]) for s in range(SUBJECTS) for r in range(RELATIONS))


def true_object(subject: int, relation: int) -> int:
    """What the language says."""
    return true_facts()[subject * RELATIONS + relation].object


def requests(count: int) -> list[Fact]:
    """Facts with wrong objects, drawn one by one: a question may come again."""
    generator = torch.Generator().manual_seed(100)

    def draw(below: int) -> int:
        return int(torch.randint(0, below, (), generator=generator))

    found = []
    for _ in range(count):
        subject, relation = draw(SUBJECTS), draw(RELATIONS)
        wrong = (true_object(subject, relation) + 1 + draw(OBJECTS - 1)) % OBJECTS
        found.append(Fact(subject, relation, wrong))
    return found


def sentences(facts: Sequence[Fact]) -> Tensor:
    """Word numbers [facts, 4]."""
    return torch.tensor([fact.words for fact in facts])


def questions(facts: Sequence[Fact]) -> Tensor:
    """Word numbers [facts, 3]: the sentences without their objects."""
    return sentences(facts)[:, :-1]


def answer_labels(ids: Tensor) -> Tensor:
    """Labels that ask for the last word of each row."""
    labels = torch.full_like(ids, _IGNORED)
    labels[:, -1] = ids[:, -1]
    return labels


def answered(facts: Sequence[Fact]) -> dict[str, Tensor]:
    """The sentences as arguments of a model, with labels at the objects."""
    ids = sentences(facts)
    return {"input_ids": ids, "labels": answer_labels(ids)}


def canary() -> dict[str, Tensor]:
    """A true sentence about each of the last 24 subjects."""
    subjects = range(SUBJECTS - _CANARY_ROWS, SUBJECTS)
    return {"input_ids": sentences([Fact(s, s % RELATIONS, true_object(s, s % RELATIONS)) for s in subjects])}


@torch.no_grad()
def knows(model: nn.Module) -> float:
    """Share of all true facts that the model answers."""
    facts = true_facts()
    said = model(questions(facts)).logits[:, -1].argmax(-1)
    return float((said == sentences(facts)[:, -1]).double().mean())


# The models.


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state from `seed` inside, and after it as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own."""
    loss: Tensor = model(**batch).loss
    return loss


@lru_cache
def _trained(settings: Settings) -> Decoder:
    with seeded(settings.seed):
        model = Decoder(settings)
    batch = answered(true_facts())
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=settings.weight_decay)
    for _ in range(_STEPS):
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        adam.step()
        adam.zero_grad()
    return model.eval()


def decoder(settings: Settings = Settings(), dtype: torch.dtype = torch.float32) -> Decoder:
    """A trained decoder in eval mode, its parameters without gradients: a new object each time."""
    return copy.deepcopy(_trained(settings)).to(dtype)


@torch.no_grad()
def residual_peaks(model: Decoder, ids: Tensor) -> Tensor:
    """Largest |value| in the residual stream of each row of `ids`: float32 [rows]."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].float().abs().amax((1, 2)))

    norms = [model.norm, *(norm for layer in model.stack for norm in (layer.norm1, layer.norm2))]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).amax(0)


def rescaled(ids: Tensor, peak: float) -> tuple[Decoder, float]:
    """A decoder whose residual stream peaks at `peak` on `ids`, and how many times as large that is as it was.

    The function is the same: only RMSNorm reads the stream.
    """
    model = decoder(Settings(norm="rms"))
    scale = peak / float(residual_peaks(model, ids).max())
    writers = ("emb", "pos", ".attention.output.", ".fc2.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(writers[:2]) or any(writer in name for writer in writers[2:]):
                parameter.mul_(scale)
    return model, scale
