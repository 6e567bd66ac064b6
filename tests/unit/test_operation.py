"""The traced operation from the run file to the reader: what is chosen, what is claimed of it, and how it is said."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.analysis import operation as traced
from stabilitylab.analysis.findings import Finding
from stabilitylab.record.following import Follower
from stabilitylab.record.operations import Operation, Place, Precision, Step, Values, operation_from_json
from stabilitylab.record.tables import TABLES
from stabilitylab.reports.operations import facts, untraced

HALF = Values("mat1", (4, 8), "float16", -300.0, 400.0, 0)
OVERFLOW = Operation(
    edit=3,
    phase="edit",
    operator="aten.addmm.default",
    direction="forward",
    module="fc2",
    place=Place("/home/me/edit.py", 12, "apply", "y = fc2(x)"),
    made="producer",
    reach="weight",
    reached="fc2.weight",
    operands=(HALF,),
    settings={"beta": "1"},
    result=Values("", (4, 8), "float16", -100.0, 65000.0, 2),
    index=(0, 3),
    value="∞",
    chain=(Step("aten.mul.Tensor", "fc2", "forward", Place()),),
)
DIVISION = replace(
    OVERFLOW,
    operator="aten.div.Tensor",
    direction="backward",
    node="SqrtBackward0",
    operands=(Values("self", (4,), "float32", 0.0, 0.0, 0), Values("other", (4,), "float32", 0.0, 2.0, 0)),
    value="NaN",
)


class Rooted(nn.Module):
    """Where its two inputs are the same its gradient is 0/0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        encoded: Tensor = self.fc(inputs)
        return encoded


def broken(folder: Path, **options: Any) -> sl.Run:
    """Four edits, the third of which breaks the weights."""
    torch.manual_seed(0)
    model = Rooted()
    with sl.attach(model, "fc", folder, announce=False, **options) as monitor:
        for number in range(1, 5):
            one, other = torch.randn(2, 4), torch.randn(2, 4)
            with monitor.edit():
                model.zero_grad()
                apart = model(one) - model(one if number == 3 else other)
                apart.square().sum(-1).sqrt().sum().backward()
                with torch.no_grad():
                    assert model.fc.weight.grad is not None
                    model.fc.weight -= 0.01 * model.fc.weight.grad
    return sl.load(folder)


def test_an_operation_survives_being_written_and_read() -> None:
    with_more = replace(OVERFLOW, precisions=(Precision("float32", True, 3.1e5),), deterministic=True)
    for operation in (OVERFLOW, DIVISION, with_more):
        assert operation_from_json(operation.to_json()) == operation


def test_a_traced_run_names_its_operation_while_it_runs_and_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = broken(tmp_path / "run", trace=True)
    found = run.diagnosis().operation
    assert found is not None
    assert (found.edit, found.short, found.node, found.reach) == (3, "div", "SqrtBackward0", "weight")
    assert found.place.source.startswith("apart.square()")
    follower = Follower(tmp_path / "run", keeps_rows=True)
    seen = follower.look()
    assert seen[-1].diagnosis == run.diagnosis() == follower.run.diagnosis()
    assert [each.diagnosis.operation for each in seen[:3]] == [None, None, None]


def test_it_stands_in_the_sentence_in_the_chain_and_in_the_object(tmp_path: Path) -> None:
    diagnosis = broken(tmp_path / "run", trace=True).diagnosis()
    assert "by div, in the backward of line" in diagnosis.says
    roles = [link.role for link in diagnosis.causes]
    assert roles.count("operation") == 1
    plain = diagnosis.to_json()
    assert plain["operation"]["operator"] == "aten.div.Tensor"
    assert plain["operation"]["operands"][1]["least"] == 0.0


def test_what_was_not_traced_is_said_with_how_to_have_it_named(tmp_path: Path) -> None:
    run = broken(tmp_path / "run", trace=False)
    diagnosis = run.diagnosis()
    assert diagnosis.operation is None
    assert "STABILITYLAB_TRACE=3 " in untraced(run, diagnosis)
    assert untraced(run, replace(diagnosis, operation=OVERFLOW)) == ""
    assert untraced(run, replace(diagnosis, first_nonfinite_edit=None)) == ""


def test_of_a_file_that_was_written_before_there_was_a_tracer_nothing_is_missed(tmp_path: Path) -> None:
    run = broken(tmp_path / "run", trace=False)
    with sqlite3.connect(tmp_path / "run" / "run.db") as db:
        db.execute("DROP TABLE operation")
        for table in ("edit", "dry"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN trace_seconds")
            db.execute(f"ALTER TABLE {table} DROP COLUMN position")
        for table in TABLES:
            if table.name != "operation":
                db.execute(f"ALTER TABLE {table.name} DROP COLUMN crc")
        db.execute("PRAGMA user_version=2")
    old = sl.load(tmp_path / "run")
    assert old.operations == ()
    assert old.diagnosis() == run.diagnosis()
    assert old.trace_time_share == 0.0


@pytest.mark.parametrize(
    ("operations", "right"),
    [
        ([replace(OVERFLOW, edit=2), OVERFLOW], 1),
        ([replace(OVERFLOW, reach="gradient"), replace(OVERFLOW, phase="canary", reach="output"), OVERFLOW], 2),
        ([replace(OVERFLOW, phase="canary", made="arrived", reach="weight"), replace(OVERFLOW, reach="values")], 1),
        ([OVERFLOW, replace(OVERFLOW, phase="replay")], 1),
        ([replace(OVERFLOW, phase="canary", made="arrived")], None),
        ([replace(OVERFLOW, edit=4)], None),
        ([], None),
    ],
    ids=["of that edit", "that came furthest", "no follower", "made once more", "followers alone", "later", "none"],
)
def test_of_several_the_one_is_blamed_that_broke_the_model(operations: list[Operation], right: int | None) -> None:
    found = traced.blamed(operations, 3, lost=0, edits=9)
    assert found is (None if right is None else operations[right])


def test_nothing_is_claimed_of_a_model_that_is_sound_and_the_first_where_no_edit_lands() -> None:
    assert traced.blamed([OVERFLOW], None, lost=0, edits=9) is None
    assert traced.blamed([DIVISION, OVERFLOW], None, lost=9, edits=9) is DIVISION
    assert traced.blamed([OVERFLOW], None, lost=10, edits=40) is None


def test_what_was_there_before_the_first_edit_is_told_where_it_is_first_met() -> None:
    met = replace(OVERFLOW, edit=1, made="arrived")
    assert traced.blamed([met], 0, lost=0, edits=4) is met
    assert traced.blamed([replace(met, edit=2)], 0, lost=0, edits=4) is None


def test_its_sentence_says_where_what_with_and_how_far() -> None:
    said = traced.says(OVERFLOW)
    assert said.startswith("addmm, at line 12 of edit.py (`y = fc2(x)`), in fc2, gave the first ∞ from finite values")
    assert "mat1 -300 to 400 (float16)" in said
    assert said.endswith("It reached fc2.weight.")
    assert traced.where(DIVISION) == "div, in the backward of line 12 of edit.py"
    assert "in the canary's forward after edit 3" in traced.says(replace(OVERFLOW, phase="canary"))
    assert "that was there before" in traced.says(replace(OVERFLOW, made="arrived"))
    assert "that it was asked for" in traced.says(replace(OVERFLOW, made="designed"))
    long = replace(OVERFLOW, place=replace(OVERFLOW.place, source="y = f(" + "x, " * 60 + ")"))
    assert "(`y = f(x, x" in traced.says(long)
    assert "…`)" in traced.says(long)
    assert len(traced.says(long).split("`")[1]) == 100


@pytest.mark.parametrize(
    ("precisions", "kind", "words"),
    [
        ((Precision("float32", True, 3.1e5),), "range", "finite in float32, largest 3.1e5: its dtype's range"),
        ((Precision("float32", False), Precision("float64", False)), "algebra", "not finite in float64: its algebra"),
        ((Precision("float32", error="too little memory"),), None, "could not be made in float32 (too little memory)."),
        ((), None, "It reached fc2.weight."),
    ],
)
def test_what_other_precisions_say(precisions: tuple[Precision, ...], kind: str | None, words: str) -> None:
    replayed = replace(OVERFLOW, phase="replay", precisions=precisions)
    assert replayed.kind == kind
    assert words in traced.says(replayed)


def test_an_editor_that_is_not_deterministic_is_said_to_be_so() -> None:
    said = [traced.says(replace(OVERFLOW, phase="replay", deterministic=known)) for known in (True, False, None)]
    assert ["not deterministic" in each for each in said] == [False, True, False]
    assert "Made once more:" not in said[1]


def test_the_advice_is_about_that_line_and_what_went_into_it() -> None:
    masked = replace(OVERFLOW, operator="aten._softmax.default", operands=(replace(HALF, nonfinite=8),), value="NaN")
    assert "float16 ends at 65,504" in traced.advice(OVERFLOW)
    assert "away from zero" in traced.advice(DIVISION)
    assert "masked in full" in traced.advice(masked)
    assert "masks out" in traced.advice(replace(OVERFLOW, made="designed"))
    assert "wrote it" in traced.advice(replace(OVERFLOW, made="arrived"))
    sound = replace(DIVISION, operands=(HALF, replace(HALF, least=1.0)))
    assert "away from zero" not in traced.advice(sound)


def test_its_facts_for_a_page() -> None:
    told = dict(facts(OVERFLOW, {}))
    assert told["line"] == "edit.py:12, in apply (~/edit.py)"
    assert told["in: mat1"] == "float16 [4, 8], −300 to 400"
    assert told["out"] == "float16 [4, 8], −100 to 65,000, 2 not finite: ∞, the first at [0, 3]"
    assert (told["passed on by"], told["settings"], told["reached"]) == ("mul", "beta 1", "fc2.weight")
    unread = dict(facts(replace(OVERFLOW, operands=(Values("x", (2,), "bfloat16"),), result=None, index=None), {}))
    assert (unread["in: x"], unread["out"]) == ("bfloat16 [2], range not known", "∞")
    again = replace(OVERFLOW, precisions=(Precision("float32", True, 3.1e5),))
    assert dict(facts(again, {}))["once more"].startswith("Made once more: finite in float32, largest 3.1e5")
    assert "once more" not in told
    assert dict(facts(replace(OVERFLOW, operands=(replace(HALF, greatest=-300.0),)), {}))["in: mat1"].endswith(", −300")
    assert dict(facts(DIVISION, {}))["operation"] == "aten.div.Tensor, a part of SqrtBackward0"

    installed = replace(OVERFLOW, place=replace(OVERFLOW.place, file="/opt/env/lib/python3.11/site-packages/a/b.py"))
    assert dict(facts(installed, {}))["line"] == "b.py:12, in apply (a/b.py)"
    named = replace(OVERFLOW, module="m.h.1.fc", operands=(replace(HALF, name="mat1 (m.h.1.fc.weight)"),))
    short = dict(facts(named, {"m.h.1.fc": "1.fc"}))
    assert (short["layer"], short["in: mat1 (1.fc.weight)"]) == ("1.fc", "float16 [4, 8], −300 to 400")


def test_a_finding_of_the_canary_is_not_about_an_operation_inside_the_edit() -> None:
    """Both may be at ``model``: a loss is computed in the model's own forward."""

    def finding(metric: str) -> Finding:
        return Finding("nonfinite", metric, "model", 4, 3.0, 0.0, "Bad.", "non-finite")

    inside, outside = finding("logits.nonfinite"), finding("canary.nonfinite")
    operation = replace(DIVISION, edit=4, module="model", phase="edit")
    assert traced.its_finding(operation, [outside, inside]) is inside
    assert traced.its_finding(replace(operation, phase="canary"), [inside, outside]) is outside
    assert traced.its_finding(operation, [outside]) is None
