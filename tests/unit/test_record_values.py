"""Small parts of the record, by value: what a file may hold, how far it was written, what a manifest takes."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import stabilitylab.analysis
import stabilitylab.record
from stabilitylab.errors import RunError, UsageError
from stabilitylab.record import scanned
from stabilitylab.record.acknowledged import ENDING, acknowledge, acknowledged, forget, missing_says
from stabilitylab.record.checked import entry, expect, from_json
from stabilitylab.record.making import as_json, free_folder, is_taken, making
from stabilitylab.record.scanned import (
    FLOATS,
    PrecisionScan,
    Scan,
    Some,
    TensorScan,
    headroom,
    norm_limit,
    scan_from_json,
)


@dataclass(frozen=True)
class Held:
    name: str
    size: float


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -5, 1 << 53], [True, 1.0, "1", None, (1 << 53) + 1]),
        (
            float,
            [0, 1.5, -1.7976931348623157e308, 1 << 53],
            [True, math.nan, math.inf, -math.inf, "1", None, (1 << 53) + 1],
        ),
        (str, ["", "x"], [1, None, b"x"]),
        (bool, [True], [1, 0.0, None]),
        (str | None, ["x", None], [1]),
        (None, [None], [0, ""]),
        (Any, [None, 1, object()], []),
        (Literal["a", "b"], ["a", "b"], ["c", 1, None]),
        (tuple[str, ...], [(), ("a",), ["a", "b"]], ["a", ("a", 1), None, {"a"}]),
        (Mapping[str, float], [{}, {"a": 1.0}], [{"a": "x"}, {1: 1.0}, [("a", 1.0)], {"a": 1.0, "b": None}]),
        (Held, [Held("a", 1.0)], [Held("a", math.nan), Held(1, 1.0), ("a", 1.0)]),  # type: ignore[arg-type]
    ],
)
def test_a_value_is_of_its_kind_all_the_way_down(kind: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert expect(kind, value, "it") is value
    for value in bad:
        with pytest.raises(ValueError, match=r"^it is "):
            expect(kind, value, "it")


def test_what_is_wrong_is_shown_and_cut() -> None:
    with pytest.raises(ValueError, match=r"^its size is 'abc'$"):
        expect(int, "abc", "its size")
    with pytest.raises(ValueError, match=r"^it is a list$"):
        expect(int, [1], "it")
    with pytest.raises(ValueError, match=r"x…$") as raised:
        expect(int, "x" * 90, "it")
    assert len(str(raised.value)) == len("it is ") + 60
    with pytest.raises(ValueError, match=r"^it is 'x{58}'$"):
        expect(int, "x" * 58, "it")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", "1e999", "[", "1" * 31, None, b"1", "[" * 100_000])
def test_what_is_no_json_or_no_number(text: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        from_json(text)


def test_what_is_json() -> None:
    assert from_json('{"a": [1, 2.5, null, true]}') == {"a": [1, 2.5, None, True]}
    assert from_json("1" * 30) == int("1" * 30)


def test_entries_of_a_manifest() -> None:
    assert entry("sites", '["a"]') == ("sites", ["a"])
    assert entry("mine", "[1]") == ("mine", [1])
    for name, value in (("sites", '"a"'), ("config", "[]"), ("closed", "1"), ("lost_rows", "1.5"), ("cwd", "1")):
        with pytest.raises(ValueError, match=f"the manifest's '{name}'"):
            entry(name, value)


def test_how_far_a_run_has_come(tmp_path: Path) -> None:
    file = tmp_path / "run.db"
    beside = file.with_name(f"run.db{ENDING}")
    assert acknowledged(file) == -1
    for edit in (3, 12, 0):
        acknowledge(file, edit)
        assert acknowledged(file) == edit
        assert beside.read_bytes() == f"{edit:020d}\n".encode()
    forget(file)
    assert acknowledged(file) == -1
    forget(file)
    most = 1 << 53
    for words, known in (
        (f"{most:020d}", most),
        (f"{most + 1:020d}", -1),
        ("5", -1),
        ("0" * 19 + "x", -1),
        ("0" * 20 + "\n" + "7", 0),
        ("0" * 19 + "\n", -1),
        ("", -1),
    ):
        beside.write_text(words)
        assert acknowledged(file) == known, words
    beside.unlink()
    beside.mkdir()
    assert acknowledged(file) == -1
    acknowledge(file, 3)  # can't be written: less is known later, and that is all


def test_what_is_missing_is_said() -> None:
    assert missing_says(4, 5).startswith("edit 5 had been recorded and can't be read any more")
    assert missing_says(4, 9).startswith("edits 5 to 9 had been recorded")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": [1, {"b": math.nan}]}, "config['a'][1]['b'] is nan; expected plain JSON"),
        ({"a": object()}, "config['a'] is a object; expected plain JSON"),
        ({(1, 2): 3}, "config is a dict with a key of type tuple; expected plain JSON"),
        (math.inf, "config is inf; expected plain JSON"),
        ([1, {2}], "config[1] is a set; expected plain JSON"),
    ],
)
def test_what_a_manifest_can_not_hold_is_named(value: Any, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        as_json("config", value)
    assert str(raised.value).startswith(says)


def test_a_manifest_that_holds_itself_is_no_endless_search() -> None:
    held: list[Any] = []
    held.append(held)
    with pytest.raises(
        UsageError, match=r"^config\[0\].*… is too deep, or holds itself; expected plain JSON"
    ) as raised:
        as_json("config", held)
    assert str(raised.value).startswith("config" + "[0]" * 24 + "[0…")
    assert as_json("config", {"a": (1, "é")}) == '{"a": [1, "\\u00e9"]}'


def test_a_folder_is_taken_by_anything_but_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not is_taken(folder)
    assert free_folder(folder) == folder
    folder.mkdir()
    (folder / ".making-x").mkdir()
    assert not is_taken(folder)
    (folder / "notes.txt").touch()
    assert is_taken(folder)
    assert free_folder(folder) == tmp_path / "run-2"
    (tmp_path / "run-2").touch()
    (tmp_path / "run-3").symlink_to(tmp_path / "nowhere")
    assert free_folder(folder) == tmp_path / "run-4"
    assert not is_taken(folder / "notes.txt" / "below")


def test_a_file_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "run.db"
    with pytest.raises(KeyError), making(file) as scratch:
        scratch.write_text("half")
        raise KeyError("stop")
    assert not (tmp_path / "a").exists()
    with making(file) as scratch:
        scratch.write_text("whole")
        assert not file.exists()
    assert [each.name for each in file.parent.iterdir()] == ["run.db"]
    with pytest.raises(RunError, match="was taken by another process"), making(file) as scratch:
        scratch.write_text("other")
    assert file.read_text() == "whole"
    with pytest.raises(RunError, match="can't write a run file in"), making(file / "c" / "run.db"):
        pass


@pytest.mark.parametrize(
    ("largest", "limit", "bits"),
    [
        (1.0, 8.0, 3.0),
        (16.0, 8.0, -1.0),
        (0.0, 8.0, math.inf),
        (math.inf, 8.0, -math.inf),
        (None, 8.0, None),
        (1.0, 0.0, None),
    ],
)
def test_headroom_is_in_doublings(largest: float | None, limit: float, bits: float | None) -> None:
    assert headroom(largest, limit) == bits
    assert headroom(math.nan, 8.0) is None


def test_where_a_normalisation_ends() -> None:
    root = math.sqrt(FLOATS["float32"][0])
    assert norm_limit("float16") == 65_504.0
    assert norm_limit("float32") == norm_limit("bfloat16") == root
    assert norm_limit("float64") == math.sqrt(FLOATS["float64"][0])


def test_figures_of_one_tensor_and_one_dtype() -> None:
    tensor = TensorScan("w", "l", (2, 3), "float16", 1.0, -4.0, 2.0, worst_output=65_504.0 / 8)
    assert (tensor.size, tensor.largest) == (6, 4.0)
    assert tensor.headroom_bits == pytest.approx(math.log2(65_504 / 4))
    assert tensor.output_headroom_bits == pytest.approx(3.0)
    unknown = dataclasses.replace(tensor, dtype="int4", least=None)
    assert (unknown.largest, unknown.headroom_bits, unknown.output_headroom_bits) == (None, None, None)
    precision = PrecisionScan("float16", 10, 0, 0, 1.0, updates=8, swallowed=2)
    assert precision.swallowed_share == 0.25
    for other in (None, 0):
        assert dataclasses.replace(precision, updates=other).swallowed_share is None
    assert dataclasses.replace(precision, swallowed=None).swallowed_share is None
    assert dataclasses.replace(precision, swallowed=0).swallowed_share == 0.0


def test_a_scan_is_the_same_after_json_brief_or_not() -> None:
    tensor = TensorScan("w", "l", (2, 3), "float16", math.inf, -math.inf, 1.0, 3, first_bad=(1, 2))
    scan = Scan(
        "m", "live", {"float16": 6}, (dataclasses.replace(tensor, zero_rows=Some(1, (4,), (0.5,))),), lost_nats=1.0
    )
    for brief in (False, True):
        plain = scan.to_json(brief=brief)
        assert scan_from_json(plain) == scan
        assert plain["tensors"][0]["norm"] == "Infinity"
        assert plain["tensors"][0]["least"] == "-Infinity"
        assert ("statistics" in plain, "masking" in plain["tensors"][0]) == (not brief, not brief)
    odd = dataclasses.replace(tensor, norm=math.nan)
    again = scan_from_json(Scan("m", "live", tensors=(odd,)).to_json()).tensors[0]
    assert math.isnan(again.norm)
    for wrong in (
        {},
        [],
        {"model": 1, "kind": "x"},
        {"model": "m" * 10_001, "kind": "x"},
        {"model": "m", "kind": "x", "z": 1},
    ):
        with pytest.raises(ValueError, match="no scan"):
            scan_from_json(wrong)
    assert scan_from_json({"model": "m" * 10_000, "kind": "x"}).kind == "x"


MUTABLE = {"stabilitylab.analysis.ledger._Group"}
"""What is filled while it is used, and leaves its module as something frozen."""


def test_what_stations_hand_over_can_not_be_changed() -> None:
    """Frozen, so that a reader who keeps a finding, a row or a forecast keeps what was said."""
    found = set()
    for package in (stabilitylab.record, stabilitylab.analysis):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, held in vars(importlib.import_module(module.name)).items():
                if isinstance(held, type) and dataclasses.is_dataclass(held) and held.__module__ == module.name:
                    found.add(f"{module.name}.{name}")
                    frozen = held.__dataclass_params__.frozen  # type: ignore[attr-defined]
                    assert frozen == (f"{module.name}.{name}" not in MUTABLE), f"{module.name}.{name}"
    assert len(found) > 40
    assert found >= MUTABLE


def test_what_a_brief_scan_leaves_out_is_nothing_out_of_the_ordinary() -> None:
    """Each default says that nothing was seen, is known or was asked for: it is what a reader finds in its place."""
    left_out = set()
    for held in vars(scanned).values():
        if isinstance(held, type) and dataclasses.is_dataclass(held):
            for field in dataclasses.fields(held):
                if field.default is not dataclasses.MISSING:
                    left_out.add(field.name)
                    assert field.default in (Some(), None, False, 0, 0.0, "", ()), f"{held.__name__}.{field.name}"
    assert {"is_site", "is_buffer", "inputs_first", "nonfinite", "tokens", "kl_nats"} <= left_out
