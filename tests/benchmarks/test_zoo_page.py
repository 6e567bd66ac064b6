"""docs/zoo.md lists the scenarios that there are."""

from __future__ import annotations

from pathlib import Path

from benchmarks.zoo.page import MARK, tables

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def test_the_page_has_the_tables_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(MARK)[2] == tables()
