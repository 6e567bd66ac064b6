"""What a notebook shows, in a real browser. Run with `make test-browser`; needs Debian's package `chromium`."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from stabilitylab.record.run import Run, load
from tests.browser import needs_chromium, visit
from tests.injections import ELSEWHERE, OWNED, hostile_run

pytestmark = needs_chromium
_PAGE = "<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>notebook</title></head><body>{}</body></html>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(hostile_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.mark.parametrize("kind", ["lines", "heatmap"])
def test_hostile_text_in_a_chart_is_drawn_and_nothing_else(hostile: Run, kind: str, tmp_path: Path) -> None:
    page = tmp_path / "chart.html"
    page.write_text(getattr(hostile.plot, kind)("update.norm").to_html(inline=True), encoding="utf-8")
    with visit(page) as seen:
        expect(seen.page.locator("canvas, svg.marks").first).to_be_visible(timeout=30_000)
        assert seen.page.title() != OWNED
        assert seen.page.evaluate(f"typeof window.{OWNED}") == "undefined"
        assert [address for address in seen.asked if ELSEWHERE in address] == []
        assert [line for line in seen.said if line.startswith(("error", "warning"))] == []


@pytest.mark.parametrize("dark", [False, True])
def test_hostile_text_in_a_table_is_shown_and_nothing_else(hostile: Run, dark: bool, tmp_path: Path) -> None:
    diagnosis = hostile.diagnosis()
    shown = [hostile, diagnosis, hostile.metrics, *diagnosis.findings[:20]]
    page = tmp_path / "tables.html"
    ground = "#111;color:#eee" if dark else "#fff;color:#222"
    body = "".join(each._repr_html_() for each in shown)
    page.write_text(_PAGE.format(f'<main style="background:{ground}"><h1>Run</h1>{body}</main>'), encoding="utf-8")
    with visit(page) as seen:
        assert seen.page.title() == "notebook"
        assert seen.page.evaluate(f"typeof window.{OWNED}") == "undefined"
        assert seen.asked == [page.absolute().as_uri()]
        assert seen.said == []
        assert seen.violations() == []
        seen.keep(f"notebook-{'dark' if dark else 'light'}")
