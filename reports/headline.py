"""The first screen in plain words: what happened, where, why and what to do, for a newcomer.

The facts are the diagnosis's own; only how they are put is decided here.
"""

from __future__ import annotations

import re
from typing import Final

from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Confidence, Diagnosis
from stabilitylab.analysis.leading import reading
from stabilitylab.analysis.operation import says, where
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.reports.text import clean, shorten

CONFIDENCE: Final[dict[Confidence, str]] = {
    "high": "high: the readings show the mechanism itself",
    "medium": "medium: the readings show what it leaves behind, which little else does",
    "low": "low: the readings agree with it, and with other explanations as well",
    "none": "none: no rule speaks",
}

_BLOCKS: Final = frozenset({"layers", "layer", "h", "blocks", "block"})
_TELLING: Final = frozenset({"The", "A", "An", "It", "This", "These", "That", "Each", "Edits", "No", "Its", "Such"})
_STATES: Final = {"diverging": "Diverging", "collapsed": "Collapsed", "non-finite": "Diverging"}


def plain_place(site: str) -> str:
    """``decoder layer 2 fc2`` for ``model.decoder.layers.2.fc2``; the end of a name that is built in another way."""
    if site == MODEL_SITE:
        return "the model as a whole"
    parts = site.split(".")
    for at, part in enumerate(parts[1:], start=1):
        if part.isdecimal() and parts[at - 1] in _BLOCKS and len(part) < 6:
            stack = [parts[at - 2]] if at > 1 and parts[at - 2] not in {"model", "transformer", "base_model"} else []
            return shorten(" ".join([*stack, "layer", part, *parts[at + 1 :]]), 80)
    return shorten(site, 60)


def headline(diagnosis: Diagnosis) -> str:
    """One sentence, with the advice's first as a second: since when, when NaN, where first, and why."""
    if diagnosis.verdict not in _STATES:
        return clean(diagnosis.says, 700)
    since = diagnosis.onset_edit if diagnosis.onset_edit is not None else diagnosis.first_bad_edit
    words = [f"{_STATES[diagnosis.verdict]} since edit {since}"] if since is not None else ["Bad from the start"]
    gone = _collapse(diagnosis)
    if diagnosis.verdict == "collapsed" and gone not in {None, since}:
        words = [f"Diverging since edit {since}", f"of no use from edit {gone} on"]
    if diagnosis.first_nonfinite_edit is not None:
        by = "" if diagnosis.operation is None else f" by {where(diagnosis.operation)}"
        words.append(f"NaN or ∞ at edit {diagnosis.first_nonfinite_edit}{by}")
    said = ", ".join(words)
    if diagnosis.first_bad_site is not None:
        said += f"; first in {plain_place(diagnosis.first_bad_site)} ({reading(diagnosis.findings[0])})"
    why = diagnosis.cause_says if diagnosis.cause != UNKNOWN_CAUSE else _unexplained(diagnosis)
    said += f": {why}"
    said = said if said.endswith(".") else f"{said}."
    advice = _first_step(diagnosis.advice)
    return clean(f"{said} Do this: {advice}" if advice else said, 900)


def _unexplained(diagnosis: Diagnosis) -> str:
    """What is said where no rule speaks: what the traced operation did, if one was."""
    return "the readings do not show why" if diagnosis.operation is None else says(diagnosis.operation)


def _first_step(advice: str) -> str:
    """The first sentence that tells one to do something, rather than how things are."""
    told = re.split(r"(?<=[.!?])\s+(?=[A-Z])", advice)
    step = next((each for each in told if each.partition(" ")[0] not in _TELLING), told[0])
    return step if step.isupper() else f"{step[:1].lower()}{step[1:]}"


def _collapse(diagnosis: Diagnosis) -> int | None:
    return min((each.start for each in diagnosis.findings if each.verdict == "collapsed"), default=None)


def lead(diagnosis: Diagnosis) -> str | None:
    """How long before the end the alarm was raised, where a run had an end."""
    end, name = diagnosis.first_nonfinite_edit, "first NaN or ∞"
    if end is None and diagnosis.verdict == "collapsed":
        end, name = _collapse(diagnosis), "collapse"
    if end is None or diagnosis.alarm_edit is None:
        return None
    ahead = end - diagnosis.alarm_edit
    if ahead <= 0:
        return f"none: raised with the {name}"
    return f"{ahead} edit{'s' if ahead != 1 else ''} before the {name}"
