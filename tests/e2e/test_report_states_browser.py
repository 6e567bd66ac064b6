"""The report of each kind of run, as it is met: light, dark, on a desk, on a phone, on paper. `make test-browser`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from benchmarks.analysis import rows_of
from benchmarks.docs_assets import kept
from stabilitylab.probes.registry import probes_of
from stabilitylab.record.readings import EditRow, Note
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports.comparison import write_comparison
from stabilitylab.reports.html import write_report
from tests.browser import SCREENSHOTS, Visit, needs_chromium, visit

pytestmark = needs_chromium
PATIENCE = 60_000
"""Milliseconds that a slow machine may take."""
MEGABYTES = {"healthy": 1.2, "dead": 1.2, "demo": 1.2, "three-edits": 1.2, "large": 2.5, "compared": 1.2}
STATES = tuple(MEGABYTES)


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The page of a state, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("states")
    runs = {name: load(path) for name, path in kept.unpack(folder).items()}
    makers: dict[str, Callable[[], Path]] = {
        "healthy": partial(write_report, runs["grace"], folder / "healthy.html"),
        "demo": partial(write_report, runs["demo"], folder / "demo.html"),
        "dead": lambda: write_report(_first(runs["demo"], 20, folder / "dead"), folder / "dead.html"),
        "three-edits": lambda: write_report(_first(runs["demo"], 3, folder / "three"), folder / "three.html"),
        "large": lambda: write_report(_large(folder / "large"), folder / "large.html"),
        "compared": lambda: write_comparison(
            [runs["demo"], runs["malmen"], runs["mend-ball"]], folder / "compared.html"
        ),
    }
    return cache(lambda state: makers[state]())


def _first(run: Run, edits: int, folder: Path) -> Run:
    """The run as it was when it had so many edits."""
    writer = RunWriter(folder, {**run.manifest, "closed": True}, run.metrics)
    for edit in run.edits[: edits + 1]:
        writer.append(edit.row)
    writer.close()
    return load(folder)


def _large(folder: Path) -> Run:
    metrics = tuple(metric for probe in probes_of("default") for metric in probe.metrics)
    writer = RunWriter(folder, {"closed": True}, metrics)
    rows: list[EditRow] = list(rows_of("growing", 1_000, 50, metrics))
    for row in rows:
        writer.append(row)
    writer.close()
    return load(folder)


def ready(seen: Visit) -> Page:
    seen.page.wait_for_selector("html[data-ready]", state="attached", timeout=PATIENCE)
    return seen.page


def check(seen: Visit, state: str, width: int) -> None:
    """In light and in dark: nothing serious for people with disabilities, nothing wider than the window."""
    for dark in (False, True):
        seen.page.emulate_media(color_scheme="dark" if dark else "light")
        seen.page.wait_for_timeout(300)
        assert not seen.violations()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        seen.keep(f"state-{state}-{width}{'-dark' if dark else ''}")
    assert not seen.said
    assert not [asked for asked in seen.asked if not asked.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("state", STATES)
def test_at_a_desk_and_on_paper(page_of: Callable[[str], Path], state: str) -> None:
    with visit(page_of(state)) as seen:
        page = ready(seen)
        paper = page.pdf(format="A4")
        assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 4
        check(seen, state, 1280)
        (SCREENSHOTS / f"state-{state}.pdf").write_bytes(paper)
        if state != "compared":
            check_first_screen(page, least_links=0 if state == "healthy" else 2)


def check_first_screen(page: Page, least_links: int) -> None:
    """Few headings before the first picture, all of it on a screen, and what is claimed leads to what it rests on."""
    headings = page.evaluate("""() => {
        const drawn = document.querySelector("main img, main canvas");
        const before = (it) => it.compareDocumentPosition(drawn) & Node.DOCUMENT_POSITION_FOLLOWING;
        return [...document.querySelectorAll("h1, h2, h3, h4")].filter(before).length;
    }""")
    assert 1 <= headings <= 5
    box = page.locator(".verdict").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 900
    links = page.locator(".verdict a")
    assert links.count() >= least_links
    for link in links.all():
        link.click()
        place = (link.get_attribute("href") or "")[1:]
        expect(page.locator(f"[id='{place}']")).to_be_in_viewport()


@pytest.mark.parametrize("state", STATES)
def test_on_a_phone(page_of: Callable[[str], Path], state: str) -> None:
    with visit(page_of(state), width=400) as seen:
        says = ready(seen).locator(".says")
        if state != "compared":
            sizes = says.evaluate(
                "it => [it.getBoundingClientRect().height, parseFloat(getComputedStyle(it).lineHeight)]"
            )
            assert round(sizes[0] / sizes[1]) <= 4
        check(seen, state, 400)


@pytest.mark.parametrize("state", STATES)
def test_a_page_is_small_enough_to_be_mailed(page_of: Callable[[str], Path], state: str) -> None:
    assert page_of(state).stat().st_size < 1e6 * MEGABYTES[state]


def test_on_a_phone_what_is_long_is_folded_and_drawn_when_it_is_unfolded(page_of: Callable[[str], Path]) -> None:
    with visit(page_of("demo"), width=400) as seen:
        page = ready(seen)
        assert page.locator("#canary-0 canvas").count() == 0
        page.locator("#canary details.fold > summary").click()
        expect(page.locator("#canary-0 canvas")).to_be_visible(timeout=PATIENCE)
        assert page.locator("#canary-0 canvas").bounding_box()["width"] > 250  # type: ignore[index]
        page.set_viewport_size({"width": 1280, "height": 900})
        expect(page.locator("#editor-0 canvas")).to_be_visible(timeout=PATIENCE)
        assert not seen.said


def test_a_run_without_findings_opens_on_a_metric_that_moves(page_of: Callable[[str], Path]) -> None:
    with visit(page_of("healthy")) as seen:
        page = ready(seen)
        metric = page.locator("#metric").input_value()
        run = load(page_of("healthy").parent / "runs" / "grace")
        assert any(np.unique(run.series(metric, site)).size > 2 for site in run.sites_of(metric))
        assert all(np.unique(run.series("update.norm", site)).size == 1 for site in run.sites_of("update.norm"))


def test_the_map_names_its_lines_and_no_name_lies_on_another(page_of: Callable[[str], Path]) -> None:
    with visit(page_of("demo")) as seen:
        page = ready(seen)
        told = page.evaluate("""() => {
            const told = page.json("report-data").diagnosis;
            const marks = [["onset", told.onset_edit], ["alarm", told.alarm_edit], ["first bad", told.first_bad_edit]];
            return Charts.names(marks.map(([name, edit]) => ({ name, edit })), { first: -0.5, last: 31.5 }, 900);
        }""")
        diagnosis = load(page_of("demo").parent / "runs" / "demo").diagnosis()
        edits = {"onset": diagnosis.onset_edit, "alarm": diagnosis.alarm_edit, "first bad": diagnosis.first_bad_edit}
        assert {row["words"] for row in told} == {f"{name} {edit}" for name, edit in edits.items()}
        close = [row["row"] for row in told if row["name"] in {"onset", "alarm"}]
        assert len(set(close)) == 2  # one edit apart
        crowded = page.evaluate(
            'Charts.names([{ name: "onset", edit: 2 }, { name: "alarm", edit: 2 }], { first: 0, last: 3 }, 300)'
        )
        assert [row["words"] for row in crowded] == ["onset · alarm 2"]


def test_a_metric_that_a_single_run_has_says_which(page_of: Callable[[str], Path]) -> None:
    with visit(page_of("compared")) as seen:
        page = ready(seen)
        names = page.evaluate("""async () => {
            const charts = new Charts(page.json("report-charts"), { named: true });
            const points = [{ edit: 0, site: "demo", value: 1, lane: 4 }, { edit: 1, site: "demo", value: 2, lane: 4 }];
            await charts.draw("lanes", "lines.linear", { points }, { first: 0, last: 1 });
            return charts.view("lanes").scenegraph().root.items[0].items
                .filter((mark) => mark.role === "legend").flatMap((mark) => mark.items).length;
        }""")
        assert names >= 1


def test_ticks_are_written_as_numbers_are_elsewhere(page_of: Callable[[str], Path]) -> None:
    with visit(page_of("demo")) as seen:
        page = ready(seen)
        told = page.evaluate("""async () => {
            const charts = new Charts(page.json("report-charts"), {});
            const words = {};
            for (const [kind, values] of [["linear", [-8000, 6000]], ["log", [0.03, 4e9]]]) {
                const points = values.map((value, edit) => ({ edit, site: "a", value, lane: 4 }));
                await charts.draw("band", `lines.${kind}`, { points }, { first: 0, last: 1 });
                const all = [];
                const walk = (item) => {
                    if (item.role === "axis-label") all.push(...item.items.map((each) => each.text));
                    (item.items ?? []).forEach(walk);
                };
                walk(charts.view("band").scenegraph().root);
                words[kind] = all.filter((each) => each !== "");
            }
            return words;
        }""")
        assert {"5,000", "−5,000"} <= set(told["linear"])
        powers = [each for each in told["log"] if "e" in each]
        assert powers
        assert all(re.fullmatch(r"1e\d+", each) for each in powers)  # none of the ticks between, and no plus
        assert not seen.said


def test_long_names_do_not_widen_a_phones_page(tmp_path: Path) -> None:
    names = [f"a_name_of_a_container_that_is_long.the_{place}_output_projection_that_has_a_name" for place in range(5)]
    metrics = tuple(
        metric for probe in probes_of("default") for metric in probe.metrics if metric.name == "update.norm"
    )
    writer = RunWriter(tmp_path / "run", {"closed": True, "sites": names}, metrics)
    writer.note(Note(0, "sites-discovered", f"edit 1 moved {', '.join(names)}"))
    for edit in range(4):
        readings = {("update.norm", name): np.array([1.0 + edit]) for name in names}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    with visit(write_report(load(tmp_path / "run"), tmp_path / "page.html"), width=400) as seen:
        page = ready(seen)
        page.locator("details").evaluate_all("all => all.forEach((each) => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert not seen.said
