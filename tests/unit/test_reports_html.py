from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.analysis.grouping import grouped
from stabilitylab.errors import RunError
from stabilitylab.record.readings import EDITOR_SITE, EditRow, Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import RunWriter
from stabilitylab.reports import html, payload, pictures, thinning
from stabilitylab.reports.events import event_words, short_places
from stabilitylab.reports.text import number, with_short_names
from tests.synthetic import HOSTILE, make_run

HARMLESS = frozenset(
    "html head meta title style body header main section nav footer a h1 h2 h3 p strong span ul ol li dl dt dd div svg"  # noqa: SIM905
    " rect figure figcaption img details summary table thead tbody tr th td pre h4 label select option input button"
    " noscript script".split()
)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"]:
            self.said.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.said))


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "mend-vqa", edits=60, dies_at=44))


@pytest.fixture(scope="module")
def page(dying: Run) -> str:
    return html.render(dying)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>"
    made = make_run(folder, edits=14, dies_at=9, sites=len(HOSTILE), hostile_labels=True, closed=False)
    return html.render(load(made))


def test_the_verdict_comes_first_with_what_it_rests_on(dying: Run, page: str) -> None:
    diagnosis, said, places = dying.diagnosis(), Page(page).text, short_places(dying.sites)
    screen = said[: said.index("How it went")]
    assert screen.index("MEND on Blip2, float16: 60 edits, 24 November 2026") < screen.index(
        "The model was diverging from edit"
    )
    assert diagnosis.cause in screen
    for words in (diagnosis.cause_says, diagnosis.advice):
        assert said.count(with_short_names(words, places)[1:]) == 1
    first = said[said.index("took effect".capitalize()) : said.index("A line for what was found at one edit")]
    assert diagnosis.baseline[1:] in first
    assert diagnosis.thresholds.removeprefix("limits f") in first
    for words in (f"edit {diagnosis.onset_edit}", f"edit {diagnosis.alarm_edit}", f"edit {diagnosis.first_bad_edit}"):
        assert words in first
    assert f"{diagnosis.first_bad_site}" in first
    assert f"Not watched: {diagnosis.unwatched[0]}" in screen


def test_the_chain_of_causes_tells_each_once_in_the_order_of_the_story(dying: Run, page: str) -> None:
    diagnosis, places = dying.diagnosis(), short_places(dying.sites)
    said = Page(page).text
    told = said[said.rindex("How it went") : said.index("Took effect")]
    assert len(diagnosis.causes) > 1
    ends = [told.index(link.cause) for link in diagnosis.causes]
    assert ends == sorted(ends)
    for link in diagnosis.causes:
        assert (with_short_names(link.says, places)[1:] in told) == (link.cause != diagnosis.cause)


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_every_address_on_the_page_leads_to_a_place_on_it(which: str, request: pytest.FixtureRequest) -> None:
    attributes = Page(request.getfixturevalue(which)).attributes
    places = {value for _, name, value in attributes if name == "id"}
    within = {value[1:] for _, name, value in attributes if name == "href" and "=" not in value}
    assert within <= places
    assert {each for each in within if each.startswith("event-")}


def test_at_most_five_headings_stand_before_the_first_chart(page: str) -> None:
    tags = Page(page).tags
    assert len([tag for tag in tags[: tags.index("img")] if tag in {"h1", "h2", "h3", "h4"}]) <= 5


def test_what_was_found_stands_by_edit_and_layer_the_headlines_first(dying: Run, page: str) -> None:
    said = re.sub(r"\s+", " ", Page(page).text)
    listed = said[said.index("A line for what was found") : said.index("Each claim with its evidence")]
    events, places = grouped(dying.diagnosis().findings), short_places(dying.sites)
    words = [event_words(event, places) for event in events]
    assert all(each in listed for each in words)
    assert listed.index(words[0]) == min(listed.index(each) for each in words)
    at_once = listed[: listed.index("Show all")]
    assert sum(each in at_once for each in words) == html.TELLING


def test_every_finding_note_and_metric_is_on_the_page(dying: Run, page: str) -> None:
    said = Page(page).text
    for finding in dying.diagnosis().findings:
        assert f"{finding.says} {finding.metric} {finding.site} {number(finding.value)}" in re.sub(r"\s+", " ", said)
    for note in dying.notes:
        assert note.says in said
    for metric in dying.metrics:
        assert (metric.meaning in said) == bool(dying.sites_of(metric.name)), metric.name
    assert said.count("What digit is on picture") == 60
    assert "RuntimeError: no answer token" in said
    assert "restored" in said


def test_size_of_a_page_for_sixty_edits_at_four_layers(page: str) -> None:
    assert len(page.encode("utf-8")) < 2_000_000


def test_every_picture_has_words_in_its_place(dying: Run, page: str) -> None:
    images = [(name, value) for tag, name, value in Page(page).attributes if tag == "img"]
    alts = [value for name, value in images if name == "alt"]
    assert len(alts) == len([name for name, _ in images if name == "src"]) > 10
    diagnosis, (curve, *others) = dying.diagnosis(), alts
    assert f"alarm at edit {diagnosis.alarm_edit}" in curve
    assert f"NaN or ∞ at edit {diagnosis.first_nonfinite_edit}" in curve
    assert all(f"first bad at edit {diagnosis.first_bad_edit}" in alt for alt in others)


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_nothing_can_be_loaded_run_or_sent(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    assert set(page.tags) <= HARMLESS
    assert page.tags.count("style") == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in {"style", "srcset", "action"}, (tag, name)
        if name == "src":
            assert value.startswith("data:image/svg+xml;base64,")
        if name == "href":
            assert value.startswith("#")
    (policy,) = (value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    (sheet,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert page.tags.count("script") == len(scripts) + 3  # data, how it is drawn, and what draws it
    (packed,) = re.findall(r'<script type="text/plain" id="vega">(.*?)</script>', text, re.DOTALL)
    vega = zlib.decompress(base64.b64decode(packed)).decode("utf-8")
    hashes = " ".join(map(html.digest, [vega, *scripts]))
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {html.digest(sheet)}; script-src {hashes};"
        " base-uri 'none'; form-action 'none'"
    )


def test_hostile_text_is_shown_as_text_and_cut(hostile_page: str) -> None:
    said = Page(hostile_page).text
    assert "<script>document.title='owned'</script>" in said
    assert "{{7*7}}" in said
    assert r"abc\u202edcba" in said
    assert r"nul\x00 bell\x07" in said
    assert "\u202e" not in hostile_page
    assert "\x1b" not in hostile_page
    assert "mega" * 300 not in hostile_page
    assert max(len(word) for word in said.split()) < 1_000
    assert "This run was not closed" in said


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"closed": True}, [Metric("weight.max_abs", "1", "log", "after", "", "", "")])
    for edit, value in enumerate([0.3, np.inf, np.nan]):
        readings = {("weight.max_abs", "layer"): np.array([value])}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    said = Page(html.render(load(tmp_path / "run"))).text
    assert "∞" in said
    assert "Non-finite" in said


@pytest.mark.parametrize("edits", [None, 0])
def test_a_run_with_nothing_in_it_has_a_page(tmp_path: Path, edits: int | None) -> None:
    if edits is None:
        RunWriter(tmp_path / "run", {}, []).close()
    else:
        make_run(tmp_path / "run", edits=edits, dies_at=None)
    assert "Stable" in Page(html.render(load(tmp_path / "run"))).text


def test_readings_of_all_sizes_that_a_float_can_have_are_drawn(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"closed": True}, [Metric("update.norm", "1", "log", "after", "", "", "")])
    for edit in range(11):
        readings = {("update.norm", "layer"): np.array([10.0 ** (-300 + 60 * edit)])}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    drawn = pictures.pictures(load(tmp_path / "run"))
    assert len(drawn.heatmaps) == len(drawn.chapters) == 1


def test_a_single_row_is_a_table_of_its_readings_and_no_charts(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=0, dies_at=None, sites=2))
    page = Page(html.render(run))
    assert "img" not in page.tags
    assert f"editor.learning_rate {EDITOR_SITE} 1.1e−4, 9e−5, 1.3e−4, 8e−5 –" in page.text
    for site in run.sites_of("weight.headroom_bits"):
        assert f"weight.headroom_bits {site} 17.7 bits" in page.text


def test_a_family_that_we_do_not_know_gets_a_chapter(tmp_path: Path) -> None:
    metric = Metric("mine.size", "1", "linear", "after", "Something of my own.", "x", "—")
    writer = RunWriter(tmp_path / "run", {}, [metric])
    for edit in range(3):
        row = EditRow(
            edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings={("mine.size", "layer"): np.array([1.0 + edit])}
        )
        writer.append(row)
    writer.close()
    (chapter,) = pictures.pictures(load(tmp_path / "run")).chapters
    assert (chapter.title, [chart.title for chart in chapter.shown]) == ("mine", ["mine.size"])


def test_flagged_edits_are_never_thinned_away(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=500, dies_at=333, sites=1))
    listed, left_out = html.listed_edits(run)
    numbers = {edit.edit for edit in listed}
    diagnosis = run.diagnosis()
    needed = {finding.edit for finding in diagnosis.findings} | {0, 3, 7, 332, 500}
    needed |= {diagnosis.onset_edit, diagnosis.alarm_edit, diagnosis.first_bad_edit}  # type: ignore[arg-type]
    assert needed <= numbers
    assert len(listed) <= html.LISTED_EDITS
    assert left_out == 501 - len(listed)
    assert f"{left_out} quiet ones are left out" in Page(html.render(run)).text


def test_a_report_is_written_whole_or_not_at_all(dying: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_page", lambda run, plain: "<!DOCTYPE html>new")
    out = tmp_path / "deep" / "er" / "report.html"
    assert html.write_report(dying, out) == out
    assert out.read_text() == "<!DOCTYPE html>new"
    assert out.stat().st_mode & 0o044

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "_page", lambda run, plain: "<!DOCTYPE html>newer")
    monkeypatch.setattr(html.os, "replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        html.write_report(dying, out)
    assert out.read_text() == "<!DOCTYPE html>new"
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "report.json"]


def test_a_place_that_can_not_be_written_is_one_clear_line(dying: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't write a report") as caught:
        html.write_report(dying, tmp_path / "file" / "report.html")
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=r"a folder; expected a file such as .*report\.html"):
        html.write_report(dying, tmp_path)
    with pytest.raises(RunError, match=r"its data goes there; expected .*page\.html"):
        html.write_report(dying, tmp_path / "page.json")


def test_the_data_on_the_page_is_that_beside_it_and_that_of_the_run(dying: Run, tmp_path: Path) -> None:
    out = html.write_report(dying, tmp_path / "report.html")
    (inside,) = re.findall(
        r'<script type="application/json" id="report-data">(.*?)</script>', out.read_text(), re.DOTALL
    )
    beside = out.with_suffix(".json").read_text()
    assert not set("<>&") & set(inside)
    told = payload.unpacked(beside)
    assert told.pop("written_by") == "stabilitylab"
    assert payload.unpacked(inside) == told == payload.payload(dying)
    assert not any(token in beside for token in (": NaN", ": Infinity", ":NaN", ":Infinity"))


def test_a_picture_for_which_there_is_no_room_is_named(dying: Run) -> None:
    few, all_of_them = pictures.pictures(dying, budget=1), pictures.pictures(dying, budget=10**9)
    assert len(few.heatmaps) == 1
    assert not few.chapters
    drawn = [chart for each in all_of_them.chapters for chart in (*each.shown, *each.folded)]
    assert len(few.left_out) == len(drawn) + len(all_of_them.heatmaps) - 1
    assert not all_of_them.left_out


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, 0), (98_304.0, 98_304), (3.2e5, 320_000), (1.0e7, 1.0e7), (0.0320123, 0.03201), (-1234.56, -1235),
        (1.23456e-9, 1.235e-9),
        (0.45649996, 0.4564), (-0.9994999, -0.9994), (1e300, 1e300),
        (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"),
    ],
)  # fmt: skip
def test_a_value_in_json_reads_like_the_value(value: float, told: object) -> None:
    assert payload.shown(value) == told
    assert json.loads(json.dumps(payload.shown(value), allow_nan=False)) == told
    if not isinstance(told, str):
        assert number(float(told)) == number(value)  # type: ignore[arg-type]


def test_one_map_and_four_charts_go_on_paper_that_of_the_canary_among_them(dying: Run, page: str) -> None:
    drawn = pictures.pictures(dying)
    on_paper = pictures.printed(drawn)
    assert on_paper[0] == drawn.heatmaps[0]
    assert len(on_paper) == 1 + pictures.PRINTED
    assert any(chart.title.startswith("canary") for chart in on_paper)
    figures = re.findall(r"<figure([^>]*)>\s*<figcaption><h3>", page)
    assert figures.count("") == len(on_paper)


def test_many_values_are_told_like_each_one() -> None:
    draw = np.random.default_rng(0)
    values = np.concatenate([
        np.exp(20.0 * draw.standard_normal(2_000)), -np.exp(draw.standard_normal(2_000)),
        draw.integers(0, 20_000, 2_000) / 10_000, 1_000.0 + draw.standard_normal(50),
        [np.nan, np.inf, -np.inf, 0.0, -0.0, 999.96, 5e-324, 1.7e308, 1e6, 0.0005],
    ])  # fmt: skip
    assert payload.all_shown(values) == [payload.shown(value) for value in values.tolist()]
    rounded = [each if isinstance(each, str) else f"{each:.2e}" for each in payload.all_shown(values[:6_000])]
    assert rounded == [f"{value:.2e}" for value in values[:6_000].tolist()]


def test_every_reading_is_in_the_payload_where_there_is_room(dying: Run) -> None:
    plain = payload.payload(dying)
    names = [site["name"] for site in plain["sites"]]
    for metric in plain["metrics"]:
        edits = plain["grids"][metric["grid"]]
        assert {names[int(place)] for place in plain["data"]["series"][metric["name"]]} == set(
            dying.sites_of(metric["name"])
        )
        if metric["length"] > 1:
            continue
        assert edits == [edit.edit for edit in dying.edits]
        for place, values in plain["data"]["series"][metric["name"]].items():
            there = dying.present(metric["name"], names[int(place)])
            true = dying.series(metric["name"], names[int(place)])
            assert values == [
                payload.shown(value) if taken else None for value, taken in zip(true.tolist(), there, strict=True)
            ]


def test_thinned_readings_keep_what_is_flagged_and_fit(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=400, dies_at=300, sites=6))
    plain = payload.payload(run, budget=40_000)
    diagnosis = run.diagnosis()
    needed = {diagnosis.onset_edit, diagnosis.alarm_edit, diagnosis.first_bad_edit, diagnosis.first_nonfinite_edit}
    needed |= {finding.edit for finding in diagnosis.findings} | {7, 0, 400}
    for name in ("main", "other", "spectra"):
        assert needed <= set(plain["grids"][name])
        assert len(plain["grids"][name]) < 401
    assert len(plain["grids"]["main"]) >= len(plain["grids"]["other"])
    assert len(plain["data"]["edits"]["label"]) == 401
    assert len(json.loads(payload.packed(plain))["data"]) < 1.3 * 40_000


def test_names_that_were_cut_to_the_same_text_are_told_apart() -> None:
    assert payload.distinct(["a", "a (2)", "a", "b", "a"]) == ["a", "a (2)", "a (3)", "b", "a (4)"]


def test_names_in_the_payload_are_cut_cleaned_and_still_apart(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", edits=10, dies_at=6, sites=len(HOSTILE), hostile_labels=True)
    plain = payload.payload(load(made))
    names = [site["name"] for site in plain["sites"]]
    assert len(set(names)) == len(names) == len(load(made).sites)
    assert max(map(len, names)) < 200
    told = json.dumps(plain, ensure_ascii=False)
    assert not any(char in told for char in ("\u202e", "\x1b", "\u2028", "\ud800"))
    assert "mega" * 1_000 not in told


def test_the_payload_needs_no_library_that_draws() -> None:
    code = (
        "import sys, stabilitylab.reports.payload;"
        " assert not {'torch', 'matplotlib', 'jinja2', 'altair', 'vl_convert'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_that_fails_or_is_put_back_at_each_edit_lists_as_few_edits(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {}, [])
    for edit in range(3_001):
        writer.append(EditRow(edit, "", "failed" if edit % 2 else "applied", 0.0, 1.0, 0.0, 0.0))
        writer.outcome(edit, "restored")
    writer.close()
    run = load(tmp_path / "run")
    assert len(thinning.flagged_edits(run)) < 600
    listed, _ = html.listed_edits(run)
    assert len(listed) < 600


def test_what_is_furthest_out_is_never_thinned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabilitylab.reports.payload.MOST_EDITS", 50)
    metric = Metric("mine.size", "1", "linear", "after", "Something of my own.", "x", "—")
    writer = RunWriter(tmp_path / "run", {}, [metric])
    sizes = dict.fromkeys(range(400), 1.0) | {77: 1.5, 123: 0.5, 201: math.nan, 202: math.inf, 203: -math.inf}
    for edit, size in sizes.items():
        readings = {("mine.size", "layer"): np.array([size])}
        writer.append(EditRow(edit, "", "applied", 0.0, 1.0, 0.0, 0.0, readings=readings))
    writer.close()
    plain = payload.payload(load(tmp_path / "run"))
    assert {77, 123, 201, 203} <= set(plain["grids"]["all"])
    assert len(plain["grids"]["all"]) < 60
