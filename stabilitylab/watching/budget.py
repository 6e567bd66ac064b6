"""At which edits the dear probes measure, so that all of them keep within a share of the loop's time. No torch here.

Times and what the weights do come in, one decision for each edit goes out. Costs are measured once, over the first
edits: cadences that followed each edit's time would make two runs of one seed two different runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from stabilitylab.analysis.pace import Movement
from stabilitylab.errors import UsageError
from stabilitylab.probes.base import Probe
from stabilitylab.record.run import Run

DEFAULT_SHARE: Final = 0.03
"""Of the loop's own time that probes may take."""
CADENCES: Final = (1, 2, 5, 10, 20)
"""Every so many edits are measured in full."""
FIRST: Final = 8
"""Edits that are measured in full in any case, which shows what that costs."""
CHEAP: Final = 3
"""Edits after those that are measured without what is dear, where in full is more than was allowed."""
WATCHFUL: Final = 8
"""Edits in full from one that was out of the ordinary on."""
_LEAST_SECONDS: Final = 1e-6
"""Of an edit: one that does nothing takes none at all, or less, by the clock."""
_PERCENT: Final = 100


def share_of(budget: object) -> float | None:
    """The share that `attach` was given; None for no limit. Raises UsageError for anything else."""
    if budget is None:
        return None
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if number and 0 < budget <= 1:  # type: ignore[operator]
        return float(budget)  # type: ignore[arg-type]
    percent = ""
    if number and 1 < budget <= _PERCENT:  # type: ignore[operator]
        percent = f"; {budget} percent are {budget / _PERCENT:g}"  # type: ignore[operator]
    raise UsageError(
        f"budget={budget!r}: expected the share of the loop's time that probes may take, above 0 and at most 1, such as"
        f" {DEFAULT_SHARE}, or None to measure everything at each edit{percent}"
    )


@dataclass(frozen=True)
class Recorded:
    """Another run's decisions. in_full: the edits that it measured in full. last: its last edit. every: its cadence."""

    in_full: Collection[int]
    last: int
    every: int


class Budget:
    """Decides edit by edit whether it is measured in full, or without what is dear.

    In full for the first 8; then, where that took more than its share, without for 3; then in full at every n-th, the
    smallest n of `CADENCES` that keeps to the share. One step denser while some update is larger than usual, and for 8
    edits in full from one on that leaps or is out of the ordinary; if it goes on being so, that is movement.
    """

    def __init__(
        self, share: float | None, probes: Sequence[Probe[Any]] = (), recorded: Recorded | None = None
    ) -> None:
        """share: None for all edits in full. recorded: decisions to repeat, in place of any share."""
        self.share = share
        self.metrics = tuple(metric.name for probe in probes if probe.is_paced for metric in probe.metrics)
        """What only an edit in full has."""
        self.every: int | None = 1 if share is None else None
        """Every so many edits in full; None while that is not settled."""
        self.share_in_full: float | None = None
        self.share_otherwise: float | None = None
        self._recorded = recorded
        if recorded is not None:
            self.every = recorded.every
        self._full: list[tuple[float, float]] = []
        self._cheap: list[tuple[float, float]] = []
        self._last_full = 0
        self._since_alert: int | None = None
        self._moving = False

    @property
    def always(self) -> bool:
        """Whether every edit is measured in full, as far as it is known by now."""
        return self._recorded is None and self.every == 1

    def wants(self, edit: int) -> bool:
        """Whether to measure this edit in full; called once for each, in order."""
        full = self._is_full(edit)
        if full:
            self._last_full = edit
        return full

    def _is_full(self, edit: int) -> bool:
        if self._recorded is not None and edit <= self._recorded.last:
            return edit in self._recorded.in_full
        if self.every == 1 or edit <= FIRST or self._is_watchful:
            return True
        if self.every is None:
            return False
        return edit - self._last_full >= (_denser(self.every) if self._moving else self.every)

    @property
    def _is_watchful(self) -> bool:
        return self._since_alert is not None and self._since_alert < WATCHFUL

    def heard(self, movement: Movement, alert: bool) -> None:
        """What the last edit was like: what the weights did, and whether anything was out of the ordinary."""
        if alert or movement.leaping:
            self._since_alert = 0 if self._since_alert is None else self._since_alert + 1
        elif self._since_alert is not None:
            self._since_alert = None if self._since_alert + 1 >= WATCHFUL else self._since_alert + 1
        self._moving = movement.moving or alert or movement.leaping

    def timed(self, edit: int, in_full: bool, loop: float, probes: float) -> bool:
        """An edit took so many seconds, and probes so many beside. Returns whether this has settled the cadence."""
        if self.every is not None or self.share is None or edit < 2:  # the first one warms up
            return False
        if in_full != (edit <= FIRST):
            return False
        (self._full if in_full else self._cheap).append((loop, probes))
        if edit < FIRST or (in_full and edit > FIRST):
            return False
        if not self._full:  # each of the first ones failed: nothing is known of what it costs
            self.every = CADENCES[0]
            return True
        self.share_in_full = self.share_in_full if self.share_in_full is not None else _share(self._full)
        if self.share_in_full > self.share:
            if len(self._cheap) < CHEAP:
                return False
            self.share_otherwise = min(_share(self._cheap), self.share_in_full)
        self.every = self._chosen()
        return True

    def _chosen(self) -> int:
        """The smallest cadence that keeps to the share, else the largest one."""
        full, otherwise = self.share_in_full, self.share_otherwise
        if full is None or otherwise is None:
            return CADENCES[0]
        fits = (every for every in CADENCES if otherwise + (full - otherwise) / every <= (self.share or 1.0))
        return next(fits, CADENCES[-1])

    def to_json(self) -> dict[str, Any]:
        """What was decided, for the manifest."""
        told = {
            "share": self.share,
            "every": self.every,
            "share_in_full": self.share_in_full,
            "share_otherwise": self.share_otherwise,
            "metrics": list(self.metrics),
        }
        return {key: value for key, value in told.items() if value is not None}


def _denser(every: int) -> int:
    return CADENCES[max(0, CADENCES.index(every) - 1)] if every in CADENCES else every


def _share(times: list[tuple[float, float]]) -> float:
    """What probes took of the loop's own time, each in the median edit: a burst of other work counts little."""
    loop = median(seconds for seconds, _ in times)
    return median(probes for _, probes in times) / max(loop, _LEAST_SECONDS)


def decisions_of(run: Run) -> Recorded:
    """Which edits of a run were measured in full: those that have a reading of what is dear.

    A run that had no budget measured all of them so.
    """
    told = run.manifest.get("budget") or {}
    every: int = told["every"] if told.get("every") in CADENCES else CADENCES[0]
    numbers = frozenset(edit.edit for edit in run.edits)
    in_full = numbers
    if "share" in told or every != CADENCES[0]:
        metrics = told.get("metrics")
        dear = frozenset(metrics if isinstance(metrics, list) else ())
        in_full = frozenset(each.edit for each in run.edits if any(name in dear for name, _ in each.row.readings))
    return Recorded(in_full, max(numbers, default=0), every)
