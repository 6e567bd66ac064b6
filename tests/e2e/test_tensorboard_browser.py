"""The tab "Stability" in a real TensorBoard and a real browser. Run with `make test-browser`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import FrameLocator, Page, expect

from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import FILE_NAME, RunWriter
from stabilitylab.reports.events import short_places
from stabilitylab.reports.headline import headline
from stabilitylab.reports.verdicts import causes
from tests.browser import Visit, needs_chromium, visit
from tests.injections import ELSEWHERE, INJECTIONS, OWNED, hostile_run
from tests.synthetic import make_run

pytestmark = needs_chromium
PATIENCE = 30_000
"""Milliseconds that a slow machine may take."""


@contextmanager
def tensorboard(logdir: Path, prefix: str = "") -> Iterator[str]:
    """A TensorBoard of its own on a free port; its address, with a slash at the end."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    options = ["--port", "0", "--load_fast", "false", "--path_prefix", prefix]
    with subprocess.Popen(
        [*command, *options], cwd=logdir, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(rf"at (http://127\.0\.0\.1:\d+{prefix}/)", line):
                    yield found[1]
                    return
            pytest.fail(f"TensorBoard did not start: {said}")
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logdir")
    make_run(folder / "mend" / "dying", edits=16, dies_at=12)
    make_run(folder / "healthy", edits=12, dies_at=None)
    hostile_run(folder / "hostile")
    (folder / "damaged").mkdir()
    (folder / "damaged" / FILE_NAME).write_bytes(b"no database" * 99)
    return folder


@pytest.fixture(scope="module")
def address(logdir: Path) -> Iterator[str]:
    with tensorboard(logdir) as running:
        yield running


@pytest.fixture(scope="module")
def seen(address: str) -> Iterator[Visit]:
    with visit(f"{address}#stability") as opened:
        opened.page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield opened


@pytest.fixture
def tab(seen: Visit) -> FrameLocator:
    frame = frame_of(seen.page)
    expect(frame.locator("nav")).not_to_contain_text("judging", timeout=PATIENCE)
    frame.get_by_role("tab", name="One run").click()
    return frame


@contextmanager
def another_page(seen: Visit, address: str, width: int = 1280, dark: bool = False) -> Iterator[Visit]:
    """A second page in the same browser: Playwright drives one at a time."""
    browser = seen.page.context.browser
    assert browser is not None
    theme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    yield Visit(page)
    page.close()


def frame_of(page: Page) -> FrameLocator:
    return page.frame_locator("iframe[src*='name=stability']")


def choose(tab: FrameLocator, run: str, verdict: str) -> None:
    tab.locator(f".runs button[data-run='{run}']").click()
    expect(tab.locator(".runs button[aria-current]")).to_have_attribute("data-run", run)
    expect(tab.locator(".verdict .badge")).to_contain_text(verdict)
    expect(tab.locator("#layer-name")).to_be_visible()


def choose_metric(tab: FrameLocator, metric: str) -> None:
    tab.get_by_label("Metric", exact=False).first.select_option(label=metric)
    expect(tab.locator("#map-readout")).to_contain_text(f"{metric} =")
    expect(tab.locator("tr.chosen th")).to_have_text(metric)


def said_values(text: str) -> list[float]:
    if text == "absent":
        return []
    return [float(word.replace("∞", "inf").replace("−", "-")) for word in text.split(" ")]


def assert_shown_as_in_the_file(tab: FrameLocator, run: Run) -> tuple[int, str]:
    """Every number that the tab says of the chosen edit and layer; returns which those are."""
    site = tab.locator("#layer-name").inner_text()
    number = int(tab.locator("#edit-name").inner_text().removeprefix("edit "))
    (edit,) = [edit for edit in run.edits if edit.edit == number]
    cells = tab.locator(".details td[data-metric]").evaluate_all(
        "cells => cells.map(cell => [cell.dataset.metric, cell.dataset.value])"
    )
    assert {name for name, _ in cells} == {m.name for m in run.metrics if site in run.sites_of(m.name)}
    for name, text in cells:
        expected = edit.row.readings.get((name, site), np.zeros(0)).tolist()
        np.testing.assert_array_equal(said_values(text), expected, err_msg=f"{name} at {site}, edit {number}")
    metric = tab.locator("tr.chosen th").inner_text()
    readout = tab.locator("#map-readout strong").get_attribute("data-value")
    assert readout == dict(cells)[metric].split(" ")[0]  # of several values the map has the first
    return number, site


def test_the_tab_lists_the_runs_and_names_what_cannot_be_read(seen: Visit, tab: FrameLocator, logdir: Path) -> None:
    assert "Stability" in seen.page.locator("app-header").inner_text().title()
    entries = tab.locator(".runs button")
    expect(entries).to_have_count(4)
    expect(entries.nth(1)).to_contain_text("stable · 12 edits")
    expect(entries.nth(3)).to_contain_text("non-finite · 16 edits")
    entries.nth(0).click()
    expect(tab.locator(".verdict")).to_contain_text("This run can't be read")
    expect(tab.locator(".verdict")).to_contain_text("is not a run file")
    choose(tab, "mend/dying", "Non-finite")
    diagnosis = load(logdir / "mend" / "dying").diagnosis()
    places = short_places(load(logdir / "mend" / "dying").sites)
    assert tab.locator("#says").inner_text() == headline(diagnosis, places)
    flags = (f"edit {diagnosis.onset_edit}", f"edit {diagnosis.first_bad_edit}")
    chain = [part for link in causes(diagnosis, places) for part in link]
    assert len(chain) > 3
    told = tab.locator(".verdict").inner_text().lower()
    for said in (*flags, diagnosis.cause, diagnosis.advice, *chain, "Took effect", *diagnosis.unwatched):
        assert said.lower() in told
    in_order = ["mend on blip2", headline(diagnosis, places), "why: ", "what to do", chain[4], "took effect"]
    found = [told.index(words.lower()) for words in in_order]
    assert found == sorted(found)
    curve = tab.locator(".curve svg")
    expect(curve).to_be_visible()
    marks = curve.locator(".mark-name").all_text_contents()
    assert any(f"NaN or ∞ {diagnosis.first_nonfinite_edit}" in words for words in marks)
    seen.keep("tensorboard-dying")


def test_a_click_on_the_map_shows_that_layer_and_edit_as_the_file_has_them(tab: FrameLocator, logdir: Path) -> None:
    choose(tab, "mend/dying", "Non-finite")
    run, visited = load(logdir / "mend" / "dying"), set()
    for metric in ("update.norm", "activation.rms", "gradient.spectrum"):
        choose_metric(tab, metric)
        visited.add(assert_shown_as_in_the_file(tab, run))
        box = tab.locator(".map-cells").bounding_box()
        assert box is not None
        for x, y in ((0.05, 0.45), (0.3, 0.6), (0.45, 0.7)):
            before = tab.locator("#edit-name").inner_text()
            tab.locator(".map-cells").click(position={"x": x * box["width"], "y": y * box["height"]})
            expect(tab.locator("#edit-name")).not_to_have_text(before)
            visited.add(assert_shown_as_in_the_file(tab, run))
    assert len(visited) > 3
    assert len({site for _, site in visited}) > 1


def test_the_map_is_used_with_the_keyboard(tab: FrameLocator, logdir: Path) -> None:
    choose(tab, "healthy", "Stable")
    choose_metric(tab, "drift.norm")
    chart = tab.get_by_role("application")
    chart.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        chart.press(key)
    expect(tab.locator("#edit-name")).to_have_text("edit 2")
    run = load(logdir / "healthy")
    assert assert_shown_as_in_the_file(tab, run) == (2, run.sites_of("drift.norm")[1])
    chart.press("+")
    expect(tab.get_by_role("button", name="whole run")).to_be_enabled()
    tab.get_by_role("button", name="whole run").click()
    tab.get_by_role("button", name="Edit after").click()
    expect(tab.locator("#edit-name")).to_have_text("edit 3")
    assert_shown_as_in_the_file(tab, run)


def test_lines_hold_every_reading(tab: FrameLocator, logdir: Path) -> None:
    choose(tab, "mend/dying", "Non-finite")
    choose_metric(tab, "update.norm")
    run = load(logdir / "mend" / "dying")
    lines = tab.locator(".split .line").evaluate_all(
        "lines => lines.map(line => [line.dataset.name, line.querySelector('.trace').getAttribute('d')])"
    )
    counted = {name: len(re.findall("[ML]", path)) for name, path in lines}
    wanted = [run.series("update.norm", site) for site in run.sites_of("update.norm")]
    assert sorted(counted.values()) == sorted(int((np.isfinite(line) & (line > 0)).sum()) for line in wanted)


def test_runs_are_compared_on_one_axis(seen: Visit, tab: FrameLocator, logdir: Path) -> None:
    tab.get_by_role("tab", name="Compare runs").click()
    rows = tab.locator("#verdicts tbody tr")
    expect(rows).to_have_count(4)
    expect(tab.locator("#verdicts")).not_to_contain_text("judging", timeout=PATIENCE)
    for place, name in ((1, "healthy"), (3, "mend/dying")):
        diagnosis = load(logdir / name).diagnosis()
        cells = rows.nth(place).locator("td").all_inner_texts()
        assert cells[1].endswith(diagnosis.verdict.capitalize())
        assert cells[2] == ("–" if diagnosis.verdict == "stable" else diagnosis.cause)
        assert cells[3].startswith(str(diagnosis.landed))
        assert cells[5] == ("–" if diagnosis.onset_edit is None else str(diagnosis.onset_edit))
        assert cells[6] == ("–" if diagnosis.first_bad_edit is None else str(diagnosis.first_bad_edit))
    tab.locator("#compare-metric").select_option("canary.agreement")
    lines = tab.locator("#view-compare .line")
    expect(lines).to_have_count(3)
    names = [lines.nth(place).get_attribute("data-name") for place in range(3)]
    assert names == ["healthy", "hostile", "mend/dying"]
    run = load(logdir / "healthy")
    path = lines.first.locator(".trace").get_attribute("d") or ""
    assert len(re.findall("[ML]", path)) == int(run.present("canary.agreement").sum())
    tab.get_by_label("Show hostile").uncheck()
    expect(lines).to_have_count(2)
    seen.keep("tensorboard-compare")
    tab.get_by_role("button", name="healthy", exact=True).click()
    expect(tab.locator(".verdict .badge")).to_contain_text("Stable")


def test_untrusted_text_stays_text(seen: Visit, tab: FrameLocator) -> None:
    """Opens every metric, every kind of card and each edit of a run that is made of injections."""
    choose(tab, "hostile", "Non-finite")
    body = tab.locator("body")
    for metric in range(tab.locator("#metric option").count()):
        tab.locator("#metric").select_option(index=metric)
        expect(tab.locator("tr.chosen th")).to_have_text(tab.locator("#metric option").nth(metric).inner_text())
    for details in tab.locator("details").all():
        details.evaluate("details => { details.open = true }")
    while tab.get_by_role("button", name="Edit before").is_enabled():
        tab.get_by_role("button", name="Edit before").click()
        tab.locator(".details .label").hover()
    assert INJECTIONS["script"] in body.inner_text()
    assert INJECTIONS["image"] in body.inner_text()
    assert body.locator("img, iframe, base, form, a, script:not([type=module]), style").count() == 0
    for frame in seen.page.frames:
        assert not frame.evaluate(f"() => '{OWNED}' in window")
        assert OWNED not in frame.title()
    assert body.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    tab.get_by_role("tab", name="Compare runs").click()
    expect(tab.locator("#verdicts")).to_contain_text("hostile")
    assert not [asked for asked in seen.asked if ELSEWHERE in asked.partition("?")[0]]
    seen.keep("tensorboard-hostile")


def test_a_run_grows_under_the_readers_eyes(tab: FrameLocator, logdir: Path) -> None:
    metric = Metric("update.norm", "1", "log", "after", "How far.", "‖ΔW‖", "—")
    writer = RunWriter(logdir / "alive", {"sites": ["fc1", "fc2"], "closed": False}, (metric,))

    def grow(edit: int) -> None:
        readings = {("update.norm", site): np.array([edit + 0.1 * place]) for place, site in enumerate(("fc1", "fc2"))}
        writer.append(EditRow(edit, f"number {edit}", "applied", 1.7e9, 1.0, 0.1, 0.0, None, readings))

    try:
        for edit in (1, 2):
            grow(edit)
        entry = tab.locator(".runs button[data-run='alive']")
        expect(entry).to_contain_text("2 edits")
        choose(tab, "alive", "Stable")
        expect(tab.locator("#edit-name")).to_have_text("edit 2")
        for edit in range(3, 8):
            grow(edit)
        expect(entry).to_contain_text("7 edits")
        expect(entry).to_contain_text("not closed")
        expect(tab.locator("#edit-name")).to_have_text("edit 7")
        assert_shown_as_in_the_file(tab, load(logdir / "alive"))
        tab.get_by_role("button", name="Edit before").click()
        grow(8)
        expect(entry).to_contain_text("8 edits")
        expect(tab.locator("#edit-name")).to_have_text("edit 6")  # what was chosen stays chosen
        writer.set_manifest({"closed": True})
        expect(entry).not_to_contain_text("not complete")
    finally:
        writer.close()


def test_it_follows_tensorboards_dark_mode(seen: Visit, tab: FrameLocator) -> None:
    choose(tab, "mend/dying", "Non-finite")
    paper = "() => getComputedStyle(document.body).backgroundColor"
    light = tab.locator("body").evaluate(paper)
    seen.page.evaluate("document.body.classList.add('dark-mode')")
    expect(tab.locator("html")).to_have_attribute("data-theme", "dark")
    assert tab.locator("body").evaluate(paper) != light
    seen.keep("tensorboard-dark")
    seen.page.evaluate("document.body.classList.remove('dark-mode')")
    expect(tab.locator("html")).to_have_attribute("data-theme", "light")


def test_nothing_was_complained_of_and_nothing_left_the_machine(seen: Visit, address: str) -> None:
    """Last of those that share the page: what all of them made it say and ask."""
    assert not [line for line in seen.said if line.startswith("error")]
    assert not [asked for asked in seen.asked if not asked.startswith((address, "data:", "blob:"))]
    assert [asked for asked in seen.asked if "/plugin/stability/values" in asked]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_axe_finds_nothing_serious(seen: Visit, address: str, width: int, dark: bool) -> None:
    """The plugin's own page, without TensorBoard around it."""
    with another_page(seen, f"{address}data/plugin_entry.html?name=stability", width, dark) as alone:
        page = alone.page
        page.locator(".runs button[data-run='mend/dying']").click()
        page.locator(".smalls svg").first.wait_for()
        for details in page.locator("details").all():
            details.evaluate("details => { details.open = true }")
        assert not alone.violations()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.get_by_role("tab", name="Compare runs").click()
        page.locator("#view-compare .line").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert not alone.violations()
        alone.keep(f"tensorboard-compare-{width}")


def until(done: Callable[[], bool]) -> None:
    for _ in range(150):
        if done():
            return
        time.sleep(0.2)
    pytest.fail("nothing changed in 30 seconds")


def test_the_tab_is_there_only_while_there_is_something_to_show(seen: Visit, tmp_path: Path) -> None:
    def active(address: str) -> bool:
        with urllib.request.urlopen(f"{address}data/plugins_listing") as answer:
            return bool(json.load(answer)["stability"]["enabled"])

    with tensorboard(tmp_path, "/behind/a/proxy") as address:
        assert not active(address)
        with another_page(seen, address) as other:
            other.page.get_by_text("No dashboards are active").wait_for()
            assert other.page.get_by_role("tab", name="Stability").count() == 0
            make_run(tmp_path / "first", edits=1, dies_at=None, sites=1)
            until(lambda: active(address))
            other.page.reload()
            other.page.get_by_role("tab", name="Stability").click()
            expect(frame_of(other.page).locator("#says")).to_contain_text("Stable over 1 edit")
