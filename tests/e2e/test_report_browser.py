"""The report in a real browser. Run with `make test-browser`; needs Debian's package `chromium`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from playwright.sync_api import Page, expect

from stabilitylab.record.run import Run, load
from stabilitylab.reports import html
from stabilitylab.reports.comparison import write_comparison
from stabilitylab.reports.html import write_report
from stabilitylab.reports.payload import payload
from stabilitylab.reports.pictures import PRINTED
from stabilitylab.reports.text import number
from tests.browser import Visit, needs_chromium, visit
from tests.injections import ELSEWHERE, OWNED, hostile_run
from tests.synthetic import make_run

pytestmark = needs_chromium
PATIENCE = 30_000
"""Milliseconds that a slow machine may take."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load(make_run(folder / "run", edits=20, dies_at=14))


@pytest.fixture(scope="module")
def report(run: Run, folder: Path) -> Path:
    return write_report(run, folder / "report.html")


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Path:
    return write_report(load(hostile_run(folder / "hostile")), folder / "hostile.html")


def ready(seen: Visit) -> Visit:
    seen.page.wait_for_selector("html[data-ready]", state="attached", timeout=PATIENCE)
    return seen


def quiet(seen: Visit) -> bool:
    """Whether nothing was said to the console, and nothing asked for but the page and its own pictures."""
    asked = [address for address in seen.asked if not address.startswith(("file:", "data:", "blob:"))]
    assert not seen.said
    assert not asked
    return True


def chosen(page: Page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(page.evaluate("location.hash.slice(1)")).items()}


def shown_readings(page: Page) -> dict[str, str]:
    cells = page.locator("#cell-readings tr")
    rows = [row.locator("th, td").all_text_contents() for row in cells.all()]
    return {metric: value for metric, value, _ in rows}


def readings_in_the_file(run: Run, edit: int, site: str) -> dict[str, str]:
    (row,) = (each.row for each in run.edits if each.edit == edit)
    told = {}
    for metric in run.metrics:
        values = row.readings.get((metric.name, site))
        if values is not None:
            words = ", ".join(number(value) for value in values[:4].tolist())
            told[metric.name] = f"{words}, …" if values.size > 4 else words
    return told


@pytest.fixture(scope="class")
def opened(report: Path) -> Iterator[Visit]:
    """One visit for all tests that leave the page usable; each goes to the address that it needs."""
    with visit(report) as seen:
        yield ready(seen)


class TestExploring:
    def test_the_first_bad_cell_is_what_one_sees_first(self, opened: Visit, run: Run) -> None:
        page, diagnosis = opened.page, run.diagnosis()
        assert page.locator("#edit-title").text_content() == f"Edit {diagnosis.first_bad_edit}"
        assert page.locator("#layer-title").text_content() == diagnosis.first_bad_site
        assert page.locator("#metric").input_value() == diagnosis.first_bad_metric
        assert page.locator("figure canvas").count() > 8
        opened.keep("report-1280")
        assert quiet(opened)

    @pytest.mark.parametrize("edit", [0, 5, 7, 14, 20])
    def test_numbers_on_the_page_are_those_of_the_run_file(self, opened: Visit, run: Run, edit: int) -> None:
        for site in (run.sites_of("update.norm")[1], "model"):
            opened.page.evaluate("hash => { location.hash = hash }", f"edit={edit}&site={site}")
            opened.page.wait_for_function(
                "told => document.getElementById('chosen').textContent.startsWith(told)", arg=f"Edit {edit}, {site}:"
            )
            assert shown_readings(opened.page) == readings_in_the_file(run, edit, site)
        label = next(each.label for each in run.edits if each.edit == edit)
        assert (label or "(before the first edit)") in (opened.page.locator("#edit-facts").text_content() or "")

    def test_every_control_changes_what_is_chosen_and_back_undoes_it(self, opened: Visit, run: Run) -> None:
        page = opened.page
        site = run.sites_of("update.norm")[0]
        page.evaluate("hash => { location.hash = hash }", f"edit=5&site={site}&metric=update.norm")
        page.wait_for_function("() => document.getElementById('chosen').textContent.startsWith('Edit 5,')")
        page.locator("#after").click()
        assert chosen(page)["edit"] == "6"
        page.locator("#before").click()
        assert chosen(page)["edit"] == "5"
        page.locator("#edit").fill("9")
        page.locator("#edit").press("Enter")
        assert chosen(page)["edit"] == "9"
        page.locator("#metric").select_option("gradient.norm")
        assert chosen(page) == {"edit": "9", "site": site, "metric": "gradient.norm"}
        other = run.sites_of("update.norm")[2]
        page.locator("#site").select_option(str(run.sites.index(other)))
        assert chosen(page)["site"] == other
        assert page.locator("#layer-title").text_content() == other
        page.locator("#site").select_option(str(run.sites.index("model")))  # its gradient was not read
        assert chosen(page)["site"] == "model"
        assert chosen(page)["metric"] in page.locator("#chosen").text_content()
        assert run.sites_of(chosen(page)["metric"]) == ("model",)
        page.go_back()
        page.wait_for_function(f"() => document.getElementById('layer-title').textContent === '{other}'")
        page.locator("#jumps button", has_text="onset").click()
        assert chosen(page)["edit"] == str(run.diagnosis().onset_edit)
        page.go_back()
        page.wait_for_function("() => document.getElementById('chosen').textContent.startsWith('Edit 9,')")
        page.go_back()
        page.wait_for_function(f"() => document.getElementById('layer-title').textContent === '{site}'")
        page.locator("#range").select_option("flagged")
        page.locator("#range").select_option("all")
        page.locator("details.term summary").click()
        assert run.metric("gradient.norm").meaning in (page.locator("#metric-facts").text_content() or "")
        assert quiet(opened)

    def test_the_map_is_used_by_mouse_and_by_keys(self, opened: Visit, run: Run) -> None:
        page = opened.page
        sites = run.sites_of("update.norm")
        page.evaluate("hash => { location.hash = hash }", f"edit=5&site={sites[0]}&metric=update.norm")
        page.wait_for_function("() => document.getElementById('chosen').textContent.startsWith('Edit 5,')")
        page.locator("#heatmap").focus()
        for key, edit, site in (
            ("ArrowRight", 6, 0), ("ArrowDown", 6, 1), ("ArrowLeft", 5, 1), ("ArrowUp", 5, 0), ("End", 20, 0),
            ("Home", 0, 0),
        ):  # fmt: skip
            page.keyboard.press(key)
            assert (chosen(page)["edit"], chosen(page)["site"]) == (str(edit), sites[site]), key
        box = page.locator("#heatmap canvas").bounding_box()
        assert box is not None
        across, down, hovered = box["x"] + box["width"] * 0.6, box["y"], ""
        while sites[1] not in hovered:  # below the names of the flagged edits, and the first row
            down += 4
            assert down < box["y"] + box["height"]
            page.mouse.move(across, down)
            hovered = page.locator("#hovered").text_content() or ""
        page.mouse.click(across, down)
        assert chosen(page)["site"] == sites[1]
        assert 10 < int(chosen(page)["edit"]) < 14
        assert page.locator("#chosen").text_content() == hovered
        value = run.series("update.norm", sites[1])[int(chosen(page)["edit"])]
        assert f"update.norm {number(float(value))}" in hovered
        page.locator("#timeline canvas").click(position={"x": 300, "y": 10})
        assert chosen(page)["site"] == sites[1]
        assert quiet(opened)

    def test_findings_are_sorted_filtered_and_followed(self, opened: Visit, run: Run) -> None:
        page, findings = opened.page, run.diagnosis().findings
        page.locator("#evidence > summary").click()
        visible = page.locator("#findings-table tbody tr:visible")
        page.locator("#findings-kinds").uncheck()
        assert visible.count() == len(findings)
        page.locator("#findings-verdict").select_option("non-finite")
        assert visible.count() == sum(finding.verdict == "non-finite" for finding in findings)
        page.locator("#findings-verdict").select_option("")
        page.locator("#findings-text").fill("update.norm")
        assert 0 < visible.count() < len(findings)
        page.locator("#findings-text").fill("")
        heading = page.locator("#findings-table th", has_text="Edit")
        for order in ("ascending", "descending"):
            heading.locator("button").click()
            assert heading.get_attribute("aria-sort") == order
            edits = [int(each) for each in page.locator("#findings-table tbody tr td:first-child").all_text_contents()]
            assert edits == sorted(edits, reverse=order == "descending")
        page.locator("#findings-table tbody a").first.click()
        assert chosen(page)["edit"] == str(max(finding.edit for finding in findings))
        assert quiet(opened)

    def test_what_makes_the_run_again_can_be_copied(self, opened: Visit) -> None:
        opened.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        opened.page.locator("#copy").click()
        expect(opened.page.locator("#copy")).to_have_text("Copied")
        copied = opened.page.evaluate("navigator.clipboard.readText()")
        assert copied == opened.page.locator("#reproduce").text_content()


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (400, False)])
def test_it_is_for_everyone_in_the_dark_and_on_a_phone(report: Path, width: int, dark: bool) -> None:
    with visit(report, width=width, dark=dark) as seen:
        ready(seen)
        assert not seen.violations()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        paper = "rgb(24, 30, 38)" if dark else "rgb(254, 254, 254)"
        assert seen.page.locator(".verdict").evaluate("it => getComputedStyle(it).backgroundColor") == paper
        seen.keep(f"report-{width}{'-dark' if dark else ''}")
        assert quiet(seen)


def test_a_change_of_colours_redraws_the_charts(report: Path) -> None:
    with visit(report) as seen:
        ready(seen)
        light = seen.page.locator("#line-0").screenshot()
        seen.page.emulate_media(color_scheme="dark")
        seen.page.wait_for_timeout(1_500)
        assert seen.page.locator("#line-0").screenshot() != light
        assert seen.page.locator("#line-0 canvas").count() == 1
        seen.page.emulate_media(media="print")
        seen.page.set_viewport_size({"width": 760, "height": 1_000})
        assert not seen.page.locator("nav").is_visible()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 760
        assert quiet(seen)


def test_on_paper_are_verdict_curve_map_charts_and_findings_on_at_most_four_pages(report: Path) -> None:
    with visit(report) as seen:
        ready(seen)
        pages = re.findall(rb"/Type\s*/Page\b", seen.page.pdf(format="A4"))
        assert 1 <= len(pages) <= 4
        seen.page.emulate_media(media="print")
        shown = seen.page.locator("figure img:visible").count()
        assert shown == 1 + 1 + PRINTED  # the curve, the map, the charts
        assert seen.page.locator("#events-table").is_visible()
        assert not seen.page.locator("#explore").is_visible()
        assert quiet(seen)


def test_a_claim_of_the_first_screen_leads_to_its_finding_also_in_a_fold(report: Path) -> None:
    with visit(report) as seen:
        ready(seen)
        links = seen.page.locator(".verdict a")
        assert links.count() >= 3
        for link in links.all():
            link.click()
            place = (link.get_attribute("href") or "")[1:]
            expect(seen.page.locator(f"[id='{place}']")).to_be_in_viewport()
        seen.page.locator("#more-events").evaluate("fold => { fold.open = false }")
        place = seen.page.locator("#more-events-table tr[id]").last.get_attribute("id")
        seen.page.evaluate("place => { location.hash = place }", place)
        expect(seen.page.locator(f"[id='{place}']")).to_be_in_viewport()
        assert quiet(seen)


def test_without_javascript_verdict_findings_and_pictures_stand(report: Path, run: Run) -> None:
    with visit(report, javascript=False) as seen:
        assert seen.page.locator(".says").is_visible()
        assert seen.page.locator("#findings-table tbody tr").count() > 0
        assert not seen.page.locator("#explore").is_visible()
        assert not seen.page.locator("#findings-controls").is_visible()
        pictures = seen.page.locator("figure img")
        assert pictures.first.is_visible()
        assert all(pictures.evaluate_all("all => all.map(each => each.naturalWidth > 0)"))
        seen.keep("report-without-javascript")
        assert quiet(seen)


def test_hostile_text_stays_text(hostile: Path) -> None:
    with visit(hostile) as seen:
        ready(seen)
        page = seen.page
        options = page.locator("#metric option").count()
        assert options > 20
        for place in range(0, options, 5):
            page.locator("#metric").select_option(index=place)
        for place in range(0, page.locator("#site option").count(), 4):
            page.locator("#site").select_option(index=place)
        for button in ("#after", "#before"):
            page.locator(button).click()
        page.locator("#evidence > summary").click()
        page.locator("#findings-text").fill("<script>")
        page.wait_for_timeout(500)
        assert page.evaluate(f"window.{OWNED}") is None
        assert OWNED not in page.title()
        assert not [address for address in seen.asked if ELSEWHERE in address]
        assert page.locator("iframe, base, link, object, embed").count() == 0
        assert page.locator("main").is_visible()
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", page.content())
        assert quiet(seen)
        seen.keep("report-hostile")


def test_several_runs_are_compared(folder: Path, run: Run) -> None:
    other = load(make_run(folder / "healthy", edits=20, dies_at=None))
    out = write_comparison([run, other], folder / "comparison.html")
    with visit(out) as seen:
        ready(seen)
        assert seen.page.locator("#lanes canvas").count() == 1
        assert seen.page.locator("#trade canvas").count() == 1
        verdict = seen.page.locator("#runs-table th", has_text="Verdict")
        for first in ("healthy", "run"):
            verdict.locator("button").click()
            assert seen.page.locator("#runs-table tbody th").first.inner_text() == first
        assert not seen.violations()
        seen.keep("comparison-1280")
        assert quiet(seen)


def test_hostile_runs_are_compared_as_text(hostile: Path, folder: Path) -> None:
    runs = [load(folder / "hostile"), load(hostile_run(folder / "<img src=x onerror=alert(1)>\u202e"))]
    with visit(write_comparison(runs, folder / "hostile-comparison.html")) as seen:
        ready(seen)
        assert seen.page.locator("#lanes canvas").count() == 1
        assert seen.page.locator("iframe, base, link, object, embed").count() == 0
        assert OWNED not in seen.page.title()
        assert seen.page.evaluate(f"window.{OWNED}") is None
        assert "<img src=x onerror=alert(1)>" in seen.page.locator("#runs-table").inner_text()
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", seen.page.content())
        assert quiet(seen)


def test_the_page_says_what_was_thinned_and_keeps_what_is_flagged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = load(make_run(folder / "long", edits=300, dies_at=250))
    monkeypatch.setattr(html, "payload", partial(payload, budget=30_000))
    out = write_report(long, folder / "long.html")
    kept = json.loads(out.with_suffix(".json").read_text())["grids"]["main"]
    assert len(kept) < 301
    with visit(out) as seen:
        ready(seen)
        said = seen.page.locator("#thinned").text_content() or ""
        assert f"of 301 rows, {len(kept)} for the main metrics" in said
        for edit in (long.diagnosis().onset_edit, long.diagnosis().alarm_edit, long.diagnosis().first_bad_edit):
            site = str(long.diagnosis().first_bad_site)
            seen.page.evaluate("hash => { location.hash = hash }", f"edit={edit}&site={site}&metric=editor.input_max")
            value = long.series("editor.input_max", site)[int(edit or 0)]
            told = f"Edit {edit}, {site}: editor.input_max {number(float(value))}"
            expect(seen.page.locator("#chosen")).to_contain_text(told)
        assert quiet(seen)
