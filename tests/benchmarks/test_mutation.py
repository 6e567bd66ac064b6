"""What is drawn as a mutant, which tests are taken for it, and that they meet it and nothing else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from benchmarks import forked_tests, mutation

CODE = """from __future__ import annotations
__all__ = ["f", "g"]
LIMIT = 3
def f(x: int | None, most=2) -> int | None:
    y: int | str = (
        x + 1
    )
    if y > LIMIT + most:
        return most
    return y
"""


def test_what_only_type_checkers_read_is_no_mutant() -> None:
    assert mutation._effect(CODE) == mutation._effect(CODE.replace("|", "&").replace('"g"', '"h"'))
    assert mutation._effect(CODE) != mutation._effect(CODE.replace("+", "-"))
    guarded = "if TYPE_CHECKING:\n    LEAST = {}\n@overload\ndef f(x={}): ...\n"
    assert mutation._effect(guarded.format(1, 1)) == mutation._effect(guarded.format(2, 2))


@pytest.mark.parametrize(
    ("line", "tests"),
    [(6, ["narrow", "wide"]), (9, ["wide"]), (3, ["wide"]), (4, ["narrow", "wide"])],
    ids=[
        "a statement of several lines",
        "a branch",
        "a constant, by those that run what names it",
        "a function's head",
    ],
)
def test_a_line_meets_the_tests_that_run_it_and_then_the_others_of_their_files(
    tmp_path: Path, line: int, tests: list[str]
) -> None:
    (tmp_path / "stabilitylab" / "record").mkdir(parents=True)
    file = "stabilitylab/record/x.py"
    (tmp_path / file).write_text(CODE)
    narrow, wide, beside = "a.py::narrow", "b.py::wide", "b.py::beside"
    seen = {
        (file, 5): [narrow, wide],
        (file, 8): [wide],
        (file, 9): [wide],
        ("stabilitylab/record/y.py", 1): [beside, wide],
    }
    found = mutation.tests_for(file, line, tmp_path, seen)
    names = [each.partition("::")[2] for each in found]
    assert names == [*tests, "beside"]


def test_the_innermost_statement_without_what_it_holds() -> None:
    tree = ast.parse(CODE)
    assert [*mutation.lines_of(mutation.statement_at(tree, 6))] == [5, 6, 7]
    assert [*mutation.lines_of(mutation.statement_at(tree, 8))] == [8]


TESTED = """
import subject
def test_first(): assert subject.VALUE == 1
def test_second(): assert subject.VALUE < 3
def test_third(): assert subject.VALUE < 2
def test_left(): raise AssertionError
"""


def test_a_fork_reads_the_code_as_it_stands_and_runs_the_tests_in_their_order(tmp_path: Path) -> None:
    subject, compiled_before = tmp_path / "subject.py", sys.dont_write_bytecode
    subject.write_text("VALUE = 1\n")
    (tmp_path / "test_it.py").write_text(TESTED)
    nodes = [f"test_it.py::test_{name}" for name in ("third", "second", "first")]
    sound = forked_tests.run_tests(tmp_path, nodes, 60.0)
    assert (sound.failed_by, sound.ran) == (None, 3)
    sys.dont_write_bytecode = True
    try:
        with mutation.written(subject, "VALUE = 2\n"):
            assert forked_tests.run_tests(tmp_path, nodes[1:], 60.0).failed_by == nodes[2]
            assert forked_tests.run_tests(tmp_path, nodes, 60.0).failed_by == nodes[0]
        with mutation.written(subject, "VALUE = \n"):
            assert forked_tests.run_tests(tmp_path, nodes, 60.0).failed_by == "test_it.py"
        with mutation.written(subject, "import os\nos._exit(0)\n"):
            assert forked_tests.run_tests(tmp_path, nodes, 60.0).failed_by == "the process ends"
    finally:
        sys.dont_write_bytecode = compiled_before
    assert forked_tests.run_tests(tmp_path, nodes, 60.0).failed_by is None
    assert forked_tests.run_tests(tmp_path, nodes, 0.0).ran == 1
