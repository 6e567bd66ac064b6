"""Dry edits: made before the first edit and measured like any, each rolled back; what they show is what is usual."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from stabilitylab.errors import UsageError
from stabilitylab.record.note_kinds import EXCHANGE_OFF
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import Alarm, EditRow, Note, OutcomeKind
from stabilitylab.watching.progress import bar
from stabilitylab.watching.reach import model_in, roots_of
from stabilitylab.watching.snapshot import RandomStates, Snapshot, take
from stabilitylab.watching.undoing import undone

if TYPE_CHECKING:
    from stabilitylab.watching.monitor import Monitor

FEWEST: Final = 8
"""Readings that a baseline needs, see `analysis.drift_series.BASELINE`."""


class DryRecord:
    """What the monitor of the dry edits writes to: kept in memory, and in no file until all of them are made."""

    def __init__(self, path: Path) -> None:
        """path: the run file that the rows are for."""
        self.path = path
        self.rows: list[EditRow] = []
        self.broken: list[str] = []

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Nothing here fails."""
        return contextlib.nullcontext()

    def append_dry(self, rows: Sequence[EditRow]) -> int:
        """Nothing: dry edits have no dry edits of their own."""
        return 0

    def append(self, row: EditRow) -> None:
        """Keep a dry edit's row. Edit 0 is left out: the run has its own."""
        if row.edit > 0:
            self.rows.append(row)

    def note(self, note: Note) -> None:
        """Keep what broke; what else is to be said is said by the run's own edits."""
        if note.kind in {"probe-off", "canary-off", EXCHANGE_OFF}:
            self.broken.append(note.says)

    def operation(self, operation: Operation) -> None:
        """Nothing: dry edits are not traced."""

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Nothing: the run has a manifest."""

    def outcome(self, edit: int, outcome: OutcomeKind) -> None:
        """Nothing: each is rolled back."""

    def alarm(self, alarm: Alarm) -> None:
        """Nothing: a single edit raises no alarm of the run's."""

    def close(self) -> None:
        """Nothing is open."""


def first_of(requests: Iterable[Any], n: int) -> list[Any]:
    """The first n requests. Raises UsageError when they are too few for a baseline."""
    if not isinstance(n, int) or isinstance(n, bool) or n < FEWEST:
        raise UsageError(f"calibrate(n={n!r}): expected a whole number of dry edits, {FEWEST} or more")
    chosen = list(islice(requests, n))
    if len(chosen) < FEWEST:
        raise UsageError(f"calibrate got {len(chosen)} requests; expected {FEWEST} or more, which a baseline needs")
    return chosen


def make(
    monitor: Monitor, model: nn.Module, editor: object | None, apply: Callable[[Any, Any], object], requests: list[Any]
) -> None:
    """Make each of `requests` as one edit of `monitor` on `model`, and roll it back.

    Random numbers go on from one dry edit to the next, so that they are independent of one another, and are put back
    after the last one. Whatever is raised inside, everything is put back first.

    Raises:
        UsageError: the model or the editor holds a tensor that can't be copied.
        EditError: something was not bit for bit as before after it was put back.
    """
    before = take(roots_of(model, editor, apply))
    random = RandomStates(before.generators)
    try:
        with bar("dry edits", len(requests)) as made:
            for number, request in enumerate(requests, 1):
                _one(monitor, model, before, number, functools.partial(apply, model, request))
                made(number)
    finally:
        random.put_back()


def _one(monitor: Monitor, model: nn.Module, before: Snapshot, number: int, apply: Callable[[], object]) -> None:
    with undone(before, number, otherwise="leave calibrate out"), monitor.edit() as edit:
        edited = model_in(apply())
        if edited is not None:
            edit.returns(edited)
    edit.returns(model)  # the next one starts from the model that was attached to, not from a clone or a wrapper
