"""What is said of a traced operation, part by part: where, with what, how far, and what to do there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stabilitylab.analysis import Finding
from stabilitylab.analysis import operation as traced
from stabilitylab.record.operations import Operation, Place, Precision, Values

PLACE = Place("/home/me/edit.py", 12, "apply", "y = f(x)")
GIVEN = Values("self", (4,), "float32", -2.0, 3.0, 0)
RESULT = Values("", (4,), "float16", -1.0, 1.0, 2)
FOUND = Operation(
    3, "edit", "aten.mul.Tensor", "forward", "fc", PLACE, "producer", "weight", "fc.weight",
    operands=(GIVEN,), result=RESULT, value="NaN",
)  # fmt: skip


def of(**more: Any) -> Operation:
    return replace(FOUND, **more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "mul, at line 12 of edit.py"),
        ({"direction": "backward"}, "mul, in the backward of line 12 of edit.py"),
        ({"place": Place()}, "mul"),
        ({"place": Place(), "direction": "backward"}, "mul, in the backward"),
        ({"operator": "mul"}, "mul, at line 12 of edit.py"),
    ],
)
def test_where_it_was(more: dict[str, Any], words: str) -> None:
    assert traced.where(of(**more)) == words


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "It was given self -2 to 3 (float32)."),
        ({"operands": ()}, ""),
        ({"operands": (replace(GIVEN, greatest=-2.0),)}, "It was given self -2 (float32)."),
        ({"operands": (replace(GIVEN, nonfinite=3),)}, "self -2 to 3 and 3 that are not finite (float32)."),
        ({"operands": (replace(GIVEN, least=None, greatest=None, nonfinite=3),)}, "self nothing finite and 3 that"),
        ({"operands": (replace(GIVEN, least=None, greatest=None, nonfinite=None),)}, ""),
        ({"operands": (GIVEN, replace(GIVEN, name="other"))}, "given self -2 to 3 (float32), other -2 to 3 (float32)."),
        ({"settings": {"eps": "1e-8", "dim": "1"}}, "self -2 to 3 (float32), eps 1e-8."),
        ({"operands": (), "settings": {"alpha": "2"}}, "It was given alpha 2."),
    ],
)
def test_with_which_values(more: dict[str, Any], words: str) -> None:
    said = traced.says(of(**more))
    assert words in said
    assert ("It was given" in said) == bool(words)
    assert "  " not in said


@pytest.mark.parametrize(
    ("reach", "words"),
    [
        ("weight", "It reached fc.weight."),
        ("gradient", "It reached the gradient of fc.weight."),
        ("output", "It reached what the model returns."),
        ("loss", "It reached the loss."),
        ("values", ""),
    ],
)
def test_how_far_it_came(reach: str, words: str) -> None:
    said = traced.says(of(reach=reach))
    assert words in said
    assert ("It reached" in said) == bool(words)


@pytest.mark.parametrize(
    ("made", "phase", "words"),
    [
        ("producer", "edit", "(`y = f(x)`), in fc, gave the first NaN from finite values in edit 3."),
        ("designed", "edit", "made the NaN that it was asked for, which went on from there in edit 3."),
        ("arrived", "canary", "took in a NaN that was there before in the canary's forward after edit 3."),
        ("producer", "replay", "gave the first NaN from finite values in edit 3, made once more."),
    ],
)
def test_what_it_did_and_when(made: str, phase: str, words: str) -> None:
    assert words in traced.says(of(made=made, phase=phase))


def test_a_long_line_is_cut() -> None:
    for length, held in ((100, "x" * 100), (101, "x" * 99 + "…")):
        assert f"(`{held}`)" in traced.says(of(place=replace(PLACE, source="x" * length)))
    assert "`" not in traced.says(of(place=replace(PLACE, source="")))
    assert ", in " not in traced.says(of(module="")).partition("gave")[0].replace("at line", "")


SOUND, BROKEN = Precision("float32", True, 2.0), Precision("float32", False)


@pytest.mark.parametrize(
    ("precisions", "words"),
    [
        (
            (SOUND, Precision("float64", True)),
            "finite in float32, largest 2, finite in float64: its",
        ),
        (
            (BROKEN, Precision("float64", True)),
            "not finite in float32, finite in float64: its dtype's range",
        ),
        ((Precision("float32", None),), "Made once more: not finite in float32."),
    ],
)
def test_what_came_of_making_it_once_more(precisions: tuple[Precision, ...], words: str) -> None:
    assert words in traced.replayed(of(precisions=precisions))


DIVISION = {"operator": "aten.div.Tensor"}
SOFTMAX = {"operator": "aten._softmax.default", "operands": (replace(GIVEN, nonfinite=1),)}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"made": "arrived"}, "Find out what wrote it"),
        ({"made": "designed"}, "Keep what line 12 of edit.py masks out of sums"),
        (SOFTMAX, "A row of line 12 of edit.py is masked in full"),
        (SOFTMAX | {"operator": "aten._log_softmax.default"}, "is masked in full"),
        (SOFTMAX | {"operands": (GIVEN,)}, "Look at line 12 of edit.py with these values"),
        (DIVISION, "Keep the divisor at line 12 of edit.py away from zero"),
        (DIVISION | {"operands": (replace(GIVEN, least=0.0),)}, "away from zero"),
        (DIVISION | {"operands": (replace(GIVEN, greatest=0.0),)}, "away from zero"),
        (DIVISION | {"operands": (replace(GIVEN, least=0.1),)}, "Look at line"),
        (DIVISION | {"operands": (replace(GIVEN, greatest=-0.1),)}, "Look at line"),
        (DIVISION | {"operands": (replace(GIVEN, least=None),)}, "Look at line"),
        (DIVISION | {"operands": (replace(GIVEN, least=0.5), GIVEN)}, "away from zero"),
        (DIVISION | {"operands": (GIVEN, replace(GIVEN, least=0.5))}, "Look at line"),
        (DIVISION | {"operands": ()}, "Look at line"),
        *(
            ({"operator": f"aten.{name}.default"}, "away from zero")
            for name in ("div_", "reciprocal", "addcdiv", "addcdiv_", "_foreach_div", "_foreach_div_")
        ),
        ({"value": "∞"}, "float16 ends at 65,504: make line 12 of edit.py in float32"),
        ({"value": "∞", "result": replace(RESULT, dtype="bfloat16")}, "bfloat16 ends at 3.39e38"),
        ({"value": "∞", "result": replace(RESULT, dtype="float32")}, "Look at line"),
        ({"value": "∞", "result": None}, "Look at line"),
        ({}, "Look at line 12 of edit.py with these values: clamp what goes in"),
        ({"place": Place()}, "Look at that operation with these values"),
    ],
)
def test_what_to_do_there(more: dict[str, Any], words: str) -> None:
    assert words in traced.advice(of(**more))


def finding(site: str = "fc", edit: int = 3, verdict: str = "non-finite", since: int | None = None) -> Finding:
    return Finding("non-finite", "weight", site, edit, 1.0, 0.0, "", verdict, since)  # type: ignore[arg-type]


def test_the_finding_of_its_own_layer_and_edit_is_its() -> None:
    right = finding()
    assert traced.its_finding(FOUND, [finding("other"), finding(edit=4), finding(verdict="diverging"), right]) is right
    assert traced.its_finding(FOUND, [finding(edit=4, since=3)]) is not None
    assert traced.its_finding(FOUND, [finding("other")]) is None


def test_its_link_in_the_chain() -> None:
    link = traced.link(FOUND)
    assert (link.role, link.cause, link.edit, link.site, link.confidence) == (
        "operation",
        "traced-operation",
        3,
        "fc",
        "high",
    )
    assert "It was given" not in link.says
    assert traced.link(of(module="")).site is None


@pytest.mark.parametrize(
    ("lost", "edits", "edit", "blamed"),
    [(3, 9, 7, True), (3, 9, 6, False), (0, 9, 9, False), (9, 9, 1, True)],
)
def test_where_no_edit_lands_one_of_those_is_blamed(lost: int, edits: int, edit: int, blamed: bool) -> None:
    assert (traced.blamed([of(edit=edit)], None, lost=lost, edits=edits) is not None) == blamed


def test_of_one_edits_operations_a_replayed_one_leads_then_what_began_it_then_what_came_furthest() -> None:
    canary = of(phase="canary")
    arrived, near = of(made="arrived"), of(reach="output")
    replayed = of(phase="replay", made="arrived", reach="values")
    order = [replayed, FOUND, canary, near, arrived]
    for first in range(len(order)):
        assert traced.blamed(order[first:][::-1], 3, lost=0, edits=9) is order[first]
