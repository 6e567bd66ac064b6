"""The page of a scan in a real browser. Run with `make test-browser`; needs Debian's package `chromium`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stabilitylab.record.run import load
from stabilitylab.reports.html import write_report
from stabilitylab.reports.scan_html import write_scan
from tests.browser import Visit, needs_chromium, visit
from tests.injections import ELSEWHERE, OWNED
from tests.scans import EVERY, dying
from tests.synthetic import make_run

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scans")
    for name, which in EVERY.items():
        write_scan(*which(), made / f"{name}.html")
    return made


def quiet(seen: Visit) -> bool:
    """Whether nothing was said to the console, and nothing asked for but the page."""
    assert not seen.said
    assert not [address for address in seen.asked if not address.startswith("file:")]
    return True


def column(seen: Visit, table: str, place: int) -> list[str]:
    rows = seen.page.locator(f"section:has(#{table}) tbody tr")
    return [row.locator("th, td").nth(place).inner_text().strip() for row in rows.all()]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
def test_it_fits_and_is_for_everybody(folder: Path, name: str, width: int, dark: bool) -> None:
    with visit(folder / f"{name}.html", width=width, dark=dark) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        assert not seen.violations(("minor", "moderate", "serious", "critical"))
        if name == "dying":
            seen.keep(f"scan-{width}-{'dark' if dark else 'light'}")
        assert quiet(seen)


def test_on_paper_it_is_short_and_says_what_is_left_out(folder: Path) -> None:
    with visit(folder / "large.html") as seen:
        assert 1 <= len(re.findall(rb"/Type\s*/Page\b", seen.page.pdf(format="A4"))) <= 4
        seen.page.emulate_media(media="print")
        folded = seen.page.locator("details.screen")
        assert 1 <= folded.count() <= seen.page.locator("p.paper:visible").count()
        assert not [fold for fold in folded.all() if fold.is_visible()]


def test_tables_sort_by_number(folder: Path) -> None:
    with visit(folder / "dying.html") as seen:
        before = column(seen, "layers", 2)
        assert before == ["17.3", "17.7", "17.3", "1.8", "16.7", "17.3"]
        seen.page.locator("section:has(#layers) button", has_text="Headroom").click()
        assert column(seen, "layers", 2) == sorted(before, key=float)
        steps = seen.page.locator("section:has(#capacities) button", has_text="Steps")
        steps.click()
        steps.click()
        assert column(seen, "capacities", 1) == ["∞", "118×", "41×", "3.2×"]
        assert quiet(seen)


def test_without_javascript_all_of_it_is_there(folder: Path) -> None:
    _, cautions = dying()
    with visit(folder / "dying.html", javascript=False) as seen:
        text = seen.page.locator("main").inner_text()
        assert all(caution.says in text for caution in cautions)
        heights = [column.bounding_box() for column in seen.page.locator(".columns svg").all()]
        assert len(heights) == 6
        assert all(box is not None and box["height"] > 50 for box in heights)
        assert len(column(seen, "layers", 0)) == 6


def test_nothing_of_a_hostile_scan_runs(folder: Path) -> None:
    with visit(folder / "hostile.html") as seen:
        seen.page.wait_for_selector("html[data-ready]", state="attached")
        assert seen.page.evaluate(f"window.{OWNED}") is None
        assert seen.page.title() != OWNED
        assert not [address for address in seen.asked if ELSEWHERE in address]
        assert quiet(seen)


def test_a_runs_report_tells_what_came_true(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=20, dies_at=14))
    run.manifest["scan"] = dying()[0].to_json(brief=True)
    with visit(write_report(run, tmp_path / "report.html")) as seen:
        seen.page.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
        badges = seen.page.locator("section:has(#known) .badge", has_text="came true at edit 14")
        assert badges.count() > 0
        assert not seen.violations()
        seen.page.locator("#known").scroll_into_view_if_needed()
        seen.keep("report-known-before")
