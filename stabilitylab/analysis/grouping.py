"""Findings as events: what was found at one edit and one layer is one event, however many metrics show it.

``outputs 10–11 times usual, 4 metrics`` says of four findings what a reader wants to know first; the findings with
their evidence are the group's members.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.findings import Finding, Verdict, severity
from stabilitylab.analysis.leading import value_words
from stabilitylab.analysis.ledger import FURTHEST, STEPS
from stabilitylab.analysis.words import number

_WORDS: Final = {
    "activation": "outputs",
    "attention": "attention logits",
    "canary": "canary logits",
    "drift": "distance from the original",
    "editor": "the editor's values",
    "gradient": "gradient",
    "logits": "logits",
    "update": "update",
    "weight": "weights",
}

_COMPACT: Final = frozenset({FURTHEST, *STEPS})
"""Rules whose sentence is long for what it says."""


@dataclass(frozen=True)
class Group:
    """What was found at one edit and one site. verdict: the worst of its members, which are in that order.

    says: one line. sentence: whether that is a sentence of its own, which names its place; else it goes behind a place.
    short: what goes behind a place in any case.
    """

    edit: int
    site: str
    verdict: Verdict
    says: str
    sentence: bool
    short: str
    members: tuple[Finding, ...]


def grouped(findings: Sequence[Finding]) -> tuple[Group, ...]:
    """The groups in the order of their first findings: that of finding 1 leads, the others follow by edit."""
    members: dict[tuple[int, str], list[Finding]] = {}
    for finding in findings:
        members.setdefault((finding.edit, finding.site), []).append(finding)
    return tuple(_group(edit, site, found) for (edit, site), found in members.items())


def _group(edit: int, site: str, found: Sequence[Finding]) -> Group:
    worst_first = tuple(sorted(found, key=lambda finding: -severity(finding.verdict)))
    worst = worst_first[0]
    # Of a single metric its own sentence tells more, unless that is a comparison with what is usual.
    sentence = len({finding.metric for finding in found}) == 1 and not any(
        finding.usual or finding.rule in _COMPACT for finding in found
    )
    short = _summary(worst_first)
    return Group(edit, site, worst.verdict, worst.says if sentence else short, sentence, short, worst_first)


def _summary(members: Sequence[Finding]) -> str:
    parts = list(dict.fromkeys(_parts(members)))
    metrics = len({finding.metric for finding in members})
    parts += [f"{metrics} metrics"] if metrics > 1 else []
    more = max(finding.more_sites for finding in members)
    parts += [f"and at {more} more site{'s' if more > 1 else ''}"] if more else []
    return ", ".join(parts)


def _parts(members: Sequence[Finding]) -> Iterator[str]:
    """What is lost, and then what is said of each family of metrics, the worst first."""
    lost = [finding for finding in members if _is_lost(finding)]
    if lost:
        yield f"{_listed([_word(finding.metric) for finding in lost])} NaN or infinite"
    sound = [finding for finding in members if finding not in lost]
    for family in dict.fromkeys(_family(finding) for finding in sound):
        of_family = [finding for finding in sound if _family(finding) == family]
        rest = [finding for finding in of_family if not finding.usual][:1]
        known = [finding for finding in of_family if finding.usual]
        if rest:
            yield _against_limit(rest[0])
        if known:
            same = {finding.metric for finding in known} == {finding.metric for finding in rest}
            yield _against_usual(known, "" if same else f"{_word(known[0].metric)} ")


def _family(finding: Finding) -> str:
    return finding.metric.partition(".")[0]


def _word(metric: str) -> str:
    if metric.startswith("editor.input"):
        return "the editor's inputs"
    family = metric.partition(".")[0]
    return _WORDS.get(family, family)


def _is_lost(finding: Finding) -> bool:
    return finding.rule == "non-finite" or not math.isfinite(finding.value)


def _against_limit(finding: Finding) -> str:
    told = value_words(finding)
    if finding.rule == FURTHEST:
        return f"of the watched weights the furthest from its original, {told}"
    if math.isnan(finding.threshold):
        return told
    limit = number(finding.threshold)
    return f"{told} / limit {limit}" if finding.forecast is not None else f"{told} (limit {limit})"


def _against_usual(known: Sequence[Finding], word: str) -> str:
    times = sorted(finding.value / finding.usual for finding in known if finding.usual)
    grows = ", growing faster than edits add up" if any(finding.rule == "growth" for finding in known) else ""
    if times[-1] == 0:
        return f"{word}0"
    ends = list(dict.fromkeys(_few_digits(value) for value in (times[0], times[-1])))
    return f"{word}{'–'.join(ends)} times usual{grows}"


def _listed(words: Sequence[str]) -> str:
    """``outputs, gradient and weights``: each word once."""
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} and {last}" if others else last


def _few_digits(value: float) -> str:
    """Two digits tell how large a factor is."""
    return number(float(f"{value:.2g}"))
