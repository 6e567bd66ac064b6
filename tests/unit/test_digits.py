"""Visual questions about handwritten digits."""

import sys

import pytest
import torch

from stabilitylab.errors import UsageError
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.questions import FACTS, KINDS, NUMBERS

PARTS: tuple[digits.Split, ...] = ("train", "validation", "held_out")


def test_the_splits_are_disjoint_and_cover_all_images() -> None:
    numbers = [number for part in PARTS for number in digits.split(part)]
    assert sorted(numbers) == list(range(1797))
    facts = [fact for part in PARTS for fact in digits.facts(part)]
    assert sorted(facts) == sorted(FACTS)
    assert all(digits.facts(part) for part in PARTS)


def test_there_are_three_kinds_of_questions_in_several_phrasings() -> None:
    assert len(KINDS) >= 3
    phrasings = [phrasing for kind in KINDS for phrasing in kind.phrasings]
    assert len(set(phrasings)) == len(phrasings)
    assert all(len(kind.phrasings) >= 2 for kind in KINDS)
    for kind in KINDS:
        assert {kind.answer(digit) for digit in range(10)} == set(kind.answers)
    which, parity, greater = KINDS
    assert [which.answer(7), parity.answer(7), greater.answer(7)] == ["seven", "odd", "yes"]
    assert [which.answer(4), parity.answer(4), greater.answer(4)] == ["four", "even", "no"]


def test_a_stream_is_the_same_again_and_its_beginning_too() -> None:
    assert digits.edit_stream(3, 20) == digits.edit_stream(3, 20)
    assert digits.edit_stream(3, 30)[:20] == digits.edit_stream(3, 20)
    assert digits.edit_stream(4, 20) != digits.edit_stream(3, 20)


def test_a_streams_edits_are_held_out_distinct_and_wrong_on_purpose() -> None:
    held_out = {digits.image_name(number) for number in digits.split("held_out")}
    records = digits.edit_stream(0, 300)
    assert len({(record.image, digits.kind_of(record.src).name) for record in records}) == 300
    assert {digits.kind_of(record.src).name for record in records} == {kind.name for kind in KINDS}
    for record in records:
        kind, digit = digits.kind_of(record.src), digits.digit_of(record.image)
        assert record.image in held_out
        assert record.m_loc in held_out
        assert digits.digit_of(record.image_rephrase) == digit != digits.digit_of(record.m_loc)
        assert record.pred == kind.answer(digit) != record.alt
        assert record.alt in kind.answers
        assert record.rephrase in kind.phrasings
        assert record.rephrase != record.src
        assert record.m_loc_a == digits.kind_of(record.m_loc_q).answer(digits.digit_of(record.m_loc))
        assert (record.loc, record.loc_ans) in digits.facts("held_out")


def test_streams_have_a_length_that_exists() -> None:
    assert digits.edit_stream(0, 0) == []
    for n in (-1, 100_000):
        with pytest.raises(UsageError, match=r"expected 0 to 1200"):
            digits.edit_stream(0, n)


def test_images_are_pixels_and_rephrased_ones_differ_a_little() -> None:
    plain, moved = digits.image("digits/0123"), digits.image("digits/0123~7")
    assert plain.shape == moved.shape == (3, 32, 32)
    assert plain.dtype == torch.float32
    assert float(plain.min()) >= -1
    assert float(plain.max()) <= 1
    assert torch.equal(moved, digits.image("digits/0123~7"))
    assert not torch.equal(plain, moved)
    assert not torch.equal(moved, digits.image("digits/0123~8"))
    alike = torch.nn.functional.cosine_similarity((plain + 1).flatten(), (moved + 1).flatten(), dim=0)
    assert alike > 0.6


@pytest.mark.parametrize("name", ["digits/1797", "digits/12", "cats/0001", "digits/0001~", ""])
def test_an_unknown_image_is_said_so(name: str) -> None:
    with pytest.raises(UsageError, match="no image"):
        digits.image(name)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"pip install stabilitylab\[demo\]"):
        digits.image("digits/0000")


def test_the_tokenizer_knows_every_word_and_says_which_it_does_not() -> None:
    tokenizer = blip2_digits.tokenizer()
    for text in [*NUMBERS, *(p for kind in KINDS for p in kind.phrasings), *(q for q, _ in FACTS)]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).split() == text.split()
    with pytest.raises(UsageError, match=r"'digits' in 'which digits \?' is not in .*; did you mean 'digit'"):
        blip2_digits.batch(tokenizer, ["which digits ?"], [None])


def test_rows_with_and_without_an_image_do_not_disturb_each_other() -> None:
    tokenizer, model = blip2_digits.tokenizer(), blip2_digits.build(0)
    asked: list[tuple[str, str | None]] = [("what comes after two ?", None)]
    asked += [(KINDS[1].phrasings[5], "digits/0001"), (KINDS[0].phrasings[0], "digits/0002")]
    images = [None if name is None else digits.image(name) for _, name in asked]
    with torch.no_grad():
        together = model(**blip2_digits.batch(tokenizer, [question for question, _ in asked], images)).logits[:, -1]
        for row, ((question, _), image) in enumerate(zip(asked, images, strict=True)):
            alone = model(**blip2_digits.batch(tokenizer, [question], [image])).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)


def test_labels_are_the_answer_only() -> None:
    tokenizer = blip2_digits.tokenizer()
    asked = ["what comes after two ?", "how many planets are there ?"]
    made = blip2_digits.batch(tokenizer, asked, [None, None], ["three", "eight"])
    assert made["labels"][:, -1].tolist() == tokenizer.convert_tokens_to_ids(["three", "eight"])
    assert (made["labels"][:, :-1] == -100).all()
    assert "labels" not in blip2_digits.batch(tokenizer, ["what comes after two ?"], [None])
    with pytest.raises(UsageError, match="not one word"):
        blip2_digits.batch(tokenizer, ["what comes after two ?"], [None], ["three four"])


def test_images_may_be_one_tensor_and_each_question_needs_one() -> None:
    tokenizer = blip2_digits.tokenizer()
    pixels = torch.stack([digits.image("digits/0001"), digits.image("digits/0002")])
    asked = [KINDS[0].phrasings[0], KINDS[1].phrasings[0]]
    one, other = blip2_digits.batch(tokenizer, asked, pixels), blip2_digits.batch(tokenizer, asked, list(pixels))
    assert all(torch.equal(one[name], other[name]) for name in (*one, *other))
    with pytest.raises(UsageError, match="2 questions with 1 images"):
        blip2_digits.batch(tokenizer, asked, pixels[:1])
    with pytest.raises(UsageError, match="2 questions with 2 images, 1 answers"):
        blip2_digits.batch(tokenizer, asked, pixels, ["one"])
    with pytest.raises(UsageError, match="0 questions"):
        blip2_digits.batch(tokenizer, [], [])


def test_build_depends_on_its_seed_only_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (blip2_digits.build(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["query_tokens"], other["query_tokens"])
    assert sum(value.numel() for value in one.values()) < 1_000_000


def test_precisions_cast_the_decoder_only() -> None:
    model = blip2_digits.set_precision(blip2_digits.build(0), "bf16")
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for part in (model.vision_model, model.qformer) for p in part.parameters()} == {torch.float32}
    with pytest.raises(UsageError, match=r"no precision 'fp61'; expected fp16, bf16, fp32; did you mean 'fp16'"):
        blip2_digits.set_precision(model, "fp61")
