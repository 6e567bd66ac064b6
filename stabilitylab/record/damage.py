"""What of a run file is not as it was written, in words: its records carry checksums, and are counted. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stabilitylab.record.checked import expect
from stabilitylab.record.note_kinds import DAMAGED
from stabilitylab.record.readings import Note
from stabilitylab.record.tables import ALARM, NOTE, OPERATION, OUTCOME, Table

_WORDS: Final = {NOTE: "note", ALARM: "alarm", OUTCOME: "outcome", OPERATION: "traced operation"}
_FIRST: Final = {"edit": 0, "dry edit": 1}
"""What the first of them is numbered."""
_CHANGED: Final = "can't be read any more: {} of the run file changed after it was written"


@dataclass(frozen=True)
class Gap:
    """Rows that can't be read. what: ``edit`` or ``dry edit``. after, before: the edits that were written next to them,
    −1 and None where none is known. rows: how many. layout: of their readings, where it is that which is damaged.
    """

    what: str
    after: int
    before: int | None
    rows: int
    layout: int | None = None

    @property
    def says(self) -> str:
        """In one sentence."""
        first = max(self.after + 1, _FIRST[self.what])
        if self.before is None:
            which = f"the last {_counted(self.rows, self.what)}" if self.rows > 1 else f"the last {self.what}"
            which += f", after {self.what} {self.after}," if self.after >= _FIRST[self.what] else ""
        elif self.before - first > self.rows:
            which = f"{self.rows} of the {self.what}s {first} to {self.before - 1}"
        else:
            which = f"{self.what} {first}" if self.rows == 1 else f"{self.what}s {first} to {self.before - 1}"
        records = "its record" if self.rows == 1 else "their records"
        return f"{which} {_CHANGED.format(records if self.layout is None else f'layout {self.layout}')}"


class Damage:
    """What is found to be missing while one file is read."""

    def __init__(self, counts: Any) -> None:
        """counts: how many records a table held at least when the manifest was written, by its name."""
        self._counts: Mapping[str, int] = expect(Mapping[str, int], counts, "the number of records")
        self._notes: list[Note] = []
        self.records = 0
        """How many can't be read."""

    def counted(self, table: Table) -> int:
        """The least number of records that a table held."""
        return self._counts.get(table.name, 0)

    def expect_all(self, table: Table, found: int) -> None:
        """Raises ValueError where a table holds another number of records than it should."""
        if found != self._counts.get(table.name, found):
            raise ValueError(f"its table {table.name!r} holds {found} of {self._counts[table.name]} records")

    def lacks(self, table: Table, found: int, last: int) -> None:
        """Of a table of what was said so many records were found, of numbers up to `last`."""
        missing = max(last, self.counted(table)) - found
        if missing > 0:
            record = "its record" if missing == 1 else "their records"
            self._add(0, f"{_counted(missing, _WORDS[table])} {_CHANGED.format(record)}", missing)

    def gaps(self, gaps: Sequence[Gap]) -> None:
        """Take in what rows are missing."""
        for gap in gaps:
            self._add(gap.after + 1 if gap.what == "edit" else 0, gap.says, gap.rows)

    def _add(self, edit: int, says: str, records: int) -> None:
        self._notes.append(Note(edit, DAMAGED, says))
        self.records += records

    @property
    def notes(self) -> tuple[Note, ...]:
        """What is to be said of it."""
        return tuple(self._notes)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
