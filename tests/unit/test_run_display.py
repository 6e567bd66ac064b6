"""What a notebook and a prompt show of a run, a diagnosis, a finding and the catalogue; and a run as a data frame."""

from __future__ import annotations

import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.analysis.grouping import grouped
from stabilitylab.errors import UsageError
from stabilitylab.record.readings import Metric
from stabilitylab.record.run import Run, load
from stabilitylab.reports import frames, manifest, notebook
from stabilitylab.reports.events import event_words, short_places
from stabilitylab.reports.headline import headline
from stabilitylab.reports.text import with_short_names
from tests.synthetic import HOSTILE, make_run


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(make_run(tmp_path_factory.mktemp("runs") / "run", edits=20, dies_at=14))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "<script>[red]\x1b[31m\u202e"
    return load(make_run(folder, edits=14, dies_at=9, sites=len(HOSTILE), hostile_labels=True, closed=False))


class Page(HTMLParser):
    """A page's elements, attributes and words; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.said = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name == "src"]
        if tag not in {"br", "img"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def displays(run: Run) -> dict[str, str]:
    diagnosis = run.diagnosis()
    found = {f"finding {place}": finding._repr_html_() for place, finding in enumerate(diagnosis.findings)}
    return {
        "run": run._repr_html_(),
        "diagnosis": diagnosis._repr_html_(),
        "catalogue": run.metrics._repr_html_(),
        **found,
    }


def test_a_run_shows_verdict_evidence_and_what_it_was_compared_with(dying: Run) -> None:
    diagnosis, said = dying.diagnosis(), Page(dying._repr_html_()).said
    places = short_places(dying.sites)
    assert diagnosis.first_bad_site is not None
    in_order = [
        manifest.title(dying.manifest, diagnosis.edits),
        headline(diagnosis, places),
        f"Why: {diagnosis.cause}",
        "What to do",
        diagnosis.advice,
        diagnosis.causes[1].cause,
        f"first bad edit {diagnosis.first_bad_edit}, {places[diagnosis.first_bad_site]}, {diagnosis.first_bad_metric}",
        diagnosis.baseline,
    ]
    assert all(in_order)
    found = [said.index(words) for words in in_order]
    assert found == sorted(found)
    assert diagnosis.thresholds.removeprefix("limits ") in said
    for verdict in {event.verdict for event in grouped(diagnosis.findings)}:
        first = min((event for event in grouped(diagnosis.findings) if event.verdict == verdict), key=lambda e: e.edit)
        assert event_words(first, places) in said
    assert len(diagnosis.causes) > 1
    assert with_short_names(diagnosis.cause_says, places)[1:] in said
    for link in diagnosis.causes[1:]:
        assert with_short_names(link.says, places)[1:] in said
    assert "took effect some" in said
    assert f"not watched {diagnosis.unwatched[0]}" in said
    assert f"alarm, as it ran edit {diagnosis.alarm_edit}" in said
    assert "20, 1 failed" in said
    assert str(dying.path) in said
    assert "not closed" not in said


def test_a_run_that_goes_on_shows_its_forecast(tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", edits=12, dies_at=None, closed=False))
    said, forecast = Page(run._repr_html_()).said, run.diagnosis().forecast
    assert forecast is not None
    assert forecast.says in said
    assert "not closed" in said


def test_a_diagnosis_and_its_findings_show_their_evidence(dying: Run) -> None:
    diagnosis = dying.diagnosis()
    places = short_places(finding.site for finding in diagnosis.findings)
    said = Page(diagnosis._repr_html_()).said
    assert headline(diagnosis, places) in said
    assert said.count(diagnosis.advice) == said.count(f"Why: {diagnosis.cause}") == 1
    finding = diagnosis.findings[0]
    said = Page(finding._repr_html_()).said
    for words in (finding.says, finding.site, finding.metric, finding.rule):
        assert words in said


def test_the_catalogue_is_a_tuple_that_shows_itself_as_a_table(dying: Run) -> None:
    assert isinstance(dying.metrics, tuple)
    assert all(isinstance(metric, Metric) for metric in dying.metrics)
    page = Page(dying.metrics._repr_html_())
    assert "tabindex" in page.attributes  # it scrolls, with the keyboard too
    said = page.said
    for metric in dying.metrics:
        assert metric.name in said
        assert metric.name in str(dying.metrics)
    assert repr(dying.metrics).startswith(f"<Catalogue: {len(dying.metrics)} metrics")


def test_at_a_prompt_all_of_them_are_short(dying: Run, hostile: Run) -> None:
    for run in (dying, hostile):
        diagnosis = run.diagnosis()
        assert diagnosis.verdict in repr(diagnosis)
        assert str(diagnosis) == diagnosis.says
        assert diagnosis.verdict in repr(run)
        for finding in diagnosis.findings:
            assert f"edit {finding.edit}" in repr(finding)
            assert str(finding) == finding.says
        for shown in (run, run.metrics, run.plot, diagnosis, *diagnosis.findings):
            assert len(repr(shown)) < 1_000
            assert repr(shown).isprintable()


def test_hostile_text_stays_text(hostile: Run) -> None:
    allowed = {
        "br",
        "img",
        "ol",
        "div",
        "p",
        "span",
        "strong",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "code",
        "ul",
        "li",
    }
    for name, shown in displays(hostile).items():
        page = Page(shown)
        assert page.tags <= allowed | {"details", "summary"}, name
        assert page.attributes <= {"style", "scope", "tabindex", "role", "aria-label", "src", "alt"}, name
        assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources), name
        assert page.said.isprintable(), name
        assert len(shown) < 200_000, name
    assert "<script>" in Page(hostile._repr_html_()).said


def test_no_display_of_anything_else() -> None:
    with pytest.raises(TypeError, match="no display of a int"):
        notebook.html(3)


def test_a_frame_has_a_row_per_value_and_none_for_what_was_not_read(dying: Run) -> None:
    columns = frames.columns(dying)
    assert list(columns) == ["edit", "label", "status", "outcome", "metric", "site", "element", "value"]
    values = [(edit.edit, key, edit.row.readings[key]) for edit in dying.edits for key in edit.row.readings]
    assert {len(column) for column in columns.values()} == {sum(each.size for _, _, each in values)}
    np.testing.assert_array_equal(columns["value"], np.concatenate([each for _, _, each in values]))
    site = dying.sites_of("gradient.spectrum")[0]
    keys = zip(columns["edit"].tolist(), columns["metric"], columns["site"], columns["element"].tolist(), strict=True)
    placed = dict(zip(keys, columns["value"].tolist(), strict=True))
    spectrum = dying.series("gradient.spectrum", site)
    for place, edit in enumerate(dying.edits):
        for element in range(spectrum.shape[1]):
            found = placed.get((edit.edit, "gradient.spectrum", site, element))
            if found is None:
                assert not dying.present("gradient.spectrum", site)[place]
            else:
                np.testing.assert_equal(found, spectrum[place, element])
    by_edit = dict(
        zip(
            columns["edit"].tolist(),
            zip(*(columns[name] for name in ("status", "outcome", "label")), strict=True),
            strict=True,
        )
    )
    assert by_edit == {edit.edit: (edit.status, edit.outcome, edit.label) for edit in dying.edits}


def test_a_frame_of_nothing_has_its_columns(tmp_path: Path) -> None:
    columns = frames.columns(load(make_run(tmp_path / "run", edits=0, sites=0, dies_at=None)))
    assert {len(column) for column in columns.values()} == {columns["edit"].size}


def test_pandas_takes_the_frame(dying: Run, hostile: Run) -> None:
    pandas = pytest.importorskip("pandas")
    frame = dying.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    series = frame.query("metric == 'update.norm'").pivot(index="edit", columns="site", values="value")
    for site in dying.sites_of("update.norm"):
        np.testing.assert_array_equal(series[site], dying.series("update.norm", site))
    assert frame["value"].dtype == np.float64
    assert set(hostile.to_frame("pandas")["label"]) == {edit.label for edit in hostile.edits}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An installation with a module `polars` and without pandas."""
    fake = types.ModuleType("polars")
    fake.DataFrame = lambda columns: ("polars", sorted(columns))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polars", fake)
    monkeypatch.setitem(sys.modules, "pandas", None)
    return fake


@pytest.mark.usefixtures("only")
def test_whichever_is_installed_is_taken(dying: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dying.to_frame() == dying.to_frame("polars") == ("polars", sorted(frames.columns(dying)))
    with pytest.raises(UsageError, match=r"pandas is not installed; try: pip install pandas"):
        dying.to_frame("pandas")
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UsageError, match="neither pandas nor polars is installed"):
        dying.to_frame()
    with pytest.raises(UsageError, match=r"library 'polar'; expected one of pandas, polars; did you mean 'polars'"):
        dying.to_frame("polar")  # type: ignore[arg-type]


def test_reading_a_run_brings_in_neither_what_draws_nor_what_frames(dying: Run) -> None:
    code = (
        "import sys, stabilitylab as sl\n"
        f"run = sl.load({str(dying.path)!r})\n"
        "repr(run), repr(run.diagnosis()), run.plot\n"
        "heavy = {'altair', 'matplotlib', 'jinja2', 'pandas', 'polars', 'torch', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "run.diagnosis()._repr_html_(), run.metrics._repr_html_()\n"
        "assert not {'altair', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "run._repr_html_()\n"  # with a picture
        "assert not {'altair', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
