"""The report: one HTML page that needs nothing else, and no network.

Verdict, findings and pictures stand without JavaScript; a script of ours draws the rest with Vega-Lite. Everything that
comes from the run is text: cut to a readable length, control and bidirectional characters spelled out, escaped by
jinja2, or JSON that holds no ``<``. The page's content policy names its style sheet and scripts by their hashes:
nothing else loads, runs or is sent, and no text is ever evaluated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup

from stabilitylab.analysis.findings import VERDICTS, Finding, Link, severity
from stabilitylab.analysis.grouping import grouped
from stabilitylab.errors import RunError
from stabilitylab.record.homes import homeless
from stabilitylab.record.plain_files import begins_otherwise
from stabilitylab.record.run import Run
from stabilitylab.reports import events, headline, manifest, operations, verdicts
from stabilitylab.reports.interactive import run_charts
from stabilitylab.reports.known_before import known_before
from stabilitylab.reports.noted import events as happened
from stabilitylab.reports.noted import missing
from stabilitylab.reports.pacing import cadence
from stabilitylab.reports.payload import as_script, packed, payload
from stabilitylab.reports.pictures import pictures, printed, telling_curve
from stabilitylab.reports.scan_words import LOOKS as URGENCIES
from stabilitylab.reports.text import clean, limit, number, percent, sentence, shorten, with_short_names
from stabilitylab.reports.thinning import flagged_edits, thinned

_OURS: Final = {"written_by": "stabilitylab"}
"""What the data of each page begin with."""
_PAGE: Final = b"<!DOCTYPE html"
LISTED_EDITS: Final = 200
LISTED_NOTES: Final = 60
LISTED_READINGS: Final = 200
LISTED_FINDINGS: Final = 400
LISTED_CAUTIONS: Final = 40
TELLING: Final = 7
"""What was found that is seen at once; the rest can be unfolded."""
LISTED_AT_ONCE: Final = 12
"""A longer table of edits is folded."""


@dataclass(frozen=True)
class Reading:
    """One reading of a run that has a single row, where a chart would show a single point."""

    metric: str
    site: str
    value: str
    unit: str


def write_report(run: Run, out: str | Path) -> Path:
    """Write the report of `run` to `out`, and its data beside it as JSON: ``report.html`` and ``report.json``.

    Each is written whole or not at all; missing folders are made. Returns `out`. Raises RunError when it can't be
    written there.
    """
    plain = payload(run)
    return write_pages(out, lambda: (_page(run, plain), plain))


def write_pages(path: str | Path, make: Callable[[], tuple[str, Mapping[str, Any]]]) -> Path:
    """Write (page, plain values for the JSON) to `path` and beside it; see `write_report`."""
    out = Path(path)
    if out.suffix == ".json":
        raise RunError(f"can't write a report to '{out}': its data goes there; expected '{out.with_suffix('.html')}'")
    try:
        if out.is_dir():
            raise RunError(f"can't write a report to '{out}': a folder; expected a file such as '{out}/report.html'")
        out.parent.mkdir(parents=True, exist_ok=True)
        _expect_ours(out.with_suffix(".json"), out)
        if begins_otherwise(out, _PAGE, or_empty=True):
            raise RunError(f"can't write a report to '{out}': it would replace what is no page; expected another name")
        page, data = make()
        _write_whole(out.with_suffix(".json"), json.dumps({**_OURS, **data}, allow_nan=False))
        _write_whole(out, page)
    except OSError as error:
        raise RunError(f"can't write a report to '{out}': {error.strerror or error}") from error
    return out


def _expect_ours(beside: Path, out: Path) -> None:
    """The page's name was given, that of its data was not: it must not take a file that someone else wrote."""
    begins = json.dumps(_OURS).removesuffix("}").encode("ascii")
    if begins_otherwise(beside, begins, or_empty=False):
        raise RunError(
            f"can't write a report to '{out}': its data would replace '{beside.name}', which no report wrote; expected "
            f"another name, such as '{out.with_name(f'{out.stem}-report.html')}'"
        )


def _write_whole(out: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name[:40]}.", delete=False) as scratch:
        try:
            scratch.write(text.encode("utf-8"))
            scratch.close()
            os.chmod(scratch.name, 0o666 & ~_umask())  # a temporary file is private; a report need not be
            os.replace(scratch.name, out)
        except BaseException:
            os.unlink(scratch.name)
            raise


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def render(run: Run) -> str:
    """The page as text."""
    return _page(run, payload(run))


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


@cache
def _packed_vega() -> str:
    """The same deflated, as base64: a third of its size. The page unpacks it when it draws."""
    return base64.b64encode(zlib.compress(_vega().encode("utf-8"), 9)).decode("ascii")


def source(name: str) -> str:
    """A file of ours, from the package."""
    return files("stabilitylab.reports").joinpath("templates").joinpath(name).read_text("utf-8")


def digest(text: str) -> str:
    """How a content policy names a style sheet or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def fill(template: str, script: str, *, drawn: bool = True, **values: Any) -> str:
    """A page from one of our templates, with style sheet, scripts and content policy.

    script: the page's own. drawn: whether it draws charts, for which it carries Vega.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )  # fmt: skip
    environment.filters.update(
        breakable=_breakable,
        sort_key=_sort_key,
        number=number,
        clean=clean,
        shorten=shorten,
        percent=percent,
        cadence=cadence,
        sentence=sentence,
        limit=limit,
        with_short_names=with_short_names,
    )
    sheet, scripts = source("report.css"), [source("page.js"), source(script)]
    scripts = [source("charts.js"), *scripts] if drawn else scripts
    run = [_vega(), *scripts] if drawn else scripts  # a policy knows what is unpacked
    policy = (
        f"default-src 'none'; img-src data:; style-src {digest(sheet)}; script-src {' '.join(map(digest, run))};"
        " base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        policy=Markup(policy), sheet=Markup(sheet), scripts=[Markup(each) for each in scripts],
        vega=_packed_vega() if drawn else "", **values,
    )  # fmt: skip  # our own files, never a run's text


def _breakable(name: str) -> Markup:
    """A name whose lines end after a dot or an underscore, if they must end within it."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", name))


def _sort_key(value: float) -> str:
    return repr(float(value)).replace("inf", "Infinity").replace("nan", "NaN")


def data_script(value: str) -> Markup:
    """JSON text for the inside of a script."""
    return Markup(as_script(value))


def _page(run: Run, plain: dict[str, Any]) -> str:
    diagnosis = run.diagnosis()
    edits, left_out = listed_edits(run)
    first = events.first_of_each_kind(diagnosis.findings)
    more = [finding for finding in diagnosis.findings if finding not in first]
    listed = max(0, LISTED_FINDINGS - len(first))
    grouped_events, places = grouped(diagnosis.findings)[:LISTED_FINDINGS], events.short_places(run.sites)
    telling = events.telling(diagnosis, TELLING)
    anchors = {member: f"#event-{place}" for place, event in enumerate(grouped_events) for member in event.members}
    told = [(event, anchors[event.members[0]][1:], events.event_words(event, places)) for event in grouped_events]
    notes, drawn = missing(run.notes), pictures(run)
    return fill(
        "report.html.j2",
        "report.js",
        data=Markup(packed(plain)),
        charts=data_script(json.dumps(run_charts())),
        run=run,
        diagnosis=diagnosis,
        name=clean(run.path.name or run.path, 80),
        title=manifest.title(run.manifest, diagnosis.edits),
        verdict=verdicts.LOOKS[diagnosis.verdict],
        looks=verdicts.LOOKS,
        severities={verdict: severity(verdict) for verdict in VERDICTS},
        places=places,
        sentence=headline.sentence(diagnosis),
        place=headline.place(diagnosis, places),
        anchors=anchors,
        why=verdicts.why_apart(diagnosis),
        causes=[
            (*told, _anchor(link, anchors))
            for told, link in zip(verdicts.causes(diagnosis, places), diagnosis.causes, strict=False)
        ],
        shown=next(
            (_anchor(link, anchors) for link in diagnosis.causes if link.cause == verdicts.told_first(diagnosis)), None
        ),
        curve=telling_curve(run),
        lead=headline.lead(diagnosis),
        confidence=headline.CONFIDENCE[diagnosis.confidence],
        strip=verdicts.strip(run),
        links=_links(diagnosis.findings, plain),
        operation=[] if diagnosis.operation is None else operations.facts(diagnosis.operation, places),
        untraced=operations.untraced(run, diagnosis),
        landed=verdicts.landed_words(diagnosis),
        known=known_before(run, diagnosis),
        listed_cautions=LISTED_CAUTIONS,
        urgencies=URGENCIES,
        events=[each for each in told if each[0] in telling],
        more_events=[each for each in told if each[0] not in telling],
        first_findings=first[:LISTED_FINDINGS],
        more_findings=more[:listed],
        findings_left_out=len(diagnosis.findings) - len(first[:LISTED_FINDINGS]) - len(more[:listed]),
        notes=notes[:LISTED_NOTES],
        all_notes=len(notes),
        happened=happened(run.notes)[:LISTED_NOTES],
        pictures=drawn,
        printed=printed(drawn),
        readings=list(_readings(run)) if len(run.edits) == 1 else [],
        listed_readings=LISTED_READINGS,
        measured=[metric for metric in run.metrics if run.sites_of(metric.name)],
        unmeasured=[metric for metric in run.metrics if not run.sites_of(metric.name)],
        edits=edits,
        listed_at_once=LISTED_AT_ONCE,
        left_out=left_out,
        environment=manifest.environment(run.manifest),
        reproduce=manifest.reproduce(run.manifest),
        limits=diagnosis.thresholds.removeprefix("limits "),
        made_from=homeless(str(run.path)),
    )


def _anchor(link: Link, anchors: Mapping[Finding, str]) -> str | None:
    """The address of the line about the finding that shows a cause."""
    shows = events.about(link, list(anchors))
    return None if shows is None else anchors[shows]


def _links(findings: Sequence[Finding], plain: dict[str, Any]) -> dict[Finding, str]:
    """The address, on this page, of the cell that each finding is about."""
    names = [site["name"] for site in plain["sites"]]
    links = {}
    for finding, told in zip(findings, plain["diagnosis"]["findings"], strict=False):
        if told["place"] is not None:
            where = {"edit": finding.edit, "site": names[told["place"]], "metric": told["metric"]}
            links[finding] = f"#{urlencode(where)}"
    return links


def listed_edits(run: Run) -> tuple[list[Any], int]:
    """The edits for the table, at most about `LISTED_EDITS`, and how many were left out.

    Flagged edits are always there; those that did not stay as far as there is room.
    """
    undone = {edit.edit for edit in run.edits if edit.outcome in {"restored", "rolled_back"}}
    places = thinned(run, LISTED_EDITS, flagged_edits(run), undone)
    return [run.edits[place] for place in places], len(run.edits) - len(places)


def _readings(run: Run) -> Iterator[Reading]:
    for (name, site), values in run.edits[0].row.readings.items():
        words = ", ".join(number(value) for value in values[:4].tolist())
        yield Reading(name, site, f"{words}, …" if values.size > 4 else words, run.metric(name).unit)
