"""Reading edit records in MMEdit's layout."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from stabilitylab.errors import RecordError
from stabilitylab.testbed.records import EditRecord, as_record, load_records

MMEDIT = Path(__file__).parents[3] / "shared" / "data" / "mmedit_vqa_500.json"
GOOD = {field.name: f"some {field.name}" for field in fields(EditRecord)}


def write(folder: Path, content: Any) -> Path:
    path = folder / "edits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        load_records(path)
    found = str(caught.value)
    assert "\n" not in found
    return found


def test_fields_are_read_as_they_are(tmp_path: Path) -> None:
    other = {**GOOD, "src": "Wie viele Bälle – „hier“?", "category": 3}
    found = load_records(write(tmp_path, [GOOD, other]))
    assert found[0] == EditRecord(**GOOD)
    assert found[1].src == "Wie viele Bälle – „hier“?"


def test_no_records_is_a_list_of_none(tmp_path: Path) -> None:
    assert load_records(write(tmp_path, [])) == []


@pytest.mark.parametrize("field", list(GOOD))
def test_the_first_bad_record_and_its_field_are_named(tmp_path: Path, field: str) -> None:
    without = {name: value for name, value in GOOD.items() if name != field}
    assert f"record 2 has no field {field!r}" in message(write(tmp_path, [GOOD, GOOD, without, {}]))
    found = message(write(tmp_path, [GOOD, {**GOOD, field: 7}]))
    assert f"record 1, field {field!r}: expected a string, found a number" in found


def test_a_misspelt_field_is_pointed_at(tmp_path: Path) -> None:
    wrong = {**{name: value for name, value in GOOD.items() if name != "rephrase"}, "rephrased": "x"}
    assert "did you mean 'rephrased'?" in message(write(tmp_path, [wrong]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{not json", "not JSON (line 1, column 2"),
        ("", "not JSON (line 1, column 1"),
        ({"a": 1}, "expected a list of records, found an object"),
        (None, "expected a list of records, found null"),
        ([GOOD, "text"], "record 1 is a string"),
        ([{**GOOD, "alt": None}], "record 0, field 'alt': expected a string, found null"),
        ([{**GOOD, "alt": ["a"]}], "record 0, field 'alt': expected a string, found a list"),
    ],
)
def test_what_is_no_list_of_records_is_said_in_one_line(tmp_path: Path, content: Any, says: str) -> None:
    assert says in message(write(tmp_path, content))


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert re.search(r"edit\.json: no such file; did you mean 'edits\.json'\?", message(tmp_path / "edit.json"))
    assert "no such file" in message(tmp_path / "nowhere" / "edits.json")


def test_a_folder_and_binary_are_no_records(tmp_path: Path) -> None:
    assert "can't be read" in message(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 at byte 0" in message(tmp_path / "b.json")


def test_records_are_a_round_trip(tmp_path: Path) -> None:
    records = [EditRecord(**GOOD), EditRecord(**{**GOOD, "alt": 'a "quoted"\nöne'})]
    assert load_records(write(tmp_path, [asdict(record) for record in records])) == records


def test_a_mapping_of_the_fields_is_a_request_too() -> None:
    record = EditRecord(**GOOD)
    assert as_record(record) is record
    assert as_record({**GOOD, "category": 3}) == record
    with pytest.raises(RecordError, match="the request has no field 'alt'; did you mean 'alter'"):
        as_record({"alter" if name == "alt" else name: value for name, value in GOOD.items()})


@pytest.mark.skipif(not MMEDIT.is_file(), reason=f"{MMEDIT} is not on this machine")
def test_mmedits_own_file_is_read_as_it_is() -> None:
    raw = json.loads(MMEDIT.read_text(encoding="utf-8"))
    records = load_records(MMEDIT)
    assert len(records) == len(raw) == 500
    for record, entry in zip(records, raw, strict=True):
        assert asdict(record) == {name: entry[name] for name in GOOD}
