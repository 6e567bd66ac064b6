"""What a scan warns of before the first edit: one claim, how urgent it is, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

Urgency = Literal["fatal", "risk", "note"]
"""``fatal``: it is broken already, or the first edit that gets there breaks it. ``risk``: it makes an end of the run
likelier, or nearer. ``note``: worth knowing."""
URGENCIES: Final[tuple[Urgency, ...]] = get_args(Urgency)
"""The most urgent first."""


@dataclass(frozen=True)
class Caution:
    """One warning.

    rule: which kind of warning. place: the tensor, layer or part of an editor that it is about; empty for the whole
    model. says: one or two sentences. advice: what to do about it. cause: of those that a run is diagnosed with
    (docs/causes.md), the one that it may lead to, or empty.
    """

    rule: str
    urgency: Urgency
    place: str
    says: str
    advice: str
    cause: str = ""

    def __str__(self) -> str:
        return self.says

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def by_urgency(cautions: Iterable[Caution]) -> tuple[Caution, ...]:
    """The most urgent first, else in the order that they came in."""
    return tuple(sorted(cautions, key=lambda caution: URGENCIES.index(caution.urgency)))
