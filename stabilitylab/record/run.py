"""Reading a run: `load` opens the file read-only, also while it is being written. Needs no torch."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.analysis.restoring import means_single_edits
from stabilitylab.analysis.thresholds import Thresholds, from_json, shipped
from stabilitylab.errors import RunError, UsageError, did_you_mean
from stabilitylab.record.acknowledged import acknowledged
from stabilitylab.record.catalogue import Catalogue
from stabilitylab.record.display import Library, Plot, frame, html
from stabilitylab.record.growing import Growing
from stabilitylab.record.note_kinds import DAMAGED_ENTRY, LOST_ENTRY
from stabilitylab.record.operations import Operation
from stabilitylab.record.packed import Alike, Frame, by_frame
from stabilitylab.record.readings import Alarm, Array, EditRow, Key, Metric, Note, OutcomeKind
from stabilitylab.record.runfile import connect, damaged, find_file

DAMAGE: Final = (sqlite3.DatabaseError, ValueError, TypeError, KeyError, OverflowError)
"""What reading a file raises that is no run, or none any more."""
MOST_SHOWN: Final = 1 << 24
"""Values of a series up to which it is as wide as its metric is said to be; else as its widest reading is."""
FIRST_AHEAD: Final = 10
MOST_AHEAD: Final = 512
MOST_VALUES: Final = 1 << 18
"""How many rows an analyzer is shown ahead, and how many readings."""
MOST_SERIES: Final = 1 << 27
"""Values of a series, whose readings may be far fewer."""

WRAPPERS: Final = frozenset({"base_model", "model", "module", "_orig_mod"})
"""What PEFT, data parallelism and ``torch.compile`` put in front of the names of the model inside."""


def _in_front_of(site: str, name: str) -> set[str]:
    """The steps that `name` has in front of `site`; all of its own where it does not end in that."""
    front = name.removesuffix(site) if name.endswith(f".{site}") else f"{name}.."
    return set(front.split(".")[:-1])


def thresholds_of(manifest: Mapping[str, Any], path: Path) -> Thresholds:
    """The limits that a manifest names, else those of the package. Raises UsageError where it holds some that are none.

    path: for the message.
    """
    own = manifest.get("thresholds")
    return shipped() if own is None else from_json(own, f"the manifest of '{path}'")


def analyzer_of(metrics: Sequence[Metric], manifest: Mapping[str, Any], thresholds: Thresholds) -> Analyzer:
    """A new analyzer, with what a manifest says of the loop."""
    return Analyzer(metrics, thresholds, single_edits=means_single_edits(manifest.get("config") or {}))


def fed(
    analyzer: Analyzer,
    rows: Sequence[EditRow],
    dry: Sequence[EditRow],
    notes: Sequence[Note],
    operations: Sequence[Operation] = (),
) -> Iterator[EditRow]:
    """Show rows to an analyzer in the order in which the monitor did; yields each when it was seen.

    That is edit 0, the dry edits, then all others; and each note and operation before the row of its edit.
    """
    said: list[Note | Operation] = [*notes, *operations]
    waiting = deque(sorted(said, key=lambda each: each.edit))
    started = [row for row in rows if row.edit < 1]
    ahead = len(started)
    for number, row in enumerate(rows):
        if number == len(started):
            for dry_row in dry:
                analyzer.observe_dry(dry_row)
        if number == ahead:
            ahead = _ahead(rows, number, number - len(started))
            if ahead - number > 1:
                analyzer.look_ahead(rows[number:ahead])
        while waiting and waiting[0].edit <= row.edit:
            _tell(analyzer, waiting.popleft())
        analyzer.observe(row)
        yield row
    if len(rows) == len(started):
        for dry_row in dry:
            analyzer.observe_dry(dry_row)
    for each in waiting:
        _tell(analyzer, each)


def _ahead(rows: Sequence[EditRow], begin: int, seen: int) -> int:
    """Up to which row to look ahead: first a few, since nothing can be said of rows without a baseline, then many."""
    room = MOST_VALUES // max(len(rows[begin].readings), 1)
    return min(len(rows), begin + max(1, min(max(seen, FIRST_AHEAD), MOST_AHEAD, room)))


def _tell(analyzer: Analyzer, said: Note | Operation) -> None:
    if isinstance(said, Note):
        analyzer.observe_note(said)
    else:
        analyzer.observe_operation(said)


@dataclass(frozen=True, slots=True)
class Edit:
    """One row of a run with what became of it. outcome: None while nothing was observed."""

    row: EditRow
    outcome: OutcomeKind | None

    @property
    def edit(self) -> int:
        """The edit's number; 0 is the state before the first edit."""
        return self.row.edit

    @property
    def label(self) -> str:
        """The label that the loop gave it."""
        return self.row.label

    @property
    def status(self) -> str:
        """``start`` (edit 0), ``applied`` or ``failed``."""
        return self.row.status


@dataclass(frozen=True)
class Contents:
    """What a run file holds at one moment.

    keys: every (metric, site) that an edit has a reading of, in order of the first. rows: of the edits, edit 0 first.
    dry: the rows of the edits that `Monitor.calibrate` made and rolled back, numbered from 1 by themselves. outcomes:
    by edit, of those that were looked after.
    """

    manifest: dict[str, Any]
    metrics: tuple[Metric, ...]
    keys: tuple[Key, ...]
    rows: tuple[EditRow, ...]
    dry: tuple[EditRow, ...]
    outcomes: Mapping[int, OutcomeKind]
    alarms: tuple[Alarm, ...]
    notes: tuple[Note, ...]
    operations: tuple[Operation, ...] = ()


def is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a run was closed, and nothing of it was lost on the way or can't be read any more."""
    return bool(manifest.get("closed")) and not manifest.get(LOST_ENTRY) and not manifest.get(DAMAGED_ENTRY)


def _read(db: sqlite3.Connection, known: int) -> Contents:
    file = Growing()
    file.open(db)
    new = file.read(db, known)
    return Contents(
        manifest=file.manifest,
        metrics=file.metrics,
        keys=keys_of(file.frames),
        rows=tuple(new.rows),
        dry=tuple(new.dry),
        outcomes=dict(new.outcomes),
        alarms=tuple(new.alarms),
        notes=(*new.notes, *file.lacks),
        operations=tuple(new.operations),
    )


def keys_of(frames: Iterable[Frame]) -> tuple[Key, ...]:
    """Every (metric, site) in order of its first reading."""
    return tuple(dict.fromkeys(key for frame in frames for key in frame.keys))


def in_order(keys: Iterable[Key], manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The sites among (metric, site) pairs, each once, in dataflow order where the manifest says it."""
    order = {site: place for place, site in enumerate(manifest.get("sites", []))}
    return tuple(sorted(dict.fromkeys(site for _, site in keys), key=lambda site: order.get(site, -1)))


class Run:
    """A run as it stood when it was loaded. Read-only. Made by `load`, and by a `following.Follower` that keeps rows.

    >>> run = stabilitylab.load("runs/mend")              # doctest: +SKIP
    >>> run.series("update.norm", "decoder.layers.1.fc2")  # doctest: +SKIP
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        """path: the run's folder."""
        self.path = path
        self.manifest: dict[str, Any] = contents.manifest
        self.metrics: Catalogue = Catalogue(contents.metrics)
        self.edits: tuple[Edit, ...] = tuple(Edit(row, contents.outcomes.get(row.edit)) for row in contents.rows)
        self._keys = contents.keys
        self.dry_edits: tuple[EditRow, ...] = contents.dry
        """The edits that `Monitor.calibrate` made and rolled back, numbered from 1 by themselves."""
        self.alarms: tuple[Alarm, ...] = contents.alarms
        self.notes: tuple[Note, ...] = contents.notes
        self.operations: tuple[Operation, ...] = contents.operations
        """The operations that tracing has named, see `stabilitylab.record.operations`."""

    @property
    def complete(self) -> bool:
        """Whether all of the run is here: it was closed, and nothing of it was lost on the way or is damaged."""
        return is_complete(self.manifest)

    @property
    def closed(self) -> bool:
        """Whether the monitor closed the run; False while it goes on, and after a crash."""
        return bool(self.manifest.get("closed", False))

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Every site that has a reading, in dataflow order where the run says it."""
        return in_order(self._keys, self.manifest)

    @cached_property
    def _sites_by_metric(self) -> dict[str, tuple[str, ...]]:
        read: dict[str, set[str]] = {}
        for metric, site in self._keys:
            read.setdefault(metric, set()).add(site)
        return {metric: tuple(site for site in self.sites if site in found) for metric, found in read.items()}

    def sites_of(self, metric: str) -> tuple[str, ...]:
        """The sites at which `metric` was read at least once."""
        return self._sites_by_metric.get(metric, ())

    def metric(self, name: str) -> Metric:
        """The description of a metric. Raises UsageError with the nearest names for an unknown one."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        names = [metric.name for metric in self.metrics]
        raise UsageError(f"no metric {name!r} in this run{did_you_mean(name, names)}")

    def _site(self, metric: str, site: str | None) -> str:
        self.metric(metric)
        choices = self.sites_of(metric)
        if site in choices:
            return str(site)
        inside = [name for name in choices if site is None or _in_front_of(site, name) <= WRAPPERS]
        if len(inside) == 1:
            return inside[0]
        if not choices:
            raise UsageError(f"metric {metric!r} was never read in this run; `run.notes` may say why")
        if site is None:
            raise UsageError(f"metric {metric!r} has {len(choices)} sites; expected one of {', '.join(choices[:6])}")
        raise UsageError(f"metric {metric!r} has no site {site!r}{did_you_mean(site, choices)}")

    def series(self, metric: str, site: str | None = None) -> Array:
        """The readings of a metric at one site, in the order of `edits`.

        Returns float64 of shape [edits], or [edits, length] for a metric that holds several values, such as a
        spectrum. NaN where the reading is NaN and where none was taken: `present` tells them apart. site may be left
        out when there is only one, and of its name what a wrapper of the model has put in front. Raises UsageError with
        the nearest valid name.
        """
        place = self._site(metric, site)
        read = [(alike, at) for alike in self._alike if (at := alike.frame.place((metric, place))) is not None]
        length = max((at.stop - at.start for _, at in read), default=1)
        declared, edits = self.metric(metric).length, len(self.edits)
        if edits * declared <= MOST_SHOWN:
            length = max(length, declared)
        if edits * length > MOST_SERIES:
            raise RunError(f"metric {metric!r} at {place!r} is {edits} edits of {length} values, which is too much")
        series = np.full((edits, length), np.nan)
        for alike, at in read:
            if at.stop - at.start == 1:
                series[alike.numbers, 0] = [flat[at.start] for flat in alike.flats]
            else:
                series[alike.numbers, : at.stop - at.start] = [flat[at] for flat in alike.flats]
        return series[:, 0] if declared == 1 else series

    def present(self, metric: str, site: str | None = None) -> NDArray[np.bool_]:
        """Whether the reading was taken, per edit: bool of shape [edits]."""
        place = self._site(metric, site)
        there = np.zeros(len(self.edits), dtype=bool)
        for alike in self._alike:
            if alike.frame.place((metric, place)) is not None:
                there[alike.numbers] = True
        return there

    @cached_property
    def _alike(self) -> tuple[Alike, ...]:
        return by_frame([edit.row.readings for edit in self.edits])

    @cached_property
    def edit_numbers(self) -> Array:
        """The edits' numbers as float64 of shape [edits], read-only; the x axis of every series."""
        numbers = np.array([edit.edit for edit in self.edits], dtype=np.float64)
        numbers.flags.writeable = False
        return numbers

    def _time_share(self, of: str) -> float | None:
        rows = [edit.row for edit in self.edits if edit.edit > 0]
        total = sum(row.seconds for row in rows)
        return sum(float(getattr(row, of)) for row in rows) / total if total > 0 else None

    @property
    def probe_time_share(self) -> float | None:
        """Share of the edits' wall time spent inside probes, the canary apart. None before the first edit."""
        return self._time_share("probe_seconds")

    @property
    def canary_time_share(self) -> float | None:
        """Share of the edits' wall time spent in the canary's forward passes. None before the first edit."""
        return self._time_share("canary_seconds")

    @property
    def trace_time_share(self) -> float | None:
        """Share of the edits' wall time spent in the tracer. None before the first edit."""
        return self._time_share("trace_seconds")

    @property
    def thresholds(self) -> Thresholds:
        """The limits that the run was watched with: those given to `attach`, else those of the package.

        Raises UsageError where the file holds some that are none.
        """
        return thresholds_of(self.manifest, self.path)

    def diagnosis(self, thresholds: Thresholds | None = None) -> Diagnosis:
        """What the analyzer says of this run: the same as it said online at the same edit.

        thresholds: other limits than those that the run was watched with.
        """
        return self._diagnosis if thresholds is None else self.analyzed(thresholds).diagnosis()

    @cached_property
    def _diagnosis(self) -> Diagnosis:
        return self.analyzed(self.thresholds).diagnosis()

    def analyzed(self, thresholds: Thresholds) -> Analyzer:
        """An analyzer that has seen all rows, in the order in which the monitor saw them: dry edits after edit 0."""
        analyzer = analyzer_of(self.metrics, self.manifest, thresholds)
        for _ in fed(analyzer, [edit.row for edit in self.edits], self.dry_edits, self.notes, self.operations):
            pass
        return analyzer

    def __len__(self) -> int:
        return sum(edit.edit > 0 for edit in self.edits)

    @property
    def plot(self) -> Plot:
        """Charts for a notebook: ``run.plot.lines("update.norm")`` and so on. Altair is imported when one is made."""
        return Plot(self)

    def to_frame(self, library: Library | None = None) -> Any:
        """All readings as a data frame in long format, one row per value, in the order of the run.

        Columns: ``edit``, ``label``, ``status`` (``start``, ``applied``, ``failed``), ``outcome`` (missing while none
        was observed), ``metric``, ``site``, ``element`` (0 for a scalar; the place within a spectrum) and ``value``
        (float64; NaN and infinities are readings). A reading that was not taken has no row. Dry edits are left out.

        library: ``"pandas"`` or ``"polars"``; by default the first of them that is installed. Raises UsageError when it
        is not, or when the name is another.
        """
        return frame(self, library)

    def __repr__(self) -> str:
        return f"<Run {str(self.path)!r}: {len(self)} edits, {len(self.sites)} sites, {self.diagnosis().verdict}>"

    def _repr_html_(self) -> str:
        return html(self)


def load(path: str | Path) -> Run:
    """Read a run folder (or its run file) as it stands now; it may still be written to.

    Raises RunError when there is none, when the file is no run, or when a newer stabilitylab wrote it.
    """
    file = find_file(Path(path))
    known = acknowledged(file)
    with connect(file) as db:
        try:
            return Run(file.parent, _read(db, known))
        except DAMAGE as error:
            raise damaged(file, error) from error
