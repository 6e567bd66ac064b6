"""The story of a run that diverges: what was claimed of its causes stays, as the run goes on.

A cause is read from evidence that fades: growth saturates, steps become small again, everything turns to NaN. What it
showed once it has shown. From the alarm on each claim of high or medium confidence is kept, in its last wording; a
cause of higher precedence that shows later takes the lead, and the others stay in the chain behind it.
"""

from __future__ import annotations

from typing import Final

from stabilitylab.analysis.causes.evidence import Evidence
from stabilitylab.analysis.causes.precedence import chain, claims, first_of
from stabilitylab.analysis.causes.rule import Cause
from stabilitylab.analysis.findings import Link

CLOSELY: Final = 50
"""Edits from the alarm on after each of which causes are looked for; later each tenth."""
SELDOM: Final = 10


class Story:
    """Remembers claims from the alarm on."""

    def __init__(self) -> None:
        self._kept: dict[str, Cause] = {}

    @staticmethod
    def is_due(edit: int, alarm: int) -> bool:
        """Whether to look for causes after this edit."""
        return edit - alarm <= CLOSELY or edit % SELDOM == 0

    def keep(self, evidence: Evidence) -> None:
        """Take in what can be claimed now."""
        self._kept |= {name: cause for name, cause in claims(evidence).items() if cause.confidence != "low"}

    def tell(self, evidence: Evidence) -> tuple[Cause, tuple[Link, ...]]:
        """(the cause to act on first, the chain), by what was kept and by what can be claimed now."""
        now = claims(evidence)
        unsure = {name: cause for name, cause in now.items() if name not in self._kept}
        known = {**unsure, **self._kept, **{name: cause for name, cause in now.items() if cause.confidence != "low"}}
        return first_of(known, evidence), chain(known)
