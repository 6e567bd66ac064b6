"""The testbed of a causal language model: SmolLM2, or any local folder; facts are edited into it and asked about."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch, Example, Located, Part, Progress
from stabilitylab.errors import RecordError, UsageError
from stabilitylab.reports.text import shorten
from stabilitylab.testbed import facts, smollm2
from stabilitylab.testbed.bed import SCORES, Outcomes
from stabilitylab.testbed.counterfact import Fact, load_facts
from stabilitylab.testbed.local_models import load_folder

SMOLLM2 = "smollm2"
TEXTS = Path(__file__).parent / "texts"
PROSE = TEXTS / "prose.txt"
"""Ordinary text, written for this package: what second moments are estimated from."""
CANARY_TEXT = TEXTS / "canary.txt"
"""Other ordinary text: what the perplexity is of."""
PREFIXES = (
    "The weather stayed mild that year. ",
    "As many readers will know, ",
    "It was reported last week that ",
)
"""What stands before a prompt in the further rows of `CausalBed.located`: a value that is to hold in any context must
not be fitted to one (Meng et al., arXiv 2202.05262, section 3.1, who sample such beginnings from the model)."""
CANARY = (
    "The sky on a clear day is",
    "Water boils at a temperature of one hundred",
    "A week has seven",
    "The opposite of hot is",
    "Bees fly from flower to flower to collect",
    "The first month of the year is",
    "Cats and dogs are kept as",
    "To open a locked door, you need a",
    "Two plus two is",
    "The sun rises in the",
    "Bread is baked in an",
    "Fish breathe with their",
    "At night we can see the moon and the",
    "A triangle has three",
    "The heart pumps",
    "In winter, lakes are covered with",
)
ROWS, TOKENS = 4, 128
"""Rows of a batch of ordinary text, and tokens of each row."""
CANARY_TOKENS = 224
"""Of each row of the canary text."""
ENOUGH_TO_SHARE = 300
"""A file of so many facts or more is also trained on: a third of its subjects are kept out of every stream."""
OTHER_FACTS = 2
"""Prompts of other facts that a training example keeps, besides the locality prompt."""
NO_ANSWER = -1
"""Stands for a token whose logits are not all finite; it equals no token."""
_TOKENS_AT_ONCE = 512
"""Larger batches were slower on a CPU: their logits alone take 200 kB a token at 49,152 words."""
_IGNORED = -100
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Row:
    """A row of tokens of which the last `answers` are an answer; 0: the token after the last is asked for."""

    ids: tuple[int, ...]
    answers: int

    @property
    def places(self) -> range:
        """Positions whose logits predict the answer."""
        last = len(self.ids) - 1
        return range(last - self.answers, last) if self.answers else range(last, last + 1)


class CausalBed:
    """`Testbed` of a causal language model. Requests are `Fact`s."""

    def __init__(
        self,
        name: str,
        load: Callable[[], tuple[nn.Module, Any]],
        *,
        data: Path | None = None,
        text: Path | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            name: what to call it.
            load: gives the unedited model in eval mode, a new one each time, and its tokenizer: a fast one, which knows
                the characters of each token.
            data: a file of facts, see `load_facts`; by default the package's own, `facts.fact_stream`.
            text: UTF-8 text for second moments; by default the package's own.
            about: further entries of `describe`.

        Raises:
            RecordError: `data` does not have the layout that it should have, or holds no record.
            UsageError: `text` can't be read or holds no word.
        """
        self.name = name
        self.shipped: Path | None = None
        self._load = load
        self.data, self.text = data, PROSE if text is None else text
        self._streamed, self._learned = _shared_out(data) if data is not None else ([], {})
        prose, canary = _words(self.text), _words(CANARY_TEXT)
        # What the user gave is sound: only now comes what takes time.
        first, self.tokenizer = load()
        self._loaded: nn.Module | None = first
        self._takes_positions = "position_ids" in inspect.signature(first.forward).parameters
        longest = _longest(first)
        self._text = _chunks(self._encode(prose)[0], min(TOKENS, longest))
        self._canary_text = _chunks(self._encode(canary)[0], min(CANARY_TOKENS, longest))
        self._expect_room(longest)
        self._about = dict(about or {})

    @classmethod
    def smollm2(
        cls,
        precision: str = "fp32",
        *,
        data: Path | None = None,
        text: Path | None = None,
        progress: Progress | None = None,
    ) -> CausalBed:
        """SmolLM2-135M-Instruct; the first call converts it, see `smollm2.load`."""
        about = {"precision": precision}
        return cls(SMOLLM2, lambda: smollm2.load(precision, progress=progress), data=data, text=text, about=about)

    @classmethod
    def from_folder(
        cls, folder: str | Path, precision: str = "fp32", *, data: Path | None = None, text: Path | None = None
    ) -> CausalBed:
        """The model in a local folder, see `local_models.load_folder`."""
        about = {"precision": precision, "folder": str(Path(folder).resolve())}
        name = Path(folder).resolve().name
        return cls(name, lambda: load_folder(folder, precision), data=data, text=text, about=about)

    def load(self) -> nn.Module:
        """The unedited model: a new object each time."""
        model, self._loaded = self._loaded, None
        return self._load()[0] if model is None else model

    def describe(self) -> dict[str, Any]:
        """Name, precision, and which facts and text, by path and content."""
        named = {"data": self.data, "text": None if self.text == PROSE else self.text}
        found: dict[str, Any] = {"model": self.name, **self._about}
        for what, path in named.items():
            found[what] = None if path is None else str(path)
            if path is not None:
                found[f"{what}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return found

    def stream(self, seed: int, n: int) -> list[Fact]:
        """Held-out facts of the package, or facts of the file in an order that the seed gives."""
        if self.data is None:
            return facts.fact_stream(seed, n)
        if n > len(self._streamed):
            more = sum(map(len, self._learned.values()))
            kept = f" ({more} more are kept to train editors on)" if more else ""
            raise UsageError(f"{n} edits were asked for; '{self.data}' holds {len(self._streamed)} facts{kept}")
        order = list(self._streamed)
        random.Random(f"stream {seed}").shuffle(order)
        return order[:n]

    def label(self, request: Fact) -> str:
        """``prompt → target``."""
        return f"{request.prompt} → {request.target_new}"

    def edit_batch(self, request: Fact) -> Batch:
        """The prompt and the wanted answer in one row, with labels at the answer's tokens."""
        return self._labelled([self._answered(request.prompt, request.target_new)])

    def located(self, request: Fact) -> Located:
        """The prompt alone and behind each of `PREFIXES`; without a subject the place is the prompt's last token."""
        rows, places = [], []
        for prefix in ("", *PREFIXES):
            row = self._answered(prefix + request.prompt, request.target_new)
            rows.append(row)
            if request.subject is None:
                places.append(len(row.ids) - row.answers - 1)
            else:
                end = len(prefix) + _end_of(request.subject, request.prompt)
                places.append(self._token_before(f"{prefix}{request.prompt} {request.target_new}", end))
        batch, subject = self._labelled(rows), torch.tensor(places)
        if request.subject is None:
            return Located(batch, subject)
        essence = f"{request.subject} is a"
        kept = torch.tensor([self._token_before(essence, len(request.subject))])
        return Located(batch, subject, self._batch([self._asked(essence)], "right"), kept)

    def learned_from(self) -> str:
        """A digest of the text and of the facts to train on, not of where they lie."""
        known = repr([self._text, sorted(self._learned.items()), self._streamed])
        own = "" if self._learned else repr(facts.TABLES)
        return hashlib.sha256((known + own).encode()).hexdigest()

    def examples(self, seed: int, part: Part = "train") -> Iterator[Example]:
        """Facts about subjects that no stream holds; kept are the locality prompt and prompts of other facts."""
        rng = random.Random(f"examples {part} {seed}")
        prompts = self._others(part)
        others = rng.sample(prompts, len(prompts))
        for place, fact in enumerate(self._training(seed, part)):
            row = self._answered(fact.prompt, fact.target_new)
            wanted = [self._asked(prompt) for prompt in (fact.prompt, fact.rephrase_prompt) if prompt]
            further = [others[(OTHER_FACTS * place + i) % len(others)] for i in range(OTHER_FACTS)]
            kept = [prompt for prompt in (fact.locality_prompt, *further) if prompt and prompt != fact.prompt]
            first = row.ids[len(row.ids) - row.answers]
            yield Example(
                self._labelled([row]),
                self._batch([*wanted, *map(self._asked, kept)], "left"),
                torch.full((len(wanted),), first),
            )

    def texts(self) -> Iterator[Batch]:
        """The text in rows of `TOKENS` tokens, `ROWS` at a time, until it ends."""
        for start in range(0, len(self._text), ROWS):
            yield self._batch([Row(ids, 0) for ids in self._text[start : start + ROWS]], "right")

    def canary(self) -> Batch:
        """The sixteen beginnings of `CANARY`, left-padded."""
        return self._batch([self._asked(prompt) for prompt in CANARY], "left")

    def originals(self, model: nn.Module, requests: Sequence[Fact]) -> Originals:
        """What the unedited `model` answers."""
        return Originals(self, model, requests)

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        """exp of the mean negative log likelihood per token of the package's canary text; NaN when a logit is none."""
        losses = []
        for ids in self._canary_text:
            logits = model(**self._batch([Row(ids, 0)], "right")).logits[0, :-1]
            if not logits.isfinite().all():
                return float("nan")
            losses.append(nn.functional.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none"))
        return float(torch.cat(losses).mean().exp())

    @torch.no_grad()
    def answers(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """For each row the likeliest token at each of its `places`, `NO_ANSWER` where a logit is NaN or infinite."""
        found: dict[int, Tensor] = {}
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        while by_length:
            # The longest first: a batch too large for the memory shows at once.
            at_once = max(1, _TOKENS_AT_ONCE // len(rows[by_length[-1]].ids))
            by_length, part = by_length[:-at_once], by_length[-at_once:]
            logits = model(**self._batch([rows[index] for index in part], "right")).logits
            for place, index in enumerate(part):
                asked = logits[place, list(rows[index].places)]
                found[index] = torch.where(asked.isfinite().all(-1), asked.argmax(-1), NO_ANSWER)
        return [found[index] for index in range(len(rows))]

    def _answered(self, prompt: str, answer: str | None) -> Row:
        """`prompt`, a space and `answer`; tokens with a character behind the prompt are the answer."""
        if answer is None:
            return self._asked(prompt)
        ids, spans = self._encode(f"{prompt} {answer}")
        return Row(ids, sum(end > len(prompt) for _, end in spans))

    def _asked(self, prompt: str) -> Row:
        return Row(self._encode(prompt)[0], 0)

    def _encode(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Tokens of a text, and from where to where in it each goes; without the special tokens that end a text."""
        found = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
        ids, spans = found["input_ids"], [(int(start), int(end)) for start, end in found["offset_mapping"]]
        used = len(ids)
        while used and found["special_tokens_mask"][used - 1]:
            used -= 1
        return tuple(ids[:used]), spans[:used]

    def _token_before(self, text: str, end: int) -> int:
        """The position of the last token that holds a byte of the character before `end`."""
        spans = self._encode(text)[1]
        return max(place for place, (start, stop) in enumerate(spans) if start < end <= stop)

    def _batch(self, rows: Sequence[Row], side: Side) -> dict[str, Tensor]:
        """Rows padded on one side, with a mask; left-padded ones with positions too, where the model takes them."""
        ids = torch.full((len(rows), max(len(row.ids) for row in rows)), self._padding())
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            span = slice(-len(row.ids), None) if side == "left" else slice(len(row.ids))
            ids[place, span] = torch.tensor(row.ids)
            mask[place, span] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if side == "left" and self._takes_positions:
            # A model with absolute positions would else see a padded row as a later part of some text.
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch

    def _labelled(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self._batch(rows, "right")
        labels = torch.full_like(batch["input_ids"], _IGNORED)
        for place, row in enumerate(rows):
            answer = slice(len(row.ids) - row.answers, len(row.ids))
            labels[place, answer] = torch.tensor(row.ids[answer])
        return {**batch, "labels": labels}

    def _padding(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _training(self, seed: int, part: Part) -> Iterator[Fact]:
        if not self._learned:
            yield from (fact for fact in facts.facts_to_train_on(seed, part) if not self._is_streamed(fact))
        rng, order = random.Random(f"{part} {seed}"), list(self._learned[part])
        while True:
            rng.shuffle(order)
            yield from order

    def _others(self, part: Part) -> list[str]:
        """Prompts of the facts of one part."""
        if self._learned:
            return [fact.prompt for fact in self._learned[part]]
        own = facts.fact_stream(0, facts.available(part), part)
        return [fact.prompt for fact in own if not self._is_streamed(fact)]

    def _expect_room(self, longest: int) -> None:
        """Each fact of the file must fit into a row behind the longest prefix."""
        for fact in self._streamed:
            for prompt, answer in ((fact.prompt, fact.target_new), (fact.rephrase_prompt, fact.target_new)):
                tokens = len(self._encode(f"{max(PREFIXES, key=len)}{prompt} {answer}")[0]) if prompt else 0
                if tokens > longest:
                    raise UsageError(
                        f"'{self.data}': {shorten(fact.prompt, 60)!r} and its prefix have {tokens} tokens; "
                        f"the model takes {longest}"
                    )

    def _is_streamed(self, fact: Fact) -> bool:
        assert fact.subject is not None
        return any(fact.subject in (other.subject or other.prompt) for other in self._streamed)


class Originals:
    """What the unedited model says where nothing should change, at each place of the answer that is on record."""

    def __init__(self, bed: CausalBed, model: nn.Module, requests: Sequence[Fact]) -> None:
        self._bed = bed
        self._wanted: dict[str, list[Row | None]] = {
            "efficacy": [bed._answered(fact.prompt, fact.target_new) for fact in requests],
            "rephrase": [
                bed._answered(fact.rephrase_prompt, fact.target_new) if fact.rephrase_prompt else None
                for fact in requests
            ],
        }
        subjects = {fact.subject for fact in requests if fact.subject}
        self._kept = [
            bed._answered(fact.locality_prompt, fact.locality_ground_truth)
            # What the stream itself asks to change need not stay.
            if fact.locality_prompt and not any(subject in fact.locality_prompt for subject in subjects)
            else None
            for fact in requests
        ]
        asked = [row for row in self._kept if row is not None]
        answers = iter(bed.answers(model, asked))
        self._before = [None if row is None else next(answers) for row in self._kept]

    def outcomes(self, model: nn.Module, indices: Sequence[int]) -> Outcomes:
        """float64 [len(indices), 5], see `bed.SCORES`; teacher-forced: each token follows the right ones before it.

        An edit holds when every token of the wanted answer is the likeliest; something is preserved when, at each place
        of the answer on record, the likeliest token is the one of the unedited model.
        """
        found = torch.full((len(indices), len(SCORES)), float("nan"), dtype=torch.float64)
        asked: list[tuple[int, int, Row, Tensor]] = []
        for place, index in enumerate(indices):
            for score, rows in self._wanted.items():
                row = rows[index]
                if row is not None:
                    asked.append((place, SCORES.index(score), row, torch.tensor(row.ids[-row.answers :])))
            row, before = self._kept[index], self._before[index]
            if row is not None and before is not None:
                asked.append((place, SCORES.index("text_locality"), row, before))
        answers = self._bed.answers(model, [row for _, _, row, _ in asked])
        for (place, column, _, right), answer in zip(asked, answers, strict=True):
            found[place, column] = float(bool(((answer == right) & (answer != NO_ANSWER)).all()))
        return found


def _shared_out(path: Path) -> tuple[list[Fact], dict[Part, list[Fact]]]:
    """The facts of a file for streams, and those to train on and to validate with; no subject is in two of the three.

    Of facts with the same prompt only the first counts: MMEdit asks the same question about several pictures, and
    without the pictures its answers contradict one another.
    """
    found = list({fact.prompt: fact for fact in reversed(load_facts(path))}.values())[::-1]
    if not found:
        raise RecordError(f"{path}: holds no record")
    if len(found) < ENOUGH_TO_SHARE:
        return found, {}
    subjects = sorted({fact.subject or fact.prompt for fact in found})
    random.Random(0).shuffle(subjects)
    third = len(subjects) // 3
    validated, trained = set(subjects[: third // 5]), set(subjects[third // 5 : third])
    streamed: list[Fact] = []
    learned: dict[Part, list[Fact]] = {"train": [], "validation": []}
    for fact in found:
        subject = fact.subject or fact.prompt
        part = learned["validation"] if subject in validated else learned["train"] if subject in trained else streamed
        part.append(fact)
    return streamed, learned


def _longest(model: nn.Module) -> int:
    """How many tokens a row may have; 2^31 where nothing limits it."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 1 << 31


def _words(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or error
        raise UsageError(f"{path}: can't be read as text ({why})") from None
    if not text.strip():
        raise UsageError(f"{path} holds no word; expected ordinary text, some thousand words of it")
    return text


def _chunks(ids: tuple[int, ...], length: int) -> list[tuple[int, ...]]:
    """Whole rows of `length` tokens; all there is when it is less."""
    whole = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return whole or [ids]


def _end_of(subject: str, prompt: str) -> int:
    """Where in the prompt the subject ends: as a word of its own if it is there as one."""
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    return found.end() if found else prompt.index(subject) + len(subject)
