"""The testbed of causal language models: where an answer and a subject are, what is scored, what is trained on."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.errors import RecordError, UsageError
from stabilitylab.testbed import smollm2
from stabilitylab.testbed.bed import SCORES
from stabilitylab.testbed.bed import Testbed as Bed  # pytest takes Test… for a test
from stabilitylab.testbed.causal import CANARY, CANARY_TEXT, CANARY_TOKENS, PREFIXES, PROSE, CausalBed
from stabilitylab.testbed.counterfact import Fact
from tests import tiny_lm

COUNTERFACT = Path(__file__).parents[3] / "shared" / "data" / "counterfact_1000.json"
ODD = Fact(
    "In Ålesund, Zoë Ångström-łaß 🦉 speaks",
    "naïve Ελληνικά",
    subject="Zoë Ångström-łaß 🦉",
    rephrase_prompt="At home she hears",
    locality_prompt="The sun is",
    locality_ground_truth="a star",
)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalBed:
    """GPT-2 has absolute positions and says so; Llama has rotary ones."""
    return CausalBed.from_folder(tiny_lm.folder(tmp_path_factory.mktemp("model") / request.param, request.param))


@pytest.fixture(scope="module")
def model(bed: CausalBed) -> nn.Module:
    return bed.load()


def records(count: int, subjects: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Fact {place} about Person {place % subjects} is",
            "subject": f"Person {place % subjects}",
            "target_new": "new",
            "rephrase_prompt": f"It is told {place} times",
            "locality_prompt": "Another is",
        }
        for place in range(count)
    ]


def with_data(bed: CausalBed, folder: Path, content: Any) -> CausalBed:
    path = folder / "facts.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return CausalBed.from_folder(bed.describe()["folder"], data=path)


def used(batch: Any, row: int) -> list[int]:
    """The tokens of a row, wherever its padding is."""
    ids: list[int] = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    return ids


def test_it_is_a_testbed(bed: CausalBed) -> None:
    as_one: Bed = bed
    assert as_one.shipped is None
    assert json.loads(json.dumps(bed.describe()))["model"] == bed.name


def test_each_model_is_a_new_one_and_unedited(bed: CausalBed) -> None:
    first, second = bed.load(), bed.load()
    assert first is not second
    for mine, yours in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, yours)
        mine.data.fill_(7.0)
        assert not torch.equal(mine, yours)


@pytest.mark.parametrize("fact", [ODD, replace(ODD, subject=None), Fact("What is it?", "2 stars")])
def test_the_labels_are_the_answer_and_nothing_else(bed: CausalBed, fact: Fact) -> None:
    batch = bed.edit_batch(fact)
    assert bed.tokenizer.decode(batch["input_ids"][0]) == f"{fact.prompt} {fact.target_new}"
    labelled = batch["labels"][0] != -100
    assert bed.tokenizer.decode(batch["labels"][0][labelled]) == f" {fact.target_new}"
    assert torch.equal(batch["labels"][0][labelled], batch["input_ids"][0][labelled])
    assert batch["attention_mask"].all()
    assert len(batch["input_ids"]) == 1


@pytest.mark.parametrize("subject", ["Zoë Ångström-łaß 🦉", "Zoë Ångström-ł", "Ål", "Zo"])
def test_the_subject_ends_where_it_is_said_to(bed: CausalBed, subject: str) -> None:
    """A tokenizer trained on one sentence spreads most of these characters over several tokens."""
    located = bed.located(replace(ODD, subject=subject))
    rows = len(PREFIXES) + 1
    assert located.batch["input_ids"].shape[0] == len(located.subject) == rows
    for row, place in enumerate(located.subject.tolist()):
        before = located.batch["input_ids"][row, :place].tolist()
        upto = located.batch["input_ids"][row, : place + 1].tolist()
        assert subject in bed.tokenizer.decode(upto)
        assert subject not in bed.tokenizer.decode(before)
        prefix = ("", *PREFIXES)[row]
        assert bed.tokenizer.decode(used(located.batch, row)) == f"{prefix}{ODD.prompt} {ODD.target_new}"
        labels = located.batch["labels"][row]
        assert bed.tokenizer.decode(labels[labels != -100]) == f" {ODD.target_new}"
        assert not (labels[located.batch["attention_mask"][row] == 0] != -100).any()
    assert located.kept is not None
    assert located.kept_subject is not None
    assert bed.tokenizer.decode(used(located.kept, 0)) == f"{subject} is a"
    kept = located.kept["input_ids"][0, : int(located.kept_subject) + 1]
    assert bed.tokenizer.decode(kept) == subject


def test_a_subject_is_a_word_of_its_own_if_it_can_be(bed: CausalBed) -> None:
    located = bed.located(Fact("In Fordham, Ford is", "red", subject="Ford"))
    upto = located.batch["input_ids"][0, : int(located.subject[0]) + 1]
    assert bed.tokenizer.decode(upto) == "In Fordham, Ford"


def test_without_a_subject_the_place_is_the_end_of_the_prompt(bed: CausalBed) -> None:
    located = bed.located(replace(ODD, subject=None))
    assert located.kept is None
    for row, place in enumerate(located.subject.tolist()):
        upto = located.batch["input_ids"][row, : place + 1]
        assert bed.tokenizer.decode(upto) == ("", *PREFIXES)[row] + ODD.prompt


@torch.no_grad()
def test_padding_on_the_left_changes_no_answer(bed: CausalBed, model: nn.Module) -> None:
    canary = bed.canary()
    assert canary["attention_mask"][:, -1].all()
    assert not canary["attention_mask"].all()
    answers = model(**canary).logits[:, -1]
    for row, prompt in enumerate(CANARY):
        alone = model(**bed.tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(answers[row], alone, rtol=1e-4, atol=1e-5)


def greedy(bed: CausalBed, model: nn.Module, prompt: str, answer: str | None) -> list[tuple[int, int]]:
    """For each token of the answer, or for the one next: what is likeliest, and what stands there; one at a time."""
    before = bed.tokenizer(prompt).input_ids
    after = bed.tokenizer(f" {answer}").input_ids if answer else [-1]
    found = []
    for place, token in enumerate(after):
        logits = model(input_ids=torch.tensor([before + after[:place]])).logits[0, -1]
        found.append((int(logits.argmax()) if logits.isfinite().all() else -9, token))
    return found


@torch.no_grad()
def test_outcomes_agree_with_asking_one_row_at_a_time(bed: CausalBed) -> None:
    """Before: the model. After: the same with noise on its weights, so that some answers change and some do not."""
    before, after = bed.load(), bed.load()
    for weight in after.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    stream = bed.stream(0, 24)
    stream = [replace(fact, locality_ground_truth=None) if place % 2 else fact for place, fact in enumerate(stream)]
    # What the noisy model would say is asked of every third, so that some edits hold.
    for place in range(0, len(stream), 3):
        said = bed.tokenizer.decode(greedy(bed, after, stream[place].prompt, None)[0][0])
        if said.startswith(" ") and said.strip():
            stream[place] = replace(stream[place], target_new=said.strip())
    found = bed.originals(before, stream).outcomes(after, range(len(stream)))
    expected = torch.full((len(stream), len(SCORES)), float("nan"), dtype=torch.float64)
    for place, fact in enumerate(stream):
        assert fact.rephrase_prompt is not None
        assert fact.locality_prompt is not None
        asked = (fact.locality_prompt, fact.locality_ground_truth)
        expected[place, 0] = all(said == token for said, token in greedy(bed, after, fact.prompt, fact.target_new))
        rephrased = greedy(bed, after, fact.rephrase_prompt, fact.target_new)
        expected[place, 1] = all(said == token for said, token in rephrased)
        expected[place, 3] = [said for said, _ in greedy(bed, before, *asked)] == [
            said for said, _ in greedy(bed, after, *asked)
        ]
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    assert 0 < found[:, 3].mean() < 1


def test_an_edit_that_was_learned_counts_and_the_rest_is_what_it_was(bed: CausalBed) -> None:
    fact = bed.stream(0, 3)[1]
    model = bed.load()
    originals = bed.originals(model, bed.stream(0, 3))
    assert originals.outcomes(model, [1]).nan_to_num(-1).tolist() == [[0, 0, -1, 1, -1]]
    model.requires_grad_(True)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        adam.zero_grad()
        model(**bed.edit_batch(fact)).loss.backward()
        adam.step()
    assert originals.outcomes(model, [0, 1])[:, 0].tolist() == [0, 1]


@torch.no_grad()
def test_nan_is_never_a_success(bed: CausalBed) -> None:
    model, stream = bed.load(), bed.stream(0, 6)
    originals = bed.originals(model, stream)
    broken = copy.deepcopy(model)
    next(iter(broken.parameters())).fill_(float("nan"))
    expected = [[0, 0, -1, 0, -1]] * 6
    assert originals.outcomes(broken, range(6)).nan_to_num(-1).tolist() == expected
    assert bed.originals(broken, stream).outcomes(broken, range(6)).nan_to_num(-1).tolist() == expected
    assert math.isnan(bed.perplexity(broken))


def test_what_a_fact_does_not_hold_is_not_asked(bed: CausalBed, model: nn.Module) -> None:
    originals = bed.originals(model, [Fact("The sun is", "a star"), ODD])
    assert originals.outcomes(model, [0]).isnan().tolist() == [[False, True, True, True, True]]
    assert originals.outcomes(model, [1, 0]).isnan().tolist() == [
        [False, False, True, False, True],
        [False, True, True, True, True],
    ]
    assert originals.outcomes(model, []).shape == (0, 5)


@torch.no_grad()
def test_perplexity_is_of_the_text_row_by_row(bed: CausalBed, model: nn.Module) -> None:
    ids = bed.tokenizer(CANARY_TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    losses: list[Tensor] = []
    for start in range(0, len(ids) - CANARY_TOKENS + 1, CANARY_TOKENS):
        row = torch.tensor(ids[start : start + CANARY_TOKENS])
        words = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
        losses += [-words[place, row[place + 1]] for place in range(len(row) - 1)]
    assert len(losses) > 100
    assert bed.perplexity(model) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)


def first(examples: Iterator[Any], count: int) -> list[Any]:
    return list(islice(examples, count))


def test_examples_ask_what_should_change_first_and_are_padded_on_the_left(bed: CausalBed) -> None:
    for example in first(bed.examples(1), 20):
        labels = example.edit["labels"][0]
        start = int((labels != -100).nonzero()[0])
        assert example.wanted.tolist() == [int(labels[start])] * 2
        assert used(example.asked, 0) == example.edit["input_ids"][0, :start].tolist()
        assert example.asked["attention_mask"][:, -1].all()
        assert len(example.asked["input_ids"]) >= 4
        assert "labels" not in example.asked
    again = [example.edit["input_ids"].tolist() for example in first(bed.examples(1), 5)]
    assert again == [example.edit["input_ids"].tolist() for example in first(bed.examples(1), 5)]
    assert again != [example.edit["input_ids"].tolist() for example in first(bed.examples(2), 5)]


def test_a_file_is_streamed_in_an_order_of_the_seed(bed: CausalBed, tmp_path: Path) -> None:
    mine = with_data(bed, tmp_path, records(30, 30))
    assert mine.stream(1, 30)[:10] == mine.stream(1, 10)
    assert mine.stream(1, 10) != mine.stream(2, 10)
    assert len({fact.prompt for fact in mine.stream(1, 30)}) == 30
    assert mine.label(mine.stream(1, 1)[0]).endswith(" is → new")
    with pytest.raises(UsageError, match=r"31 edits were asked for; '.*facts.json' holds 30 facts$"):
        mine.stream(1, 31)


def test_a_large_file_is_shared_out_by_subject(bed: CausalBed, tmp_path: Path) -> None:
    mine = with_data(bed, tmp_path, records(300, 90))
    with pytest.raises(UsageError, match=r"holds 2\d\d facts \(\d+ more are kept to train editors on\)"):
        mine.stream(0, 301)
    streamed = {fact.subject for fact in mine.stream(0, 200)}

    def about(part: Any) -> set[str]:
        texts = [bed.tokenizer.decode(used(example.edit, 0)) for example in first(mine.examples(0, part), 150)]
        assert all(" about Person " in text for text in texts)
        return {text.split(" about ")[1].split(" is ")[0] for text in texts}

    trained, validated = about("train"), about("validation")
    assert not streamed & trained
    assert not streamed & validated
    assert not trained & validated


def test_of_a_prompt_with_two_answers_the_first_counts(bed: CausalBed, tmp_path: Path) -> None:
    twice = [*records(3, 3), {**records(1, 1)[0], "target_new": "other"}]
    stream = with_data(bed, tmp_path, twice).stream(0, 3)
    assert {fact.prompt: fact.target_new for fact in stream}[twice[0]["prompt"]] == "new"
    with pytest.raises(UsageError, match="holds 3 facts"):
        with_data(bed, tmp_path, twice).stream(0, 4)


def test_what_the_stream_itself_asks_to_change_need_not_stay(bed: CausalBed, model: nn.Module) -> None:
    france = Fact("The capital of France is", "Rome", subject="France", locality_prompt="The capital of Japan is")
    japan = Fact("The capital of Japan is", "Rome", subject="Japan", locality_prompt="The capital of Peru is")
    place = SCORES.index("text_locality")
    assert bed.originals(model, [france]).outcomes(model, [0])[0, place] == 1
    both = bed.originals(model, [france, japan]).outcomes(model, [0, 1])[:, place]
    assert math.isnan(both[0])
    assert both[1] == 1


def test_a_model_that_takes_few_tokens_gets_shorter_rows(bed: CausalBed, tmp_path: Path) -> None:
    def short() -> tuple[nn.Module, Any]:
        small = copy.deepcopy(bed.load())
        small.config.max_position_embeddings = 100  # type: ignore[union-attr]
        return small, bed.tokenizer

    mine = CausalBed("short", short)
    assert max(batch["input_ids"].shape[1] for batch in mine.texts()) == 100
    assert math.isfinite(mine.perplexity(mine.load()))
    long = {**records(1, 1)[0], "rephrase_prompt": "word " * 200}
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([long]))
    with pytest.raises(UsageError, match=r"and its prefix have \d+ tokens; the model takes 100"):
        CausalBed("short", short, data=file)


def test_own_facts_about_a_subject_of_the_file_are_not_trained_on(bed: CausalBed, tmp_path: Path) -> None:
    def prompts(examples: Iterator[Any]) -> list[str]:
        return [bed.tokenizer.decode(used(example.asked, 0)) for example in first(examples, 100)]

    texts = prompts(bed.examples(0))
    seen = next(country for country in ("Norway", "Japan", "Peru", "Kenya") if any(country in text for text in texts))
    record = {**records(1, 1)[0], "prompt": f"In {seen}, it is", "subject": seen}
    mine = with_data(bed, tmp_path, [record])
    assert not [text for text in prompts(mine.examples(0)) if seen in text]


def test_ordinary_text_comes_in_full_rows(bed: CausalBed, tmp_path: Path) -> None:
    batches = list(bed.texts())
    assert sum(batch["attention_mask"].sum() for batch in batches) > 8000
    assert {tuple(batch["input_ids"].shape) for batch in batches[:-1]} == {(4, 128)}
    together = [token for batch in batches for row in range(len(batch["input_ids"])) for token in used(batch, row)]
    text = bed.tokenizer.decode(together)
    assert PROSE.read_text(encoding="utf-8").startswith(text)
    mine = tmp_path / "mine.txt"
    mine.write_text("The sun rises.", encoding="utf-8")
    (only,) = CausalBed.from_folder(bed.describe()["folder"], text=mine).texts()
    assert bed.tokenizer.decode(used(only, 0)) == "The sun rises."


def test_what_is_read_is_in_the_description(bed: CausalBed, tmp_path: Path) -> None:
    one = with_data(bed, tmp_path, records(3, 3)).describe()
    other = with_data(bed, tmp_path, records(4, 4)).describe()
    assert one["data"] == other["data"] == str(tmp_path / "facts.json")
    assert one["data_sha256"] != other["data_sha256"]
    assert bed.describe()["data"] is None


def test_a_text_that_cannot_be_used_is_named(bed: CausalBed, tmp_path: Path) -> None:
    folder = bed.describe()["folder"]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    for name, says in (("none.txt", "No such file"), ("latin.txt", "not UTF-8"), ("empty.txt", "holds no word")):
        with pytest.raises(UsageError, match=says):
            CausalBed.from_folder(folder, text=tmp_path / name)
    with pytest.raises(RecordError, match="holds no record"):
        with_data(bed, tmp_path, [])


@pytest.fixture(scope="module")
def real() -> CausalBed:
    reason = smollm2.missing()
    if reason:
        pytest.skip(f"{reason}; run with: make test-pretrained")
    return CausalBed.smollm2(data=COUNTERFACT if COUNTERFACT.is_file() else None)


@pytest.mark.pretrained
def test_the_real_model_reads_english_and_says_what_it_said(real: CausalBed) -> None:
    model, stream = real.load(), real.stream(0, 4)
    assert 3 < real.perplexity(model) < 19
    outcomes = real.originals(model, stream).outcomes(model, range(4))
    assert outcomes[:, 3].tolist() == [1, 1, 1, 1]
    known = [Fact("The capital of France is", "Paris"), Fact("The opposite of hot is", "cold")]
    assert real.originals(model, known).outcomes(model, [0, 1])[:, 0].tolist() == [1, 1]


@pytest.mark.pretrained
def test_subjects_of_real_records_are_found_in_every_row(real: CausalBed) -> None:
    if real.data is None:
        pytest.skip(f"{COUNTERFACT} is not on this machine")
    for fact in real.stream(0, 50):
        located = real.located(fact)
        assert fact.subject is not None
        for row, place in enumerate(located.subject.tolist()):
            prefix = ("", *PREFIXES)[row] + fact.prompt[: fact.prompt.index(fact.subject)]
            upto, before = located.batch["input_ids"][row, : place + 1], located.batch["input_ids"][row, :place]
            # The last token may go further: "F.C.'s" is cut as F, .C, .' and s.
            assert real.tokenizer.decode(upto).startswith(prefix + fact.subject)
            assert not real.tokenizer.decode(before).startswith(prefix + fact.subject)
