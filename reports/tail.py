"""A run that goes on, seen from another terminal: a page that renews itself, or a line per edit where it is piped.

Text from the run is always a `rich.text.Text` of cleaned characters, never markup.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stabilitylab.analysis.findings import Diagnosis, json_safe
from stabilitylab.errors import RunError
from stabilitylab.record.following import Follower, Seen
from stabilitylab.record.runfile import find_file, find_runs
from stabilitylab.reports.console import verdict_text
from stabilitylab.reports.events import short_places
from stabilitylab.reports.sparkline import sparkline
from stabilitylab.reports.terminal import Shown, show
from stabilitylab.reports.text import clean, number, sentence, shorten, with_short_names
from stabilitylab.reports.verdicts import chain, landed_words, why

SERIES: Final = {
    "update.norm": ("update", "largest update.norm", True),
    "drift.ratio": ("drift", "largest drift.ratio", True),
    "canary.kl": ("kl", "canary.kl", True),
    "canary.agreement": ("agree", "canary.agreement", False),
    "canary.max": ("logit", "canary.max", True),
    "logits.max": ("logit", "logits.max", True),
}
"""What is shown of each edit: by metric its short name, its name, and whether it is drawn by its logarithm."""
POINTS: Final = 36
"""Edits that a sparkline holds."""
BACKLOG: Final = 10
"""Edits from before the first look that get a line where the output is piped."""
ALARMS: Final = 4
SETTLING: Final = 10.0
"""Seconds that a new file may take to become a run."""


class Tail:
    """What was seen of a run so far, as a page, a line or a plain object."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._last: Seen | None = None
        self._points: deque[dict[str, float | None]] = deque(maxlen=POINTS)

    def add(self, seen: Seen) -> None:
        """Take in an edit."""
        self._last = seen
        self._points.append({metric: seen.largest(metric) for metric in SERIES})

    def _shown(self) -> list[str]:
        """The metrics that were read of late. The model's own logits stand in for a canary's."""
        read = [metric for metric in SERIES if any(point[metric] is not None for point in self._points)]
        return [metric for metric in read if metric != "logits.max" or "canary.max" not in read]

    def _said(self) -> Diagnosis:
        return self._follower.diagnosis() if self._last is None else self._last.diagnosis

    def _words(self, says: str, limit: int) -> str:
        """What is said, with short names for layers."""
        return with_short_names(clean(says, limit), short_places(self._follower.sites))

    def page(self, now: float) -> RenderableType:
        """The run at a glance. now: seconds since the epoch."""
        follower, said = self._follower, self._said()
        head = Table.grid(expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(Text.assemble(verdict_text(said.verdict), "  ", shorten(str(follower.path), 44)), self._state(now))
        counts = [f"{number(follower.edits)} edit{'s' if follower.edits != 1 else ''}"]
        if follower.failed:
            counts.append(f"{number(follower.failed)} failed")
        if follower.edits_per_minute is not None:
            counts.append(f"{number(follower.edits_per_minute, 2)} a minute")
        parts: list[RenderableType] = [head, Text(self._words(said.says, 500))]
        if why(said):
            parts.append(Text(f"Why: {self._words(why(said), 300)}"))
        parts += [Text(f"{sentence(role)}: {self._words(says, 300)}") for role, says in chain(said)]
        if said.landed in ("some", "none"):
            counts.append(f"took effect: {landed_words(said)}")
        parts.append(Text(" · ".join(counts), style="dim"))
        series = Table.grid(padding=(0, 2))
        series.add_column(style="dim", no_wrap=True)
        series.add_column(no_wrap=True)
        series.add_column(justify="right", no_wrap=True)
        for metric in self._shown():
            _, name, log = SERIES[metric]
            points = [point[metric] for point in self._points]
            last = next((value for value in reversed(points) if value is not None), None)
            series.add_row(Text(name), Text(sparkline(points, log=log), style="cyan"), Text(number(last)))
        if series.rows:
            parts += [Text(), series]
        if said.forecast:
            parts += [Text(), Text(f"forecast: {self._words(said.forecast.says, 300)}")]
        if follower.alarms:
            parts += [Text(), Text("Last alarms", style="bold"), self._alarms()]
        return Group(*parts)

    def _state(self, now: float) -> Text:
        if self._follower.closed:
            return Text("closed")
        began = self._follower.last_started
        if began is None:
            return Text("no edit yet", style="dim")
        return Text(f"last edit {_ago(now - began)} ago", style="dim")

    def _alarms(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for alarm in self._follower.alarms[-ALARMS:]:
            known = alarm.verdict in ("drifting", "diverging", "collapsed", "non-finite", "stable")
            sign = verdict_text(alarm.verdict) if known else Text(clean(alarm.verdict, 20))
            table.add_row(Text(f"edit {alarm.edit}"), sign, Text(self._words(alarm.says, 240)))
        return table

    def line(self, seen: Seen) -> Text:
        """One edit on one line."""
        row = seen.row
        words = [f"edit {row.edit}", f"{clean(row.status, 12):<7}", f"{verdict_text(seen.diagnosis.verdict)!s:<12}"]
        for metric in self._shown():
            value = seen.largest(metric)
            if value is not None:
                words.append(f"{SERIES[metric][0]} {number(value)}")
        if row.error is not None:
            words.append(clean(row.error, 160))
        return Text("  ".join(words))

    def closing(self) -> Text:
        """The last line of a run that was closed."""
        return Text(f"closed after {number(self._follower.edits)} edits: {self._words(self._said().says, 700)}")

    def plain(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        follower, said = self._follower, self._said()
        last = self._last
        known: dict[str, Any] = json_safe(
            {
                "run": str(follower.path),
                "complete": follower.complete,
                "edits": said.edits,
                "failed": follower.failed if last is None else last.failed,
                "edits_per_minute": follower.edits_per_minute,
                "verdict": said.verdict,
                "says": said.says,
                "onset_edit": said.onset_edit,
                "alarm_edit": said.alarm_edit,
                "cause": said.cause,
                "causes": [vars(link) for link in said.causes],
                "landed": said.landed,
                "unwatched": said.unwatched,
                "forecast": None if said.forecast is None else vars(said.forecast),
                "last": last
                and {
                    "edit": last.row.edit,
                    "label": last.row.label,
                    "status": last.row.status,
                    "error": last.row.error,
                    "readings": {metric: last.largest(metric) for metric in SERIES},
                },
                "alarms": [vars(alarm) for alarm in follower.alarms if last is None or alarm.edit <= last.row.edit],
            }
        )
        return known


def _ago(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7_200 else f"{whole // 3_600} h"


def follow(
    path: Path,
    *,
    interval: float = 2.0,
    once: bool = False,
    as_json: bool = False,
    console: Console | None = None,
    says: Callable[[str], None] = lambda words: None,
) -> None:
    """Show a run until it is closed, or as it is now.

    once: one page (or object) and no waiting. as_json: one object per line, for each new edit. Where a person watches,
    a page is renewed every `interval` seconds; else each new edit gets a line. says: told what is waited for.

    Raises RunError when there is no run to follow: at once with `once`, or where there is something else; a path that
    is not there yet is waited for.
    """
    console = console or Console()
    follower = Follower(path)
    tail = Tail(follower)
    seen = follower.look(POINTS) if once else _first_look(follower, interval, says)
    if once:
        for each in seen:
            tail.add(each)
        _write(console, tail.plain()) if as_json else show(console, tail.page(time.time()))
        return
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    told = len(seen) - BACKLOG
    with live or nullcontext():
        while True:
            for place, each in enumerate(seen):
                tail.add(each)
                if live is None and place >= told:
                    _write(console, tail.plain() if as_json else tail.line(each))
            if live is not None:
                live.update(Shown(tail.page(time.time())), refresh=True)
            elif follower.closed:
                _write(console, tail.plain() if as_json else tail.closing())
            if follower.closed:
                return
            time.sleep(interval)
            seen, told = follower.look(), 0


def _write(console: Console, what: Text | dict[str, Any]) -> None:
    """One line, however long, at once."""
    line = what if isinstance(what, Text) else Text(json.dumps(what, allow_nan=False))
    show(console, line, soft_wrap=True)
    console.file.flush()


def _first_look(follower: Follower, interval: float, says: Callable[[str], None]) -> list[Seen]:
    """What a run holds, as soon as there is one. Raises RunError where none can be expected."""
    waiting = False
    while True:
        try:
            return follower.look(POINTS)
        except RunError as error:
            if not _may_come(follower.path):
                raise
            if not waiting:
                says(f"{clean(error, 400)}; waiting for it, Ctrl-C ends")
        waiting = True
        time.sleep(interval)


def _may_come(path: Path) -> bool:
    """Whether there is nothing yet, or a file so young that its writer may be at its first table."""
    try:
        file = find_file(path)
    except RunError:
        return not path.exists() or (path.is_dir() and not find_runs(path))
    return time.time() - file.stat().st_mtime < SETTLING
