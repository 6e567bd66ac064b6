"""A run's notes as they are shown: what each edit noted anew is said once, of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stabilitylab.record.note_kinds import NOT_PUT_BACK, NOTHING_MOVED
from stabilitylab.record.readings import Note
from stabilitylab.record.serving import SERVES

_EVENTS: Final = frozenset({"calibrated", "sites-discovered", "restore", "resumed", NOT_PUT_BACK})
"""Kinds of note that tell what happened; all others tell what was not measured, or not as asked."""
_PLAIN: Final = "moved no parameter of the model"


def folded(notes: Sequence[Note]) -> list[Note]:
    """The notes, those that one more edit moved nothing as a single one, in place of the first."""
    still = [note for note in notes if note.kind == NOTHING_MOVED and note.says.endswith(_PLAIN)]
    if len(still) < 2:
        return list(notes)
    says = f"{len(still)} edits (the first {still[0].edit}, the last {still[-1].edit}) {_PLAIN}"
    one = Note(still[0].edit, NOTHING_MOVED, says)
    return [one if note is still[0] else note for note in notes if note is still[0] or note not in still]


def missing(notes: Sequence[Note]) -> list[Note]:
    """What was not measured, or not as asked."""
    # Which layers a part of the editor serves is said where that part is named.
    return [note for note in folded(notes) if note.kind not in _EVENTS and note.kind != SERVES]


def events(notes: Sequence[Note]) -> list[Note]:
    """What happened."""
    return [note for note in folded(notes) if note.kind in _EVENTS]
