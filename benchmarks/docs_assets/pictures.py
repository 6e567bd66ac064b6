"""Pictures in the documentation, and what each of them shows: a picture is stale when that has changed.

What a picture shows is told in parts: what is *said* on it, the readings that are *drawn*, and the files that say how
it *looks*. Each part is kept as a digest beside the picture, in docs/kept/pictures.json. Nothing else makes one stale.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.docs_assets.kept import DOCS, KEPT
from stabilitylab.errors import UsageError
from stabilitylab.record.run import Run
from stabilitylab.reports import events, headline, html, manifest, operations, verdicts
from stabilitylab.reports.tensorboard_plugin import payload
from stabilitylab.reports.text import number

KNOWN: Final = KEPT / "pictures.json"
STATIC: Final = Path(payload.__file__).parent / "static"
UNSEEN: Final = frozenset({"compare_view.js", "data.js", "host.js"})
"""Files of the tab that its picture shows nothing of."""
_RULE: Final = re.compile(r"[^{}\s][^{}]*\{[^{}]*\}")
PATIENCE: Final = 60_000
COLOURS: Final = 256
FLAGS: Final = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")

Runs = Mapping[str, Run]


@dataclass(frozen=True)
class Picture:
    """shows: its parts by name, as plain values. take: draws it, as the bytes of a PNG."""

    shows: Callable[[Runs], dict[str, Any]]
    take: Callable[[Runs], bytes]


def digests(picture: Picture, runs: Runs) -> dict[str, str]:
    """A short digest of each part of what it shows now."""
    return {
        part: hashlib.sha256(json.dumps(shown, sort_keys=True).encode("utf-8")).hexdigest()[:16]
        for part, shown in picture.shows(runs).items()
    }


def known() -> dict[str, dict[str, str]]:
    """What each picture showed when it was made, and the digest of its file."""
    kept: dict[str, dict[str, str]] = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}
    return kept


def stale(runs: Runs) -> dict[str, list[str]]:
    """Which parts of which pictures are not what they were when these were made; ``file`` where the file is another."""
    before = known()
    found = {}
    for name, picture in PICTURES.items():
        now = {**digests(picture, runs), "file": _of_file(DOCS / name)}
        changed = [part for part, value in now.items() if before.get(name, {}).get(part) != value]
        if changed:
            found[name] = changed
    return found


def make(runs: Runs) -> None:
    """Take every picture anew, and note what it shows."""
    noted = {}
    for name, picture in PICTURES.items():
        (DOCS / name).write_bytes(_small(picture.take(runs)))
        noted[name] = {**digests(picture, runs), "file": _of_file(DOCS / name)}
    KNOWN.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def _of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def _small(png: bytes) -> bytes:
    """In the colours that most of its pixels have: those of a page are flat, but for the edges of letters."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    colours: Any = picture.getcolors(picture.width * picture.height)
    counted = sorted(colours, reverse=True)[:COLOURS]
    palette = Image.new("P", (1, 1))
    palette.putpalette([band for _, colour in counted for band in colour])
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _said(run: Run) -> dict[str, Any]:
    """What the page's first screen and its tables say of a run, in the words that they have."""
    diagnosis, places = run.diagnosis(), events.short_places(run.sites)
    return {
        "title": manifest.title(run.manifest, diagnosis.edits),
        "sentence": headline.headline(diagnosis, places),
        "why": verdicts.why_apart(diagnosis),
        "advice": diagnosis.advice,
        "causes": verdicts.causes(diagnosis, places),
        "facts": verdicts.facts(diagnosis, 0, places),
        "grounds": [diagnosis.baseline, diagnosis.thresholds, list(diagnosis.unwatched)],
        "operation": [] if diagnosis.operation is None else operations.facts(diagnosis.operation, places),
        "events": [events.event_words(event, places) for event in events.telling(diagnosis, html.TELLING)],
    }


def _drawn(run: Run, metric: str) -> dict[str, list[str]]:
    """A metric at each of its sites, to three digits, and the edits that are marked."""
    series = {site: [number(value) for value in run.series(metric, site).tolist()] for site in run.sites_of(metric)}
    diagnosis = run.diagnosis()
    marks = (diagnosis.onset_edit, diagnosis.alarm_edit, diagnosis.first_bad_edit, diagnosis.first_nonfinite_edit)
    return {**series, "marks": [str(edit) for edit in marks]}


def rules_for(sheet: str, template: str) -> list[str]:
    """The rules of a style sheet that a picture of a template may show: not those for paper, nor for other pages."""
    screen = sheet.partition("@media print")[0]
    named = [(rule, re.findall(r"[.#]([A-Za-z][\w-]*)", rule.partition("{")[0])) for rule in _RULE.findall(screen)]
    return [rule for rule, names in named if not names or any(name in template for name in names)]


def _telling(run: Run) -> str:
    told = headline.telling(run, run.diagnosis())
    return "" if told is None else told[0]


def _report_shows(runs: Runs) -> dict[str, Any]:
    run = runs["demo"]
    template = html.source("report.html.j2").partition('<section id="explore"')[0]
    looks = [template, *rules_for(html.source("report.css"), template)]
    return {"said": _said(run), "drawn": _drawn(run, _telling(run)), "looks": looks}


def _report(runs: Runs) -> bytes:
    """The page down to the table of what was found."""
    page_file = runs["demo"].path / "report.html"
    html.write_report(runs["demo"], page_file)
    with _browser() as page:
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached", timeout=PATIENCE)
        box = page.locator("#events-table").bounding_box()
        assert box is not None
        clip = {"x": 0.0, "y": 0.0, "width": 1280.0, "height": box["y"] + box["height"] + 24}
        return page.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]


def _tab_shows(runs: Runs) -> dict[str, Any]:
    about = payload.about(runs["demo"], runs["demo"].diagnosis())
    listed = {name: payload.summary(run, run.diagnosis())["word"] for name, run in runs.items()}
    said = {key: about[key] for key in ("title", "diagnosis", "marks", "curve", "verdict", "edits", "forecast")}
    drawn = _drawn(runs["demo"], _telling(runs["demo"]))
    looks = [file.read_text(encoding="utf-8") for file in sorted(STATIC.iterdir()) if file.name not in UNSEEN]
    return {"said": [listed, said], "drawn": drawn, "looks": looks}


def _tab(runs: Runs) -> bytes:
    with _tensorboard(runs["demo"].path.parent) as address, _browser(width=1180, height=1090) as page:
        page.goto(f"{address}#stability")
        tab = page.frame_locator("iframe[src*='stability']")
        tab.locator(".runs button", has_text="demo").click(timeout=PATIENCE)
        for drawn in (".curve svg", ".smalls svg"):
            tab.locator(drawn).first.wait_for(timeout=PATIENCE)
        page.wait_for_timeout(1_000)
        return page.screenshot()


def _notebook_shows(runs: Runs) -> dict[str, Any]:
    titles = runs["demo"].plot.lines("update.norm").to_dict()["title"]
    return {"said": [titles["text"], titles["subtitle"]], "drawn": _drawn(runs["demo"], "update.norm")}


def _notebook(runs: Runs) -> bytes:
    out = io.BytesIO()
    runs["demo"].plot.lines("update.norm").save(out, format="png", scale_factor=1.4)
    return out.getvalue()


PICTURES: Final[Mapping[str, Picture]] = {
    "report.png": Picture(_report_shows, _report),
    "tensorboard.png": Picture(_tab_shows, _tab),
    "notebook.png": Picture(_notebook_shows, _notebook),
}


@contextmanager
def _browser(width: int = 1280, height: int = 900) -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UsageError("pictures are taken in chromium, and there is none here; expected Debian's package 'chromium'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


@contextmanager
def _tensorboard(logdir: Path) -> Iterator[str]:
    """A TensorBoard of its own on a free port; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            found = (re.search(r"at (http://127\.0\.0\.1:\d+/)", line) for line in process.stderr)
            yield next(address[1] for address in found if address)
        finally:
            process.terminate()
