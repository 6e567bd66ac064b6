"""The report: one HTML page that needs nothing else, no network and no JavaScript.

Everything that comes from the run is text: cut to a readable length, control and bidirectional characters spelled out,
escaped by jinja2. Pictures are data addresses, and the page's content policy lets nothing else load or run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from stabilitylab.reports import figures, manifest, verdicts
from stabilitylab.reports.svg import data_uri, to_svg
from stabilitylab.reports.text import clean, number, percent, sentence, short_names, shorten

from stabilitylab.errors import RunError
from stabilitylab.readings import MODEL_SITE, Metric
from stabilitylab.run import Run

LISTED_EDITS: Final = 200
LISTED_NOTES: Final = 60
LISTED_READINGS: Final = 200
ONE_ROW: Final = 3
"""Charts of a chapter that fit beside each other need no fold."""
SPECTRA: Final = 4
"""Layers whose spectrum is drawn; the layer that went bad first is one of them."""

_HEATMAPS: Final = ("update.norm", "activation.max_abs", "gradient.norm")
_DRAWN_TOGETHER: Final = frozenset(
    {"editor.input_max", "editor.input_unit_std", "editor.input_unit", "logits.min", "logits.max", "logits.logsumexp"}
    | {"canary.min", "canary.max", "canary.logsumexp"}
)
_CHAPTERS: Final = {
    "editor": ("The editor's own state", "What enters the editing network, and what it is divided by on its way in."),
    "update": ("Weights", "How far each edit moves the weights, and what room is left in their dtype."),
    "feedback": ("Feedback", "Growth per edit. Staying above 0 means that each edit makes the next one larger."),
    "activation": ("Activations", "What the edited layers put out, in the model as each edit found it."),
    "attention": ("Attention", "Its logits in the model as each edit found it, recomputed on a sample of queries."),
    "gradient": ("Gradients", "The gradient that each edit is made from, at the edited layers."),
    "logits": ("Logits inside the edit", "In the model as each edit found it: they lag one edit behind."),
    "canary": ("Canary", "A small fixed batch, forwarded after each edit, against the unedited model."),
}
_SAME_CHAPTER: Final = {"drift": "update", "weight": "update"}
_FIRST_SHOWN: Final = frozenset(
    {"update.norm", "drift.norm", "weight.headroom_bits", "feedback.gain", "activation.max_abs_beyond_first"}
    | {"activation.headroom_bits", "gradient.norm", "canary.agreement", "canary.kl"}
)


@dataclass(frozen=True)
class Chart:
    """A picture with its heading, caption and text alternative."""

    title: str
    caption: str
    alt: str
    uri: str


@dataclass(frozen=True)
class Reading:
    """One reading of a run that has a single row, where a chart would show a single point."""

    metric: str
    site: str
    value: str
    unit: str


@dataclass(frozen=True)
class Chapter:
    """Charts of one family of metrics: those that are seen at once, and those behind a fold."""

    anchor: str
    title: str
    about: str
    shown: tuple[Chart, ...]
    folded: tuple[Chart, ...]


def write_report(run: Run, out: Path) -> Path:
    """Write the report of `run` to `out`, whole or not at all; missing folders are made. Returns `out`.

    Raises RunError when it can't be written there.
    """
    if out.is_dir():
        raise RunError(f"can't write a report to '{out}': a folder; expected a file such as '{out}/report.html'")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name[:40]}.", delete=False) as scratch:
            try:
                scratch.write(render(run).encode("utf-8"))
                scratch.close()
                os.chmod(scratch.name, 0o666 & ~_umask())  # a temporary file is private; a report need not be
                os.replace(scratch.name, out)
            except BaseException:
                os.unlink(scratch.name)
                raise
    except OSError as error:
        raise RunError(f"can't write a report to '{out}': {error.strerror or error}") from error
    return out


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def render(run: Run) -> str:
    """The page as text."""
    source = files("stabilitylab.reports").joinpath("templates")
    sheet = source.joinpath("report.css").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, clean=clean, shorten=shorten, percent=percent, sentence=sentence)
    template = environment.from_string(source.joinpath("report.html.j2").read_text("utf-8"))
    digest = base64.b64encode(hashlib.sha256(sheet.encode("utf-8")).digest()).decode("ascii")
    diagnosis = run.diagnosis()
    edits, left_out = listed_edits(run)
    first = verdicts.first_of_each_kind(diagnosis.findings)
    return template.render(
        run=run,
        diagnosis=diagnosis,
        name=clean(run.path.name or run.path, 80),
        verdict=verdicts.LOOKS[diagnosis.verdict],
        looks=verdicts.LOOKS,
        strip=verdicts.strip(run),
        sheet=Markup(sheet),  # our own file, never a run's text
        sheet_hash=digest,
        first_findings=first,
        more_findings=[finding for finding in diagnosis.findings if finding not in first],
        notes=run.notes[:LISTED_NOTES],
        heatmaps=list(_heatmaps(run)) if len(run.edits) > 1 else [],
        chapters=chapters(run) if len(run.edits) > 1 else (),
        readings=list(_readings(run)) if len(run.edits) == 1 else [],
        listed_readings=LISTED_READINGS,
        measured=[metric for metric in run.metrics if run.sites_of(metric.name)],
        unmeasured=[metric for metric in run.metrics if not run.sites_of(metric.name)],
        edits=edits,
        left_out=left_out,
        environment=manifest.environment(run.manifest),
        reproduce=manifest.reproduce(run.manifest),
    )


def listed_edits(run: Run) -> tuple[list[Any], int]:
    """The edits for the table, at most about `LISTED_EDITS`, and how many were left out.

    Flagged edits, those of findings, failed ones and those that did not stay are always there, with the run's ends.
    """
    if len(run.edits) <= LISTED_EDITS:
        return list(run.edits), 0
    diagnosis = run.diagnosis()
    flagged = {finding.edit for finding in diagnosis.findings} | {finding.start for finding in diagnosis.findings}
    for edit in (diagnosis.onset_edit, diagnosis.alarm_edit, diagnosis.first_bad_edit, diagnosis.first_nonfinite_edit):
        if edit is not None:
            flagged |= {edit - 1, edit, edit + 1}
    places = {
        place
        for place, edit in enumerate(run.edits)
        if edit.edit in flagged or edit.status == "failed" or edit.outcome in {"restored", "rolled_back"}
    }
    spread = np.linspace(0, len(run.edits) - 1, max(2, LISTED_EDITS - len(places)))
    places |= {round(place) for place in spread}
    return [run.edits[place] for place in sorted(places)], len(run.edits) - len(places)


def _chart(title: str, caption: str, alt: str, figure: Figure) -> Chart:
    return Chart(clean(title, 90), clean(caption, 400), clean(alt, 400), data_uri(to_svg(figure)))


def _marks(run: Run) -> str:
    diagnosis = run.diagnosis()
    marks = [("onset", diagnosis.onset_edit), ("alarm", diagnosis.alarm_edit), ("first bad", diagnosis.first_bad_edit)]
    known = ", ".join(f"{name} at edit {edit}" for name, edit in marks if edit is not None)
    return f"Marked: {known}." if known else "No edit is flagged."


def _line_chart(run: Run, metric: Metric) -> Chart:
    sites = run.sites_of(metric.name)
    places = f"{len(sites)} sites" if len(sites) > 1 else shorten(sites[0], 60)
    alt = f"Line chart of {metric.name} at {places} over edits {_span(run)}. {_marks(run)}"
    return _chart(metric.name, metric.meaning, alt, figures.lines(run, metric.name))


def _span(run: Run) -> str:
    return f"{run.edits[0].edit} to {run.edits[-1].edit}" if run.edits else "none"


def _readings(run: Run) -> Iterator[Reading]:
    for (name, site), values in run.edits[0].row.readings.items():
        words = ", ".join(number(value) for value in values[:4].tolist())
        yield Reading(name, site, f"{words}, …" if values.size > 4 else words, run.metric(name).unit)


def _heatmaps(run: Run) -> Iterator[Chart]:
    for name in _HEATMAPS if len(run) else ():
        sites = tuple(site for site in run.sites_of(name) if site != MODEL_SITE)
        if sites:
            alt = f"Heatmap of {name}: {len(sites)} layers by edits {_span(run)}. {_marks(run)}"
            yield _chart(name, run.metric(name).meaning, alt, figures.heatmap(run, name, sites))


def _range_chart(run: Run, family: str) -> Chart:
    alt = f"Band of the smallest and largest logit over edits {_span(run)}. {_marks(run)}"
    about = "Smallest to largest logit as a band, with the log-sum-exp. Logits that draw together say less and less."
    return _chart(f"{family} range", about, alt, figures.logit_range(run, family))


def _special(run: Run) -> dict[str, list[Chart]]:
    """Charts that show several metrics, by family."""
    special: dict[str, list[Chart]] = {}
    if run.edits and run.sites_of("editor.input_max"):
        alt = f"Two panels over edits {_span(run)}: the editor's largest normalised input, its spread. {_marks(run)}"
        about = "Above: the largest normalised input. Below: the spread that this input was divided by; 0 blows it up."
        special["editor"] = [_chart("editor.input_max and its std", about, alt, figures.editor_state(run))]
    for family in ("logits", "canary"):
        if run.sites_of(f"{family}.max"):
            special[family] = [_range_chart(run, family)]
    return special


def _spectrum_charts(run: Run, metric: Metric) -> Iterator[Chart]:
    sites = run.sites_of(metric.name)
    first, names = [site for site in sites if site == run.diagnosis().first_bad_site], short_names(sites, 30)
    for site in [*first, *(site for site in sites if site not in first)][:SPECTRA]:
        alt = f"Fan of leading values of {metric.name} at {shorten(site, 60)} over edits {_span(run)}. {_marks(run)}"
        title = f"{metric.name} at {names[site]}"
        yield _chart(title, metric.meaning, alt, figures.spectra(run, site, metric.name))


def _worth_drawing(run: Run, metric: Metric) -> bool:
    """Not what is drawn elsewhere (non-finite values have a lane on every chart), nor a count that never moves."""
    name, sites = metric.name, run.sites_of(metric.name)
    if name in _DRAWN_TOGETHER or not sites or name.endswith((".nonfinite", ".dead")):
        return False
    if metric.length > 1:
        return metric.scale == "log"
    if metric.scale in {"count", "flag"}:
        return any(np.unique(run.series(name, site)[run.present(name, site)]).size > 1 for site in sites)
    return True


def chapters(run: Run) -> tuple[Chapter, ...]:
    """Every metric that was read, drawn in the chapter of its family; a family that we don't know gets its own."""
    shown = _special(run)
    folded: dict[str, list[Chart]] = {}
    for metric in run.metrics:
        if not _worth_drawing(run, metric):
            continue
        family = _SAME_CHAPTER.get(metric.family, metric.family)
        charts = list(_spectrum_charts(run, metric)) if metric.length > 1 else [_line_chart(run, metric)]
        known = family in _CHAPTERS
        if metric.length > 1:
            shown.setdefault(family, []).append(charts.pop(0))
        first = metric.name in _FIRST_SHOWN or not known
        (shown if first else folded).setdefault(family, []).extend(charts)
    for family, few in folded.items():
        if len(shown.get(family, [])) + len(few) <= ONE_ROW:
            shown.setdefault(family, []).extend(few)
            few.clear()
    families = [*_CHAPTERS, *sorted({*shown, *folded} - set(_CHAPTERS))]
    return tuple(
        Chapter(
            f"charts-{place}",
            *_CHAPTERS.get(family, (clean(family, 40), "")),
            tuple(shown.get(family, ())),
            tuple(folded.get(family, ())),
        )
        for place, family in enumerate(families)
        if shown.get(family) or folded.get(family)
    )
