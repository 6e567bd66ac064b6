"""The page of a scan, its console text, and what a run's report says of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from stabilitylab.analysis.caution import URGENCIES, Caution
from stabilitylab.analysis.cautions import cautions
from stabilitylab.record.run import Run, load
from stabilitylab.record.scanned import PrecisionScan, Scan, scan_from_json
from stabilitylab.reports import html
from stabilitylab.reports.console import diagnosis_page
from stabilitylab.reports.known_before import known_before
from stabilitylab.reports.scan_console import scan_page
from stabilitylab.reports.scan_html import page, write_scan
from stabilitylab.reports.scan_words import bits, capacity_share, counts_words, plain, price, ranked
from tests.injections import OWNED
from tests.scans import EVERY, dying, empty, healthy, hostile, large
from tests.synthetic import make_run

HARMLESS = frozenset(
    "html head meta title style body header main section nav footer a h1 h2 h3 p strong span ul ol li dl dt dd div svg"  # noqa: SIM905
    " rect details summary table thead tbody tr th td script wbr".split()
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
        if self.tags[-1:] not in (["script"], ["style"]):
            self.said.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.said))


def told(scan: Scan, cautioned: tuple[Caution, ...], width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(scan_page(scan, cautioned))
    return captured.get()


def scanned(path: Path, scan: object) -> Run:
    run = load(path)
    run.manifest["scan"] = scan
    return run


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", edits=20, dies_at=14)


class TestPage:
    def test_warnings_come_first_and_say_what_to_do(self) -> None:
        scan, cautioned = dying()
        text = Page(page(scan, cautioned)).text
        places = [text.index(f"{caution.says} What to do: {caution.advice}") for caution in cautioned]
        assert places == sorted(places)
        assert places[-1] < text.index("What each layer has left")
        for caution in cautioned:
            assert f"may lead to {caution.cause}" in text or not caution.cause

    def test_every_figure_is_told(self) -> None:
        scan, cautioned = dying()
        text = Page(page(scan, cautioned)).text
        for held in (*scan.tensors, *scan.moments):
            assert held.name in text
        for words in (
            "layers.2 (to be edited) fatal 1.8 18,820",
            "unit 17, row 0, position 0, token 2",
            "1: 17 (41)",  # the outlier row, 41 times the median
            "255 of 256",
            "1.2e−4, 9.4e−5, −3.1e−5, 1.1e−4",
            "optimizer.pt a pickle: say --pickle to read it",
        ):
            assert words in text, words

    def test_layers_stand_in_the_order_of_the_model_and_capacities_weakest_first(self) -> None:
        text = Page(page(*dying())).text
        layers = text[text.index("Bits from its largest entry") : text.index("until the canary is lost")]
        assert re.findall(r"layers\.(\d) \(", layers) == ["0", "1", "2", "3"]
        moved = text[text.index("until the canary is lost") : text.index("The largest activation of each layer")]
        assert re.findall(r"layers\.(\d)\.fc2", moved) == ["2", "1", "0", "3"]

    @pytest.mark.parametrize("which", EVERY)
    def test_it_says_what_a_scan_can_t_know(self, which: str) -> None:
        scan, cautioned = EVERY[which]()
        text = Page(page(scan, cautioned)).text
        assert "whether edits feed on one another" in text
        assert ("Nothing is known here of activations" in text) == (not scan.activations)

    def test_a_columns_name_ends_its_lines_between_its_parts(self) -> None:
        names = re.findall(r'<span class="name">(.*?)</span>', page(*healthy()))
        assert any("_<wbr>" in name or ".<wbr>" in name for name in names)

    def test_sort_keys_are_the_numbers_of_the_cells(self) -> None:
        text = page(*dying())
        assert 'data-key="18820">18,820<' in text
        assert 'data-key="Infinity">∞<' in text

    @pytest.mark.parametrize("which", EVERY)
    def test_nothing_on_it_runs_loads_or_leads_elsewhere(self, which: str) -> None:
        text = page(*EVERY[which]())
        seen = Page(text)
        assert set(seen.tags) <= HARMLESS
        assert seen.tags.count("style") == 1
        for tag, name, value in seen.attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in {"style", "src", "srcset", "action"}, (tag, name)
            assert name != "href" or value.startswith("#")
        (policy,) = (value for tag, name, value in seen.attributes if value.startswith("default-src"))
        scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        assert len(scripts) == seen.tags.count("script") == 2
        (sheet,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        for part in (*scripts, sheet):
            assert html.digest(part) in policy
            assert OWNED not in part
        anchors = {value for _, name, value in seen.attributes if name == "id"}
        links = {value[1:] for _, name, value in seen.attributes if name == "href"}
        assert links <= anchors
        assert len(anchors) == sum(name == "id" for _, name, _ in seen.attributes)

    def test_all_of_it_stands_without_javascript(self) -> None:
        text = re.sub(r"<script>.*?</script>", "", page(*dying()), flags=re.DOTALL)
        seen = Page(text)
        assert "hidden" not in {name for _, name, _ in seen.attributes}
        assert "noscript" not in seen.tags
        assert seen.tags.count("table") == 9

    def test_no_number_is_written_as_python_has_it(self) -> None:
        cells = re.findall(r"<t[dh][^>]*>([^<]*)<", page(*hostile()))
        assert len(cells) > 1_000
        assert not [cell for cell in cells if re.search(r"\b(nan|inf|None)\b", cell)]

    def test_bars_stay_within_their_frames_whatever_the_figures(self) -> None:
        for which in EVERY.values():
            for tag, name, value in Page(page(*which())).attributes:
                if tag == "rect" and name in {"x", "y", "width", "height"}:
                    assert 0 <= float(value) <= 100, (name, value)

    def test_two_thousand_tensors_stay_small_and_those_left_out_are_counted(self) -> None:
        scan, cautioned = large()
        text = page(scan, cautioned)
        assert len(text.encode()) < 1_500_000
        assert len(scan.tensors) == 2_002
        assert "And 1,602 more, in the data beside this page." in Page(text).text
        for caution in cautioned:  # a tensor that is warned of is never left out
            assert f'<th scope="row" class="site mono">{caution.place}<' in text

    def test_nothing_to_warn_of_is_said(self) -> None:
        text = Page(page(*healthy())).text
        assert "Nothing out of the ordinary in 42 tensors." in text
        assert "Warnings" not in text
        assert "Nothing out of the ordinary in 0 tensors." in Page(page(*empty())).text

    def test_it_is_written_with_its_data_beside_it(self, tmp_path: Path) -> None:
        scan, cautioned = dying()
        out = write_scan(scan, cautioned, tmp_path / "made" / "page.html")
        assert out.read_text("utf-8") == page(scan, cautioned, "page.json")
        data = json.loads((tmp_path / "made" / "page.json").read_text())
        assert data.pop("written_by") == "stabilitylab"
        assert [Caution(**each) for each in data.pop("cautions")] == list(cautioned)
        assert data.pop("urgencies") == {"fatal": 2, "risk": 2, "note": 1}
        assert scan_from_json(data) == scan

    def test_hostile_data_is_json_without_numbers_that_are_none(self) -> None:
        text = json.dumps(plain(*hostile()), allow_nan=False)
        assert json.loads(text)["seconds"] == "NaN"


class TestConsole:
    @pytest.mark.parametrize("which", EVERY)
    def test_no_line_is_over_eighty_columns_and_none_steers_a_terminal(self, which: str) -> None:
        text = told(*EVERY[which]())
        assert max(map(len, text.splitlines())) <= 80 + 300 * (which == "hostile")  # marks that take no column
        assert "\x1b" not in text
        assert "\u202e" not in text

    def test_no_word_of_the_table_is_cut(self) -> None:
        lines = told(*dying()).splitlines()
        (heading,) = (line.split() for line in lines if "bits left" in line)
        assert heading == ["layer", "bits", "left", "largest", "norm", "NaN,", "∞", "0", "rows", "outliers"]
        (second,) = (line.split() for line in lines if line.startswith("✖ layers.2"))
        assert [*second[:4], *second[5:]] == ["✖", "layers.2", "*", "1.8", "18,820", "4.45", "·", "·", "1"]

    def test_warnings_stand_before_figures_with_what_to_do(self) -> None:
        scan, cautioned = dying()
        text = re.sub(r"\s+", " ", told(scan, cautioned, 100))
        places = [text.index(caution.advice) for caution in cautioned]
        assert max(places) < text.index("What each layer has left")
        assert text.startswith("✖ 2 fatal, 2 risks, 1 note blip2-digits-fp16")

    def test_of_many_layers_those_that_are_warned_of_are_shown(self) -> None:
        scan, _ = large()
        caution = Caution("x", "fatal", "model.layers.150.fc1.weight", "It is lost.", "")
        text = told(scan, (caution,))
        assert "✖ layers.150" in text
        assert "and 186 more" in text
        assert len(text.splitlines()) < 40


class TestWords:
    def test_the_price_of_a_precision(self) -> None:
        def says(**more: object) -> str:
            given = {"entries": 100, "overflowing": 0, "vanishing": 0, "headroom_bits": 114.0, **more}
            return price(PrecisionScan("d", **given))[1]  # type: ignore[arg-type]

        assert says(headroom_bits=1.83) == "1.8 bits from overflow"
        assert says(updates=100, swallowed=97) == "114.0 bits from overflow; 97.0 % of these updates are rounded away"
        assert says(updates=10, swallowed=0).startswith("neither: 114.0 bits")
        assert not says(updates=10, swallowed=0, headroom_bits=1.0).startswith("neither")
        assert says(activation_headroom_bits=2.0) == "2.0 bits from overflow (the canary’s activations)"
        assert says(overflowing=3, vanishing=2) == "3 of its weights would not fit; 2 of 100 weights become 0"
        assert says(headroom_bits=math.nan) == "not known"
        assert says(error="no such kernel") == "could not be tried: no such kernel"

    def test_counts(self) -> None:
        assert counts_words(()) == "nothing to warn of"
        assert counts_words([Caution("x", "risk", "", "", "")]) == "1 risk"
        assert counts_words([Caution("x", urgency, "", "", "") for urgency in (*URGENCIES, "note")]) == (
            "1 fatal, 1 risk, 2 notes"
        )

    def test_headroom(self) -> None:
        assert [bits(each) for each in (None, math.inf, -math.inf, math.nan, 1.84, -5.4)] == [
            "–", "∞", "−∞", "NaN", "1.8", "−5.4",
        ]  # fmt: skip

    def test_capacities_share_a_scale_of_powers_of_ten(self) -> None:
        found = [replace(dying()[0].capacities[0], steps=s, low=s, high=s) for s in (30.0, math.inf, 1.0, math.nan)]
        assert [each.steps for each in ranked(found)[:3]] == [1.0, 30.0, math.inf]
        shares = [capacity_share(each.steps, found) for each in found]
        assert shares[1:] == [1.0, pytest.approx(1 / 3), 0.0]  # from 0.1 to 100
        assert shares[0] == pytest.approx((math.log10(30) + 1) / 3)


class TestKnownBefore:
    def test_a_warning_that_came_true_is_told_as_one_with_the_edit(self, lost: Path) -> None:
        run = scanned(lost, dying()[0].to_json(brief=True))
        text = Page(html.render(run)).text
        section = text[text.index("Known before edit 1: ") : text.index("Pictures of the whole run")]
        warned = cautions(dying()[0])
        causes = {link.cause for link in run.diagnosis().causes}
        assert "dtype-overflow" in causes
        causes.add("float16-limit")  # another name of the same end
        assert {caution.cause for caution in warned} & causes
        assert {caution.cause for caution in warned} - causes
        assert section.count("came true at edit 14") == sum(caution.cause in causes for caution in warned)
        assert "not come true" in section
        for caution in warned:
            assert caution.says in section

    def test_one_at_its_own_place_is_told_first_and_apart(self, lost: Path) -> None:
        (limit,) = (link for link in load(lost).diagnosis().causes if link.cause == "dtype-overflow")
        scan = dying()[0]
        near = next(each for each in scan.tensors if (each.headroom_bits or 0) < 2)
        moved = replace(near, name=f"{limit.site}.weight", layer=limit.site or "")
        run = scanned(lost, replace(scan, tensors=(*scan.tensors, moved)).to_json())
        known = known_before(run, run.diagnosis())
        assert known is not None
        assert (known.came_true[0].caution.place, known.came_true[0].came_true) == (moved.name, "came true at edit 14")
        assert known.came_true[0].here
        assert near.name in {each.caution.place for each in known.waiting}

    def test_the_console_tells_it(self, lost: Path) -> None:
        console = Console(width=100)
        with console.capture() as captured:
            console.print(diagnosis_page(scanned(lost, dying()[0].to_json())))
        assert "Known before edit 1: 2 fatal" in captured.get()
        assert "came true at edit 14" in captured.get()

    @pytest.mark.parametrize(
        "damaged",
        [
            None, 3, "scan", [], {}, {"model": 3}, {"model": "x", "kind": "folder", "tensors": [{"name": 1}]},
            {**dying()[0].to_json(), "unknown": 1}, {**dying()[0].to_json(), "tensors": {"a": 1}},
        ],
    )  # fmt: skip
    def test_a_damaged_scan_shows_nothing_and_breaks_nothing(self, lost: Path, damaged: object) -> None:
        run = scanned(lost, damaged)
        assert known_before(run, run.diagnosis()) is None
        assert "Known before" not in html.render(run)

    def test_a_scan_of_nonsense_breaks_nothing_and_stays_text(self, lost: Path) -> None:
        seen = Page(html.render(scanned(lost, hostile()[0].to_json())))
        assert "iframe" not in seen.tags
        assert not [name for _, name, _ in seen.attributes if name.startswith("on")]

    def test_a_run_that_was_not_scanned_says_nothing_of_it(self, lost: Path) -> None:
        assert "Known before" not in html.render(load(lost))

    def test_the_scan_is_no_line_of_the_environment(self, lost: Path) -> None:
        text = Page(html.render(scanned(lost, healthy()[0].to_json()))).text
        assert "Known before edit 1: nothing to warn of" in text
        assert "self_attn.q_proj" not in text
