"""When an edit is made once more: what is kept before each, which one is worth it, and what the run is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import nn

from stabilitylab.acting.memory import in_gb, shortage
from stabilitylab.acting.replay import Application, Kept, Replay, lost_in, size_of
from stabilitylab.errors import UsageError
from stabilitylab.record.note_kinds import REPLAY
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import EditRow, Key
from stabilitylab.watching.recording import Recorder


class Replays:
    """The replays of one run. Each happens where an edit's row is about to be written, or when it is asked for."""

    def __init__(self, model: nn.Module, editor: object | None, recorder: Recorder, *, keeps: bool) -> None:
        """keeps: whether to keep, before each edit, what it may touch.

        Raises UsageError where that can't be kept, or there is no memory for it; nothing is copied yet.
        """
        self.busy = False
        """Whether an edit is being made once more."""
        self.keeps = keeps
        self._editor, self._recorder = editor, recorder
        self._kept: Kept | None = None
        self._application: Application | None = None
        self._lost = frozenset[str]()
        self._by_design = frozenset[Key]()
        self._over = self._passing_over = not keeps
        if not keeps:
            return
        sizes = size_of(model, editor)
        short = shortage(sizes)
        if short is not None:
            raise UsageError(
                f"replay=True keeps a copy of the model and its editor: {short}; expected more memory, or replay=False"
            )
        self._lost = lost_in(model)
        recorder.note(
            "replay-memory",
            f"a copy of the model and its editor is kept, {in_gb(sum(sizes.values()))}; as much again is needed when "
            "an edit is made once more",
        )

    def before(self, model: nn.Module, application: Application | None) -> None:
        """An edit begins: keep what it may touch. application: how it is made, where it was wrapped."""
        if self.keeps:
            self._kept = self._application = None  # the last one goes before the next is made
            self._kept = Kept(model, self._editor, application)
            self._application = application

    def interrupted(self) -> None:
        """The edit was stopped from outside: it is not to be made once more."""
        self._application = None

    def after(self, row: EditRow, model: nn.Module, operations: Sequence[Operation]) -> float:
        """An edit ended, and its row is about to be written: make it once more if it is the first that left something
        that is not finite. Returns the seconds that took.

        The first that left it in the model is made so, and before that the first with a passing one, or that failed.
        operations: that were named by now. What is not finite in the canary's answer alone is not of the edit's making.
        """
        kept, application = self._kept, self._application
        if row.edit == 0:
            self._by_design = _nonfinite_in(row)
        if self._over or kept is None or application is None:
            return 0.0
        lost = lost_in(model) - self._lost
        named = any(each.phase == "edit" and each.reach != "values" for each in operations)
        passing = row.status == "failed" or named or bool(_nonfinite_in(row) - self._by_design)
        if not lost and (self._passing_over or not passing):
            return 0.0
        self._over, self._passing_over = bool(lost), True
        clock = time.perf_counter()
        self._replay(Replay(row.edit, application, kept, self._editor), model, row.status == "failed")
        return time.perf_counter() - clock

    def autopsy(self, model: nn.Module, application: Callable[[nn.Module], Application]) -> Operation | None:
        """Make an edit once more now: from what was kept before the last one, or else from the present state.

        application: how it is made on a model. Raises UsageError where neither is any use.
        """
        kept = self._kept
        if kept is not None:
            replay = Replay(self._recorder.edits, application(kept.model), kept, self._editor)
            return self._replay(replay, model)
        lost = sorted(lost_in(model))
        if lost:
            raise UsageError(
                f"the model is not finite any more ('{lost[0]}'), and nothing was kept of the state before; expected "
                "attach(..., replay=True), or an autopsy while the model is finite"
            )
        asked = application(model)
        replay = Replay(self._recorder.edits, asked, Kept(model, self._editor, asked), self._editor)
        return self._replay(replay, None)

    def _replay(self, replay: Replay, model: nn.Module | None, failed: bool | None = None) -> Operation | None:
        self.busy = True
        try:
            operation = replay.make(model, failed)
        finally:
            self.busy = False
            for says in replay.notes:
                self._recorder.note(REPLAY, says)
        if operation is not None:
            self._recorder.operation(operation)
        return operation

    def release(self) -> None:
        """Let go of what was kept."""
        self._kept = self._application = self._editor = None


def _nonfinite_in(row: EditRow) -> frozenset[Key]:
    """Which of an edit's readings tell of values that are not finite."""
    counts = {key: values[0] for key, values in row.readings.items() if key[0].endswith(".nonfinite")}
    return frozenset(key for key, count in counts.items() if count > 0 and not key[0].startswith("canary."))
