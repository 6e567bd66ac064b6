"""What the documentation shows is what the code says and draws now. `make docs-assets` makes it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.docs_assets import kept, pictures, samples
from stabilitylab.record.run import Run, load

ANEW = "run: make docs-assets"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {name: load(path) for name, path in kept.unpack(tmp_path_factory.mktemp("docs")).items()}


def test_samples_of_output_are_what_is_printed_now() -> None:
    made = samples.made()
    standing = {(page.name, name): block for page in samples.pages() for name, block in samples.shown(page).items()}
    assert {name for _, name in standing} == set(samples.SAMPLES)
    old = [f"{page}: {name}" for (page, name), block in standing.items() if block != made[name]]
    assert not old, f"stale samples: {old}; {ANEW}"


def test_samples_fit_a_terminal() -> None:
    wide = [
        line
        for page in samples.pages()
        for name, block in samples.shown(page).items()
        for line in block.splitlines()
        if name not in {"alarm", "tail-piped"} and len(line) > samples.WIDTH
    ]
    assert not wide


def test_pictures_show_what_would_be_shown_now(runs: dict[str, Run]) -> None:
    old = pictures.stale(runs)
    assert not old, f"stale pictures, by what has changed: {old}; {ANEW}"


def test_every_picture_in_the_documentation_is_made_by_it() -> None:
    assert {path.name for path in kept.DOCS.glob("*.png")} == set(pictures.PICTURES)
    for name in pictures.PICTURES:
        assert (kept.DOCS / name).stat().st_size < 150_000
        with Image.open(kept.DOCS / name) as picture:
            assert picture.mode == "P"


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """A page with a sample, beside the documentation."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sample: tail -->\n```\nold\n```\nafter\n```\nno sample\n```\n", encoding="utf-8")
    return page


def test_a_sample_is_put_in_place_and_nothing_else_is_touched(noted: Path) -> None:
    assert samples.shown(noted) == {"tail": "old\n"}
    samples.put(noted, {"tail": "a\\1\nb\n"})
    assert noted.read_text() == "before\n<!-- sample: tail -->\n```\na\\1\nb\n```\nafter\n```\nno sample\n```\n"


def test_what_makes_a_picture_stale_is_what_it_shows(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**runs, "demo": runs["malmen"]}
    assert {"said", "drawn"} <= set(pictures.stale(other)["report.png"])
    monkeypatch.setattr(pictures.html, "source", lambda name: "another look")
    assert pictures.stale(runs) == {"report.png": ["looks"]}


def test_a_rule_for_paper_or_for_another_page_makes_no_picture_stale() -> None:
    sheet = "a { b: c; }\n.shown, .x { d: e; }\n.other { f: g; }\n@media (x) {\n  .shown { h: i; }\n}\n"
    rules = pictures.rules_for(sheet, '<p class="shown">')
    assert [rule.partition("{")[2].strip(" }") for rule in rules] == ["b: c;", "d: e;", "h: i;"]
    assert pictures.rules_for(f"{sheet}@media print {{ .shown {{ j: k; }} }}", '<p class="shown">') == rules
