"""Watch each edit of a loop and write one row for it. Knows no formula and decides nothing."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar

from torch import Tensor, nn

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.findings import Diagnosis, severity
from stabilitylab.analysis.pace import Pace
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.errors import EditError, UsageError
from stabilitylab.probes.base import Probe
from stabilitylab.probes.weight_pass import WeightPass, same_bits
from stabilitylab.record.readings import Alarm, EditRow, Note, OutcomeKind, Status
from stabilitylab.reports.sinks import Sink
from stabilitylab.watching import canary as canaries
from stabilitylab.watching import dry_edits, manifest
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.hooks import Capture, ModelCall, logger, sweep
from stabilitylab.watching.instruments.panel import Cargo, Instruments
from stabilitylab.watching.sites import Site, all_sites, locate, locate_readable

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class _Unread:
    """An edit whose measurements are on their way to the host. between: those of the weights after it, likewise.

    clock: when it began. times: how long it took, and the parts of that which probes and canary took, in seconds; None
    where reading it still belongs to it.
    """

    edit: int
    label: str
    status: Status
    started: float
    clock: float
    error: str | None
    cargo: Cargo
    between: Cargo | None = None
    times: tuple[float, float, float] | None = None


def _is_lost(now: WeightPass, before: WeightPass | None) -> bool:
    """Whether a weight was not finite before and isn't now, so that no distance tells whether it changed."""
    return before is not None and before.nonfinite == now.nonfinite > 0


class Record(Protocol):
    """Where a monitor writes to: a `stabilitylab.record.store.RunWriter`, whose methods these are."""

    path: Path

    def append(self, row: EditRow) -> None:
        """One edit's row."""

    def append_dry(self, rows: Sequence[EditRow]) -> int:
        """The rows of all dry edits at once; returns how many."""

    def note(self, note: Note) -> None:
        """What was not measured, or not as asked."""

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Entries of the manifest."""

    def outcome(self, edit: int, outcome: OutcomeKind) -> None:
        """What became of an edit."""

    def alarm(self, alarm: Alarm) -> None:
        """A verdict as it is raised."""

    def close(self) -> None:
        """Nothing more comes."""


class Monitor:
    """Watches one edit loop. Made by `attach`; a context manager that closes the run when it is left."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site] | None,
        writer: Record,
        probes: Sequence[Probe[Any]],
        editor: object | None,
        canary: canaries.Canary | None,
        sinks: Sequence[Sink],
        thresholds: Thresholds | None = None,
        *,
        single_edits: bool = False,
    ) -> None:
        self.path: Path = writer.path.parent
        self._model = model
        self._writer = writer
        self._probes = tuple(probes)
        self._editor = editor
        self._canary = canary
        self._sinks = list(sinks)
        self._schedule = None if canary is None else canaries.Schedule(canary)
        self._pace = Pace()
        self._unread: _Unread | None = None
        self._attached = time.perf_counter()
        self._instruments = Instruments(probes, editor, canary, self.note)
        metrics = tuple(metric for probe in probes for metric in probe.metrics)
        self._analyzer = Analyzer(metrics, thresholds, single_edits=single_edits)
        self._edits = 0
        self._reading: int | None = None
        self._open: Edit | None = None
        self._calibrating = False
        self._calibrated = False
        self._closed = False
        self._outcome_due: int | None = None
        self._last_moved = False
        self._failed: set[str] = set()
        self._raised = 0
        self._sites: tuple[Site, ...] = ()
        self._candidates: dict[str, tuple[Site, Tensor]] | None = None
        if sites is None:
            self._remember_everything()
        else:
            self._watch(sites, {})
        if not self._instruments.keeps_references:
            self.note("no-references", "no copies of the weights are kept: no update, drift or outcome is measured")
        if canary is None:
            self.note("logits-lag", "no canary: the logits are those of each edit's own input before it took effect")
        self._first_row()

    # -- what a user calls ----------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the watched sites; empty until the first edit moves something when attached without sites."""
        return tuple(site.name for site in self._sites)

    @property
    def edits(self) -> int:
        """How many edits were recorded."""
        return self._edits

    def edit(self, label: object = "") -> Edit:
        """The next edit, as a context manager: ``with monitor.edit(label=prompt) as edit: …``."""
        if self._closed:
            raise UsageError("the monitor is closed; expected edits before close(), attach again for a new run")
        if self._calibrating:
            raise UsageError(
                "dry edits are being made, and one of them opened an edit of the run; expected calibrate to get the "
                "bare editing function, without monitor.edit or monitor.wrap in it"
            )
        return Edit(self, str(label))

    def wrap(self, apply: Callable[P, R], *, label: Callable[P, object] | None = None) -> Callable[P, R]:
        """`apply` with each call recorded as one edit.

        What it returns passes through untouched; a model in it (itself, or the first of a tuple) is the model from then
        on. label: gives the edit's label from the arguments of the call.
        """

        @functools.wraps(apply)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            name = "" if label is None else self._label(label, *args, **kwargs)
            with self.edit(name) as edit:
                answer = apply(*args, **kwargs)
                model = dry_edits.model_in(answer)
                if model is not None:
                    edit.returns(model)
            return answer

        return watched

    def calibrate(self, apply: Callable[[Any, Any], object], requests: Iterable[Any], n: int = 20) -> None:
        """Make n dry edits before the first edit, each rolled back, so that there is a baseline from the start.

        A dry edit is ``apply(model, request)``, for the first n (8 or more) of `requests`, each from the same state and
        measured like any edit. After each, everything is put back and compared bit by bit: parameters, buffers, the
        module tree, attributes, modes, gradients, and the state of the editor (what was given to `attach`, and the
        object whose method `apply` is); random numbers after the last one. State in closures, module globals and files
        is not seen. It takes n edits of time, and while it lasts the memory of a second model, editor and monitor.
        Attached without sites, dry edits are watched where the first of them moves something, and the run where its
        own first edit does.

        apply: the bare editing function; it may return a model, as in `wrap`. requests: a list, or anything that can
        be gone through again: an iterator would lack its first n in the loop.

        What `apply` raises passes through when everything is put back, and nothing is written then. Raises UsageError
        where it comes too late, twice, or with too few requests, and for tensors that can't be copied (sparse,
        quantised); EditError when something could not be put back, or when no site is known after all of them.
        """
        self._may_calibrate()
        chosen = dry_edits.first_of(requests, n)
        clock = time.perf_counter()
        record = dry_edits.DryRecord(self._writer.path)
        # Each dry edit counts, so that the canary's cadence does not: it may leave too few for a baseline.
        canary = None if self._canary is None else replace(self._canary, every=1, budget=None)
        self._calibrating = True
        try:
            with Monitor(self._model, self._sites or None, record, self._probes, self._editor, canary, ()) as dry:
                dry_edits.make(dry, self._model, self._editor, apply, chosen)
                found = dry.sites
        finally:
            self._calibrating = False
            seconds = time.perf_counter() - clock
            self._attached += seconds  # the canary has no share in it
        if not found:
            raise EditError(
                f"none of {len(chosen)} dry edits moved a parameter of the model, so that there is nothing to watch; "
                "expected an apply that edits the model that it is given, or attach(sites=...)"
            )
        self._calibrated = True
        for says in record.broken:
            self.note("probe-off", f"in the dry edits, {says}")
        if self._guard("the run file", lambda: self._writer.append_dry(record.rows)):
            for row in record.rows:
                self._guard("the analyzer", functools.partial(self._analyzer.observe_dry, row))
            self.note("calibrated", f"{len(record.rows)} dry edits in {seconds:.1f} s, each rolled back bit for bit")

    def _may_calibrate(self) -> None:
        """Raises UsageError unless dry edits can be made now."""
        if self._closed:
            why = "the monitor is closed"
        elif self._open is not None or self._calibrating:
            why = "an edit is open"
        elif self._calibrated:
            why = f"dry edits were made already ({self.path})"
        elif self._edits:
            why = f"{self._edits} edit{'s were' if self._edits > 1 else ' was'} made already"
        else:
            return
        raise UsageError(f"{why}; expected calibrate once, before the first edit; attach again for a new run")

    def diagnosis(self) -> Diagnosis:
        """What the analyzer says so far; the same that `stabilitylab.load(run).diagnosis()` says of the rows so far.

        Waits for an accelerator: the last edit is read first.
        """
        self._flush()
        return self._analyzer.diagnosis()

    @property
    def last_edit_moved(self) -> bool:
        """Whether the last edit was seen to change a watched weight; never, where no copies of the weights are kept.

        Waits for an accelerator: the last edit is read first.
        """
        self._flush()
        return self._last_moved

    def observe_outcome(self) -> OutcomeKind | None:
        """See what became of the last edit by now and record it, once; None when there is nothing to observe.

        Called at the next edit's start and at close; call it earlier where a loop undoes an edit by itself. The weights
        as they are now are what the next edit starts from. Waits for an accelerator; the next edit's start does not,
        and leaves what it sees to be read with the last edit.
        """
        self._flush()
        edit, self._outcome_due = self._outcome_due, None
        if edit is None or not self._sites or not self._instruments.keeps_references:
            return None
        outcome: OutcomeKind | None = self._guard("observing the outcome", lambda: self._record_outcome(edit))
        return outcome

    def note(self, kind: str, says: str) -> None:
        """Record something that was not measured, or not as asked."""
        edit = self._edits if self._reading is None else self._reading
        with suppress(Exception):
            self._writer.note(Note(edit, kind, says))

    def close(self) -> None:
        """Observe what became of the last edit, fold the log into the run file, let go of the model. Idempotent."""
        if self._closed:
            return
        self.observe_outcome()
        self._closed = True
        for sink in self._sinks:
            self._guard(f"{type(sink).__name__}.close", sink.close)
        self._guard("the run file", lambda: self._writer.set_manifest({"closed": True}))
        self._guard("the run file", self._writer.close)
        self._candidates = None
        # A monitor that is kept for its diagnosis must not keep the model, the editor or the copies of the weights.
        self._model, self._instruments = nn.Module(), Instruments((), None, None, self.note)
        self._editor = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- which sites ----------------------------------------------------------------------------------------------

    def _watch(self, sites: Sequence[Site], originals: Mapping[str, Tensor]) -> None:
        """Begin to watch the sites that can be measured, and note why the others can't."""
        for site in sites:
            found = locate(self._model, site)
            if found is not None and self._instruments.keeps_references:
                self._instruments.references.adopt(site, originals.get(site.name, found[1]).to(found[1].device))
        self._sites = tuple(sites)
        self._writer.set_manifest(manifest.of_sites(self._sites))

    def _remember_everything(self) -> int:
        """Keep a host copy of every parameter until an edit shows which ones it moves; returns how many are new."""
        known = self._candidates or {}
        located = (locate(self._model, site) for site, _ in known.values())
        held = {id(found[1]) for found in located if found is not None}  # under other names, in an adapter
        fresh: dict[str, tuple[Site, Tensor]] = {}
        for site in all_sites(self._model).values():
            found = locate_readable(self._model, site)
            if found is not None and id(found[1]) not in held:
                fresh[site.name] = (site, found[1].detach().to("cpu", copy=True))
        self._candidates = known | fresh
        return len(fresh)

    def _discover(self) -> None:
        """Watch what the first edit moved; keep looking when it moved nothing. Waits for an accelerator."""
        if self._candidates is None:
            return
        moved: dict[str, Tensor] = {}
        sites = []
        for site, original in self._candidates.values():
            found = locate_readable(self._model, site)
            # In the live dtype: the user may have cast the model since.
            if found is not None and not same_bits(found[1].detach().cpu(), original.to(found[1].dtype)):
                moved[site.name] = original
                sites.append(site)
        if not moved:
            fresh = self._remember_everything()
            news = f" and brought {fresh} new, which are looked at from now on" if fresh else ""
            self.note("sites-discovered", f"edit {self._edits} moved no parameter of the model{news}")
            return
        self._candidates = None
        self._watch(sites, moved)
        names = ", ".join(moved)
        self.note("sites-discovered", f"edit {self._edits} moved {names}; hooks are on them from the next edit on")

    # -- one edit -------------------------------------------------------------------------------------------------

    def _guard(self, what: str, action: Callable[[], T]) -> T | None:
        """Do something of ours that must not stop the user's loop; None when it failed. Each failure is said once."""
        try:
            return action()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                says = f"{what} failed: {type(error).__name__}: {error}"
                logger.warning("stabilitylab: %s (the edit loop goes on)", says)
                self.note("probe-off", says)
            return None

    def _first_row(self) -> None:
        """Edit 0: the state before any edit."""
        started, clock = time.time(), time.perf_counter()
        with self._instruments.probe_time:
            self._instruments.before_any_edit(self._model, self._sites)
        self._forward_canary(None)
        with self._instruments.probe_time:
            cargo = self._instruments.send()
        self._read(_Unread(0, "", "start", started, clock, None, cargo))

    def _begin(self) -> Capture:
        with self._instruments.probe_time:
            if self._unread is None:
                self.observe_outcome()
            else:
                self._guard("observing the outcome", self._observe_later)
            self._instruments.begin(self._edits + 1)
            capture = self._guard("hooks", lambda: self._instruments.capture(self._model, self._sites))
            return capture or self._instruments.no_capture()

    def _end(self, edit: Edit, error: BaseException | None) -> None:
        self._edits += 1
        instruments, capture = self._instruments, edit.capture
        self._flush()
        with instruments.probe_time:
            self._guard("finding the moved parameters", self._discover)
            instruments.after(self._model, self._sites, capture, edit.reports)
            cargo = instruments.send()
        if error is None and self._guard("the canary's schedule", lambda: self._canary_is_due(cargo)):
            self._forward_canary(capture.model_call)
            with instruments.probe_time:
                cargo = instruments.send(more_of=cargo)
        says = None if error is None else f"{type(error).__name__}: {error}"
        status: Status = "applied" if error is None else "failed"
        unread = _Unread(self._edits, edit.label, status, edit.started, edit.clock, says, cargo)
        capture.clear()
        self._outcome_due = self._edits if error is None else None
        if error is None and not cargo.is_here:
            # Read one edit later, so that nothing waits for the accelerator.
            self._unread = replace(unread, times=self._times(unread.clock))
        else:
            self._read(unread)

    def _times(self, clock: float) -> tuple[float, float, float]:
        """Seconds since `clock`, and those of them that probes and canary took; both counts start anew."""
        instruments = self._instruments
        return time.perf_counter() - clock, instruments.probe_time.take(), instruments.canary_time.take()

    def _forward_canary(self, last_call: ModelCall | None) -> None:
        before = self._instruments.canary_time.seconds
        self._instruments.canary.forward(self._model, last_call)
        if self._schedule is not None:
            self._schedule.paid(self._instruments.canary_time.seconds - before)

    def _canary_is_due(self, cargo: Cargo) -> bool:
        """Whether to forward the canary after this edit, by what the weights do as far as it is known by now: where
        nothing has to be waited for, up to this edit, else up to the one before.
        """
        if self._schedule is None or not self._instruments.canary.wanted:
            return False
        if not self._schedule.always and cargo.is_here:
            self._watch_pace(cargo)
        elapsed = time.perf_counter() - self._attached
        return self._schedule.is_due(self._edits, elapsed, self._pace.now.moving, self._pace.now.leaping)

    def _watch_pace(self, cargo: Cargo) -> None:
        scans = self._instruments.scans(cargo)
        updates = {site: seen.update for site, seen in scans.items() if isinstance(seen, WeightPass)}
        lost = {site: math.nan for site, seen in scans.items() if seen.nonfinite}
        self._pace.observe(updates | lost)

    def _flush(self) -> None:
        """Read what is still on its way: before anything is said of the last edit, and after an exception."""
        unread, self._unread = self._unread, None
        if unread is not None:
            self._read(unread)

    def _read(self, unread: _Unread) -> None:
        """Wait for an edit's measurements, write its row, tell the analyzer and the sinks. Notes are of that edit."""
        self._reading = unread.edit
        self._guard("the record of an edit", lambda: self._record(unread))
        self._reading = None

    def _record(self, unread: _Unread) -> None:
        instruments = self._instruments
        with instruments.probe_time:
            readings = instruments.read(unread.cargo)
            passes = instruments.passes(unread.cargo)
            for site, seen in passes.items():
                instruments.references.edited(site, seen)
            self._last_moved = any(seen.update != 0 for seen in passes.values())
            if self._schedule is not None and not self._schedule.always and unread.times is not None:
                self._watch_pace(unread.cargo)
        times = unread.times or self._times(unread.clock)
        row = EditRow(unread.edit, unread.label, unread.status, unread.started, *times, unread.error, readings)
        self._guard("the run file", lambda: self._writer.append(row))
        self._guard("the analyzer", lambda: self._analyze(row))
        between = unread.between
        if between is not None:
            self._guard("observing the outcome", lambda: self._judge(unread.edit, between, passes))

    def _analyze(self, row: EditRow) -> None:
        self._analyzer.observe(row)
        diagnosis = self._analyzer.diagnosis()
        if severity(diagnosis.verdict) > self._raised:
            self._raised = severity(diagnosis.verdict)
            worst = max(diagnosis.findings, key=lambda finding: severity(finding.verdict))
            alarm = Alarm(row.edit, diagnosis.verdict, worst.metric, worst.site, worst.says)
            self._guard("the run file", lambda: self._writer.alarm(alarm))
        for sink in self._sinks:
            self._guard(type(sink).__name__, functools.partial(sink.on_row, row, diagnosis))

    def _observe_later(self) -> None:
        """The same as `observe_outcome`, read with the last edit's row: its measurements are still on their way."""
        due, self._outcome_due = self._outcome_due, None
        if self._unread is not None and due is not None and self._sites and self._instruments.keeps_references:
            self._instruments.look_at_weights(self._model, self._sites)
            self._unread = replace(self._unread, between=self._instruments.send())

    def _record_outcome(self, edit: int) -> OutcomeKind:
        changed = self._instruments.changed(self._model, self._sites)
        self._instruments.look_at_weights(self._model, changed)
        return self._judge(edit, self._instruments.send(), {})

    def _judge(self, edit: int, cargo: Cargo, left: Mapping[str, WeightPass]) -> OutcomeKind:
        """What became of an edit, from a look at weights after it. left: what it left, where they need not differ."""
        looks = self._instruments.passes(cargo).items()
        changed = {site: seen for site, seen in looks if seen.update != 0 and not _is_lost(seen, left.get(site))}
        outcome: OutcomeKind = "committed"
        if changed:
            seen = {self._instruments.references.changed_between(site, scan) for site, scan in changed.items()}
            if len(seen) == 1 and (only := seen.pop()) is not None:
                outcome = only
            else:
                self.note("restore", f"after edit {edit} the weights changed to a state that was not seen before")
        self._writer.outcome(edit, outcome)
        return outcome

    @staticmethod
    def _label(label: Callable[..., object], *args: Any, **kwargs: Any) -> str:
        try:
            return str(label(*args, **kwargs))
        except Exception as error:
            logger.warning("stabilitylab: the label function failed: %s", error)
            return ""


class Edit:
    """One edit of the loop; made by `Monitor.edit`."""

    def __init__(self, monitor: Monitor, label: str) -> None:
        self.label = label
        self.capture: Capture
        self.reports: dict[str, EditorReport] = {}
        self._entered: nn.Module
        self.started = 0.0
        self.clock = 0.0
        self._monitor = monitor

    def returns(self, model: M) -> M:
        """Hand over the model that the editor gave back: the same object, a wrapper or a clone. Returns it."""
        if not isinstance(model, nn.Module):
            raise UsageError(f"edit.returns got a {type(model).__name__}; expected the torch.nn.Module after the edit")
        self._monitor._model = model
        return model

    def report(self, site: str, report: EditorReport) -> None:
        """Tell what only the editor knows of this edit at a layer. Fields of later reports of one layer win.

        Raises UsageError for anything but an `EditorReport`.
        """
        if not isinstance(report, EditorReport):
            raise UsageError(f"edit.report got a {type(report).__name__}; expected a stabilitylab.EditorReport")
        known = self.reports.get(site)
        self.reports[site] = report if known is None else known.with_later(report)

    def __enter__(self) -> Edit:
        if self._monitor._open is not None:
            raise UsageError("an edit is open already; expected one `with monitor.edit()` at a time")
        self.started, self.clock = time.time(), time.perf_counter()
        self._entered = self._monitor._model
        self.capture = self._monitor._begin()
        self._monitor._open = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.capture.__exit__(kind, error, traceback)
        for model in {self._entered, self._monitor._model}:
            sweep(model)
        self._monitor._open = None
        self._monitor._guard("the record of an edit", lambda: self._monitor._end(self, error))
        # `edit` outlives its block: it must not hold what the edit was made of.
        self.reports.clear()
        del self.capture, self._entered
