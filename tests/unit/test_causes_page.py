"""The page of causes is what the rules say of themselves."""

from __future__ import annotations

from pathlib import Path

from stabilitylab.analysis.causes import RULES
from stabilitylab.analysis.findings import VERDICTS
from stabilitylab.reports.causes_page import MARK, causes_part

PAGE = Path(__file__).resolve().parents[2] / "docs" / "causes.md"


def test_the_page_holds_what_the_rules_say() -> None:
    written, mark, made = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark + made == causes_part()
    assert all(f"`{verdict}`" in written for verdict in VERDICTS)


def test_every_cause_has_a_name_of_its_own_and_all_its_texts() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert all(text.endswith(".") for text in (rule.mechanism, rule.seen, rule.example, rule.fix)), rule.name
