"""Reading facts to edit in the layouts that people have, and the package's own ones."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest

from stabilitylab.errors import RecordError, UsageError
from stabilitylab.testbed.counterfact import Fact, load_facts
from stabilitylab.testbed.facts import TABLES, Part, fact_stream, facts_to_train_on, subjects

SHARED = Path(__file__).parents[3] / "shared" / "data"
FLAT: dict[str, Any] = {
    "case_id": 3,
    "prompt": "The mother tongue of Ann Lee is",
    "subject": "Ann Lee",
    "target_new": "Dutch",
    "ground_truth": "Thai",
    "rephrase_prompt": "At home Ann Lee spoke",
    "locality_prompt": "Bo Ek is a native speaker of",
    "locality_ground_truth": "Thai",
}
PUBLISHED: dict[str, Any] = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Ann Lee",
        "target_new": {"str": "Dutch", "id": "Q1"},
        "target_true": {"str": "Thai", "id": "Q2"},
    },
    "paraphrase_prompts": ["At home Ann Lee spoke", "Another"],
    "neighborhood_prompts": ["Bo Ek is a native speaker of"],
}
QUESTION: dict[str, Any] = {
    "src": "How many balls are there?",
    "pred": "two",
    "alt": "3",
    "rephrase": "What is the number of balls?",
    "loc": "who won the cup",
    "loc_ans": "Bo Ek",
    "image": "a.jpg",
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "facts.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        load_facts(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def test_both_layouts_of_counterfact_say_the_same(tmp_path: Path) -> None:
    (flat,) = load_facts(write(tmp_path, [FLAT]))
    assert flat == Fact(**without(FLAT, "case_id"))
    assert load_facts(write(tmp_path, [PUBLISHED])) == [flat]


def test_a_question_about_an_image_is_asked_without_it(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path, [QUESTION]))
    assert (fact.prompt, fact.target_new, fact.subject) == ("How many balls are there?", "3", None)
    assert (fact.rephrase_prompt, fact.locality_prompt) == ("What is the number of balls?", "who won the cup")
    assert (fact.ground_truth, fact.locality_ground_truth) == ("two", "Bo Ek")


def test_answers_that_are_only_compared_may_be_missing(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path, [without(without(FLAT, "ground_truth"), "locality_ground_truth")]))
    assert fact.ground_truth is None
    assert fact.locality_ground_truth is None


@pytest.mark.parametrize("name", ["prompt", "subject", "target_new", "rephrase_prompt", "locality_prompt"])
def test_the_first_bad_record_and_its_field_are_named(tmp_path: Path, name: str) -> None:
    assert f"record 1 has no field {name!r}" in message(write(tmp_path, [FLAT, without(FLAT, name), {}]))
    assert f"record 1, field {name!r}: expected a string, found null" in message(
        write(tmp_path, [FLAT, {**FLAT, name: None}])
    )
    assert f"record 1, field {name!r}: expected some words" in message(write(tmp_path, [FLAT, {**FLAT, name: " "}]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"promt": "x"}], "record 0 has no field 'prompt' (CounterFact)"),
        ([{"promt": "x"}], "did you mean 'promt'?"),
        (["text"], "record 0 is a string"),
        ([FLAT, QUESTION], "record 1 has no field 'prompt'"),
        ([FLAT, 3], "record 1 is a number"),
        ([{**FLAT, "subject": "ann lee"}], "record 0, field 'subject': expected it word for word in the prompt"),
        ([QUESTION, without(QUESTION, "alt")], "record 1 has no field 'alt'"),
        ([PUBLISHED, {**PUBLISHED, "requested_rewrite": 3}], "record 1, field 'requested_rewrite' is a number"),
        ([{**PUBLISHED, "paraphrase_prompts": []}], "field 'paraphrase_prompts': expected a list of strings, found an"),
        ([{**PUBLISHED, "neighborhood_prompts": [3]}], "'neighborhood_prompts': expected a string, found a number"),
        (
            [{**PUBLISHED, "requested_rewrite": without(PUBLISHED["requested_rewrite"], "target_new")}],
            "record 0, field 'requested_rewrite' has no field 'target_new'",
        ),
        (
            [{**PUBLISHED, "requested_rewrite": {**PUBLISHED["requested_rewrite"], "prompt": "Ann Lee is"}}],
            "expected '{}' in place of the subject",
        ),
        (
            [{**PUBLISHED, "requested_rewrite": {**PUBLISHED["requested_rewrite"], "target_new": "Dutch"}}],
            "field 'target_new' is a string, expected an object with the field 'str'",
        ),
    ],
)
def test_what_is_no_list_of_facts_is_said_in_one_line(tmp_path: Path, content: Any, says: str) -> None:
    assert says in message(write(tmp_path, content))


def test_no_records_is_a_list_of_none(tmp_path: Path) -> None:
    assert load_facts(write(tmp_path, [])) == []


@pytest.mark.parametrize(("name", "count"), [("counterfact_1000.json", 1000), ("mmedit_vqa_500.json", 500)])
def test_files_that_people_have_are_read_as_they_are(name: str, count: int) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not on this machine")
    raw, facts = json.loads((SHARED / name).read_text(encoding="utf-8")), load_facts(SHARED / name)
    assert len(facts) == count
    for entry, fact in zip(raw, facts, strict=True):
        assert fact.prompt == entry.get("prompt", entry.get("src"))
        assert fact.target_new == entry.get("target_new", entry.get("alt"))
        assert fact.locality_ground_truth == entry.get("locality_ground_truth", entry.get("loc_ans"))


def test_a_stream_starts_with_the_shorter_ones_and_asks_nothing_twice() -> None:
    long = fact_stream(3, 240)
    assert long[:20] == fact_stream(3, 20)
    assert long[:20] != fact_stream(4, 20)
    assert max(Counter(fact.prompt for fact in long).values()) == 1
    with pytest.raises(UsageError, match=r"has \d+ facts to edit, 9999 were asked for"):
        fact_stream(3, 9999)


def test_wrong_answers_are_wrong_and_of_the_same_type() -> None:
    truths = [{row[column] for row in table.rows} for table in TABLES for column in range(1, len(table.rows[0]))]
    for fact in [*fact_stream(0, 240), *islice(facts_to_train_on(0), 300)]:
        assert fact.subject is not None
        assert fact.rephrase_prompt is not None
        assert fact.target_new != fact.ground_truth
        assert any({fact.target_new, fact.ground_truth, fact.locality_ground_truth} <= column for column in truths)
        assert fact.subject in fact.prompt
        assert fact.subject in fact.rephrase_prompt
        assert fact.prompt not in (fact.rephrase_prompt, fact.locality_prompt)


def test_no_subject_is_both_trained_on_and_edited_and_none_is_asked_about_that_is_edited() -> None:
    edited = {fact.subject for seed in range(3) for fact in fact_stream(seed, 240)}
    trained = {fact.subject for fact in islice(facts_to_train_on(0), 1000)}
    validated = {fact.subject for fact in islice(facts_to_train_on(0, "validation"), 1000)}
    left_alone = {subject for table in TABLES for subject in subjects(table, "locality")}
    parts = [edited, trained, validated, left_alone]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    for fact in fact_stream(0, 240):
        assert fact.locality_prompt is not None
        assert any(subject in fact.locality_prompt for subject in left_alone)
    for fact in islice(facts_to_train_on(0), 300):
        assert fact.locality_prompt is not None
        assert any(subject in fact.locality_prompt for subject in trained if subject)
    for table in TABLES:
        shared_out = [name for part in get_args(Part) for name in subjects(table, part)]
        assert sorted(shared_out) == sorted(row[0] for row in table.rows)


def test_the_tables_are_whole() -> None:
    for table in TABLES:
        assert {len(row) for row in table.rows} == {len(table.relations) + 1}
        assert all(all(row) for row in table.rows)
        assert len({row[0] for row in table.rows}) == len(table.rows)
        for relation in table.relations:
            assert len(relation.templates) >= 3
            assert all(template.count("{}") == 1 for template in relation.templates)
