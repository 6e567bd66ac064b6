"""Which of the warnings that a scan gave before the first edit came true in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Link

_ENDS: Final = {"float16-limit": "dtype-overflow"}
"""Two names for the end of a dtype's range: by growth that is named beside it, or by itself."""


def foretold(cautions: Sequence[Caution], diagnosis: Diagnosis) -> tuple[tuple[Caution, Link | None], ...]:
    """Each warning, in its order, with the link of the run's chain of causes that it led to; None for one that did not.

    Warnings match by their cause. Where some of the same cause are about the very place of the link, only they and
    those about the whole model do: that another layer was at the same risk did not come true. Of several links with
    one cause, that at the warning's place is taken, else the first.
    """
    links = _links(diagnosis)
    return tuple((caution, _its_link(caution, cautions, links)) for caution in cautions)


def _links(diagnosis: Diagnosis) -> tuple[Link, ...]:
    """The chain, with the cause that is named first, if the chain has it not."""
    cause = diagnosis.cause
    if cause in {UNKNOWN_CAUSE, *(link.cause for link in diagnosis.causes)}:
        return diagnosis.causes
    named = Link(
        "trigger",
        cause,
        diagnosis.first_bad_edit,
        diagnosis.first_bad_site,
        diagnosis.first_bad_metric,
        diagnosis.cause_says,
        diagnosis.advice,
        diagnosis.confidence,
    )
    return (named, *diagnosis.causes)


def _its_link(caution: Caution, cautions: Sequence[Caution], links: Sequence[Link]) -> Link | None:
    same = [link for link in links if caution.cause and _end_of(link.cause) == _end_of(caution.cause)]
    here = [link for link in same if meet(caution.place, link.site)]
    if here or not same or not caution.place:
        return next(iter(here or same), None)
    others = (each for each in cautions if _end_of(each.cause) == _end_of(caution.cause))
    return None if any(meet(each.place, link.site) for each in others for link in same) else same[0]


def _end_of(cause: str) -> str:
    return _ENDS.get(cause, cause)


def meet(place: str, site: str | None) -> bool:
    """Whether a warning's place and a site are the same, or one a part of the other. False where one is not known."""
    if not place or not site:
        return False
    return place == site or place.startswith(f"{site}.") or site.startswith(f"{place}.")
