"""How often the costly things are done: the canary, the dear probes, the tracer. Each is told what an edit was like."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from stabilitylab.acting.tracing import Tracing
from stabilitylab.analysis.alertness import gives_reason
from stabilitylab.analysis.pace import Pace
from stabilitylab.probes.weight_pass import WeightPass, WeightScan
from stabilitylab.record.readings import EditRow
from stabilitylab.watching.budget import Budget
from stabilitylab.watching.canary import Canary, Schedule
from stabilitylab.watching.recording import Recorder
from stabilitylab.watching.underway import Times, Unread


class Pacing:
    """Knows what the weights do, and passes it on to whoever decides by it. Decides nothing itself."""

    def __init__(self, canary: Canary | None, budget: Budget | None) -> None:
        """budget: None to measure everything at each edit."""
        self._canary = None if canary is None else Schedule(canary)
        self._budget = Budget(None) if budget is None else budget
        self._pace = Pace()
        self._seen = 0
        self._began = time.perf_counter()

    def wants_in_full(self, edit: int) -> bool:
        """Whether what is dear is measured at this edit too; asked once for each, in order."""
        return self._budget.wants(edit)

    @property
    def decides_on_weights(self) -> bool:
        """Whether the canary's turn depends on what the weights do."""
        return self._canary is not None and not self._canary.always

    def canary_is_due(self, edit: int) -> bool:
        """Whether to forward the canary after this edit, by what the weights do as far as it is known by now."""
        now = self._pace.now
        elapsed = time.perf_counter() - self._began
        return self._canary is not None and self._canary.is_due(edit, elapsed, now.moving, now.leaping)

    def paid_for_canary(self, seconds: float) -> None:
        """A forward took this long."""
        if self._canary is not None:
            self._canary.paid(seconds)

    def weights_are(self, edit: int, scans: Mapping[str, WeightScan]) -> None:
        """What the weights of an edit are, by site. Counts once an edit, and only where anything depends on it."""
        if edit in (0, self._seen) or (self._budget.always and not self.decides_on_weights):
            return
        self._seen = edit
        updates = {site: seen.update for site, seen in scans.items() if isinstance(seen, WeightPass)}
        lost = {site: math.nan for site, seen in scans.items() if seen.nonfinite}
        self._pace.observe(updates | lost)

    def heard(self, row: EditRow, times: Times, unread: Unread, tracing: Tracing, recorder: Recorder) -> None:
        """An edit is in the record: what it was like, and what it took."""
        reason, applied = gives_reason(row, recorder.found_at(row.edit)), row.status == "applied"
        tracing.schedule.heard(reason)
        if applied and tracing.schedule.timed(times.loop, times.tracer if unread.tracers else None):
            recorder.manifest({"trace": tracing.to_json()})
        self._budget.heard(self._pace.now, reason)
        if applied and self._budget.timed(row.edit, unread.in_full, times.loop - times.tracer, times.probes):
            recorder.manifest({"budget": self._budget.to_json()})

    def pause(self, seconds: float) -> None:
        """So much of the time was no part of the loop: a canary that has a share of it has none in that."""
        self._began += seconds
