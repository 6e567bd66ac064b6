"""The report's static pictures: which are drawn, in which chapter, and as many as fit.

They stand where there is no JavaScript, in print and in a mail; with it the page draws every metric by itself. Those
that say most are drawn first, and what no longer fits is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from stabilitylab.record.readings import MODEL_SITE, Metric
from stabilitylab.record.run import Run
from stabilitylab.reports import charting, figures, headline
from stabilitylab.reports.events import short_places
from stabilitylab.reports.svg import data_uri, to_svg
from stabilitylab.reports.text import clean, short_names, shorten

BUDGET: Final = 450_000
"""Characters that the pictures of a page may take; the one that passes it is the last."""
ONE_ROW: Final = 3
"""Charts of a chapter that fit beside each other need no fold."""
PRINTED: Final = 4
"""Charts, beside a map, that go on paper."""
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
class Planned:
    """A picture that may be drawn. family: its chapter. first: whether it says much. sites: how many it shows."""

    family: str
    first: bool
    sites: int
    title: str
    caption: str
    alt: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Chart:
    """A picture with its heading, caption and text alternative."""

    title: str
    caption: str
    alt: str
    uri: str


@dataclass(frozen=True)
class Chapter:
    """Charts of one family of metrics: those that are seen at once, and those behind a fold."""

    anchor: str
    title: str
    about: str
    shown: tuple[Chart, ...]
    folded: tuple[Chart, ...]


@dataclass(frozen=True)
class Pictures:
    """heatmaps: layers by edits. left_out: titles of pictures for which there was no room."""

    heatmaps: tuple[Chart, ...] = ()
    chapters: tuple[Chapter, ...] = ()
    left_out: tuple[str, ...] = ()


def pictures(run: Run, budget: int = BUDGET) -> Pictures:
    """The pictures of a run, those that say most first, until `budget` characters are taken."""
    if len(run.edits) < 2:
        return Pictures()
    maps, rest = list(_heatmaps(run)), list(_plan(run))
    wanted = [*maps, *sorted(rest, key=lambda each: (not each.first, each.sites > 1))]
    drawn: list[tuple[Planned, Chart]] = []
    room = budget
    for each in wanted:
        if room <= 0:
            break
        drawn.append((each, _chart(each)))
        room -= len(drawn[-1][1].uri)
    heatmaps = tuple(chart for each, chart in drawn[: len(maps)])
    left_out = tuple(clean(each.title, 90) for each in wanted[len(drawn) :])
    return Pictures(heatmaps, _chapters(drawn[len(maps) :]), left_out)


def telling_curve(run: Run, *, dark: bool = True) -> Chart | None:
    """The reading that tells the run, with onset, alarm and end; None where nothing moves. dark: as in `to_svg`."""
    told = headline.telling(run, run.diagnosis())
    if told is None:
        return None
    metric, site = told
    place = short_places(run.sites).get(site) or shorten(site, 40)
    marked = ", ".join(f"{name} at edit {edit}" for edit, name, *_ in charting.story(run.diagnosis()))
    alt = f"Line chart of {metric} at {shorten(site, 60)} over edits {_span(run)}. {marked or 'No edit is flagged'}."
    about, draw = run.metric(metric).meaning, partial(figures.telling, run, metric, site)
    return _chart(Planned("", True, 1, f"{metric} at {place}", about, alt, draw), dark=dark)


def printed(drawn: Pictures) -> tuple[Chart, ...]:
    """What goes on paper: the first map, and the first chart of some chapters, what became of the model before all."""
    chapters = sorted(drawn.chapters, key=lambda chapter: chapter.title != _CHAPTERS["canary"][0])
    return (*drawn.heatmaps[:1], *[chart for each in chapters for chart in each.shown[:1]][:PRINTED])


def _chart(planned: Planned, *, dark: bool = True) -> Chart:
    with np.errstate(over="ignore"):  # ticks beyond the largest float, where readings come near it
        uri = data_uri(to_svg(planned.draw(), dark=dark))
    return Chart(clean(planned.title, 90), clean(planned.caption, 400), clean(planned.alt, 400), uri)


def _chapters(drawn: Sequence[tuple[Planned, Chart]]) -> tuple[Chapter, ...]:
    """What was drawn by family, in the page's order; a family that we don't know gets its own."""
    shown: dict[str, list[Chart]] = {}
    folded: dict[str, list[Chart]] = {}
    for planned, chart in drawn:
        (shown if planned.first else folded).setdefault(planned.family, []).append(chart)
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


def _plan(run: Run) -> Iterator[Planned]:
    """Every picture but the heatmaps that the run has readings for."""
    yield from _special(run)
    for metric in run.metrics:
        if not _worth_drawing(run, metric):
            continue
        family = _SAME_CHAPTER.get(metric.family, metric.family)
        if metric.length > 1:
            yield from _spectra(run, metric, family)
        else:
            yield _line(run, metric, family, metric.name in _FIRST_SHOWN or family not in _CHAPTERS)


def _marks(run: Run) -> str:
    diagnosis = run.diagnosis()
    marks = [("onset", diagnosis.onset_edit), ("alarm", diagnosis.alarm_edit), ("first bad", diagnosis.first_bad_edit)]
    known = ", ".join(f"{name} at edit {edit}" for name, edit in marks if edit is not None)
    return f"Marked: {known}." if known else "No edit is flagged."


def _line(run: Run, metric: Metric, family: str, first: bool) -> Planned:
    sites = run.sites_of(metric.name)
    places = f"{len(sites)} sites" if len(sites) > 1 else shorten(sites[0], 60)
    alt = f"Line chart of {metric.name} at {places} over edits {_span(run)}. {_marks(run)}"
    return Planned(family, first, len(sites), metric.name, metric.meaning, alt, lambda: figures.lines(run, metric.name))


def _span(run: Run) -> str:
    return f"{run.edits[0].edit} to {run.edits[-1].edit}"


def _heatmaps(run: Run) -> Iterator[Planned]:
    for name in _HEATMAPS:
        sites = tuple(site for site in run.sites_of(name) if site != MODEL_SITE)
        if sites:
            alt = f"Heatmap of {name}: {len(sites)} layers by edits {_span(run)}. {_marks(run)}"
            draw = partial(figures.heatmap, run, name, sites)
            yield Planned("", True, len(sites), name, run.metric(name).meaning, alt, draw)


def _special(run: Run) -> Iterator[Planned]:
    """Pictures that show several metrics."""
    sites = run.sites_of("editor.input_max")
    if sites:
        alt = f"Two panels over edits {_span(run)}: the editor's largest normalised input, its spread. {_marks(run)}"
        about = "Above: the largest normalised input. Below: the spread that this input was divided by; 0 blows it up."
        yield Planned(
            "editor", True, len(sites), "editor.input_max and its std", about, alt, lambda: figures.editor_state(run)
        )
    for family in ("canary", "logits"):
        if run.sites_of(f"{family}.max"):
            alt = f"Band of the smallest and largest logit over edits {_span(run)}. {_marks(run)}"
            about = "Smallest to largest logit as a band, with the log-sum-exp. Logits that draw together say less."
            yield Planned(family, True, 1, f"{family} range", about, alt, partial(figures.logit_range, run, family))


def _spectra(run: Run, metric: Metric, family: str) -> Iterator[Planned]:
    sites = run.sites_of(metric.name)
    first, names = [site for site in sites if site == run.diagnosis().first_bad_site], short_names(sites, 30)
    for place, site in enumerate([*first, *(site for site in sites if site not in first)][:SPECTRA]):
        alt = f"Fan of leading values of {metric.name} at {shorten(site, 60)} over edits {_span(run)}. {_marks(run)}"
        title = f"{metric.name} at {names[site]}"
        draw = partial(figures.spectra, run, site, metric.name)
        yield Planned(family, place == 0, 1, title, metric.meaning, alt, draw)


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
