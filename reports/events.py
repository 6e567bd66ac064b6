"""What was found, as a reader sees it first: an event a line, its place by a short name; which where room is short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from stabilitylab.analysis.findings import Diagnosis, Finding, Link, severity
from stabilitylab.analysis.grouping import Group, grouped
from stabilitylab.record.readings import EDITOR_SITE, MODEL_SITE
from stabilitylab.reports.text import clean, short_names, shorten, with_short_names

NAME: Final = 30


def short_places(sites: Iterable[str]) -> dict[str, str]:
    """A short name for each site of a run, as on its charts."""
    own = {MODEL_SITE: "the model", EDITOR_SITE: "the editor"}
    return {**own, **short_names([site for site in dict.fromkeys(sites) if site not in own], NAME)}


def event_words(group: Group, places: Mapping[str, str]) -> str:
    """One line: ``1.fc2: outputs 10–11 times usual, 4 metrics``, or a sentence that names its place itself."""
    says = with_short_names(clean(group.says, 400), places)
    return says if group.sentence else f"{place_words(group, places)}: {says}"


def place_words(group: Group, places: Mapping[str, str]) -> str:
    """The place of an event, by its short name."""
    return places.get(group.site) or shorten(group.site, NAME)


def telling(diagnosis: Diagnosis, most: int) -> list[Group]:
    """At most `most` events: first that of finding 1, then others in order of edit.

    Of too many: the alarm's, the first of each verdict, and then the earliest: once a run is past its end, everything
    is NaN, and says no more.
    """
    events = grouped(diagnosis.findings)
    firsts: dict[str, Group] = {}
    for event in sorted(events, key=lambda event: event.edit):
        firsts.setdefault(event.verdict, event)

    def rank(event: Group) -> tuple[bool, bool, bool, bool]:
        grave = severity(event.verdict) >= severity("diverging")
        alarm = event.edit == diagnosis.alarm_edit and grave
        return event is not events[0], not alarm, event is not firsts[event.verdict], severity(event.verdict) == 0

    kept = sorted(events, key=rank)[:most]
    return [event for event in events if event in kept]


def first_of_each_kind(findings: Sequence[Finding]) -> list[Finding]:
    """What a rule says of a metric for the first time, wherever that is. In their order."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        first.setdefault((finding.rule, finding.metric), finding)
    return list(first.values())


def begins(findings: Sequence[Finding], edit: int | None) -> Finding | None:
    """The finding that speaks of what begins at this edit; else the first flagged one after it."""
    flagged = [finding for finding in findings if severity(finding.verdict) > 0]
    if edit is None:
        return None
    return next((each for each in flagged if each.start == edit), None) or min(
        (each for each in flagged if each.edit >= edit), key=lambda finding: finding.edit, default=None
    )


def about(link: Link, findings: Sequence[Finding]) -> Finding | None:
    """The finding that shows a cause: about its reading, else about its place; else the one of the headline."""
    same = [each for each in findings if (each.site, each.metric) == (link.site, link.metric)]
    there = [each for each in findings if each.site == link.site]
    return next(iter([*same, *there, *findings]), None)
