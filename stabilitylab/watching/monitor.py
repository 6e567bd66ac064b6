"""What a user holds: `Monitor` and its edits. What they set in motion is in `rounds` and `recording`."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from torch import nn

from stabilitylab.acting.replay import Application
from stabilitylab.acting.scanning.scan import editor_figures
from stabilitylab.acting.schedule import Trace
from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.cautions import cautions
from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.analysis.thresholds import Thresholds
from stabilitylab.errors import EditError, UsageError
from stabilitylab.probes.base import Probe
from stabilitylab.record.note_kinds import EDITOR_STATE
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import OutcomeKind
from stabilitylab.reports.sinks import Sink
from stabilitylab.watching import dry_edits
from stabilitylab.watching.budget import Budget
from stabilitylab.watching.canary import Canary
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.instruments.references import Home
from stabilitylab.watching.interrupts import held_back
from stabilitylab.watching.one_hook import carries_hooks, logger, sweep
from stabilitylab.watching.reach import model_in
from stabilitylab.watching.recording import Record, Recorder
from stabilitylab.watching.redaction import Redaction
from stabilitylab.watching.rounds import Rounds
from stabilitylab.watching.sites import Site
from stabilitylab.watching.underway import Taken

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


class Monitor:
    """Watches one edit loop. Made by `attach`; a context manager that closes the run when it is left."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site] | None,
        record: Record,
        probes: Sequence[Probe[Any]],
        editor: object | None,
        canary: Canary | None,
        sinks: Sequence[Sink],
        thresholds: Thresholds | None = None,
        *,
        single_edits: bool = False,
        skipped: Mapping[str, str] | None = None,
        trace: Trace | None = None,
        replay: bool = False,
        budget: Budget | None = None,
        home: Home = "device",
        redaction: Redaction | None = None,
    ) -> None:
        self._closed = True  # until it is whole
        self._process = os.getpid()
        self.path: Path = record.path.parent
        self._editor = editor
        self._canary = canary
        self._home: Home = home
        self._probes = tuple(probes)
        metrics = tuple(metric for probe in probes for metric in probe.metrics)
        self._recorder = Recorder(record, Analyzer(metrics, thresholds, single_edits=single_edits), sinks, redaction)
        self._rounds = Rounds(
            model, sites, self._recorder, probes, editor, canary, skipped, trace, replay, budget, home
        )
        self._open: Edit | None = None
        self._calibrating = False
        self._calibrated = False
        self._warned: set[str] = set()
        self._closed = False

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the watched sites; empty until the first edit moves something when attached without sites."""
        return tuple(site.name for site in self._rounds.sites)

    @property
    def edits(self) -> int:
        """How many edits were recorded."""
        return self._recorder.edits

    def edit(self, label: object = "") -> Edit:
        """The next edit, as a context manager: ``with monitor.edit(label=prompt) as edit: …``.

        Raises EditError where the last one was lost, since this one would be too: it wrote to the placeholder of a
        weight that is offloaded, and moved none.
        """
        if self._closed:
            raise UsageError("the monitor is closed; expected edits before close(), attach again for a new run")
        if self._calibrating:
            raise UsageError(
                "dry edits are being made, and one of them opened an edit of the run; expected calibrate to get the "
                "bare editing function, without monitor.edit or monitor.wrap in it"
            )
        if self._rounds.replays.busy:
            raise UsageError(
                "an edit is being made once more, and opened an edit of the run; expected autopsy to get the bare "
                "editing function, without monitor.edit or monitor.wrap in it"
            )
        lost = self._rounds.is_lost()
        if lost is not None:
            raise EditError(
                f"edit {self.edits} wrote to the placeholder of '{lost}', which is offloaded, and was lost, as the next"
                " would be; expected a write to the layer's _hf_hook.weights_map, or the layer on a device; attach anew"
            )
        return Edit(self, self._label(lambda: label))

    def step(self, label: object = "") -> Edit:
        """The next edit begins here, and the one before ends: for a loop whose body can't be put into a ``with`` block.

        To be called at the top of each round; `close` ends the last edit. Whatever a round does besides is part of its
        edit. Raises UsageError inside a ``with monitor.edit()``.
        """
        if self._open is not None:
            if not self._open.by_step:
                raise UsageError("step was called inside an open edit; expected either `with monitor.edit()` or step")
            self._open.end(None)
        edit = self.edit(label)
        edit.by_step = True
        return edit.__enter__()

    def wrap(self, apply: Callable[P, R], *, label: Callable[P, object] | None = None) -> Callable[P, R]:
        """`apply` with each call recorded as one edit.

        What it returns passes through untouched; a model in it (itself, or the first of a tuple) is the model from then
        on. label: gives the edit's label from the arguments of the call.
        """

        @functools.wraps(apply)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            name = "" if label is None else self._label(label, *args, **kwargs)
            edit = self.edit(name)
            edit.application = Application(apply, args, kwargs)
            with edit:
                answer = apply(*args, **kwargs)
                model = model_in(answer)
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
        clock, model = time.perf_counter(), self._rounds.model
        record = dry_edits.DryRecord(self._recorder.path)
        # Each dry edit counts, so that the canary's cadence does not: it may leave too few for a baseline.
        canary = None if self._canary is None else replace(self._canary, every=1, budget=None)
        self._calibrating = True
        try:
            with Monitor(
                model, self._rounds.sites or None, record, self._probes, self._editor, canary, (), home=self._home
            ) as dry:
                dry_edits.make(dry, model, self._editor, apply, chosen)
                found = dry.sites
        finally:
            self._calibrating = False
            seconds = time.perf_counter() - clock
            self._rounds.pause(seconds)
        if not found:
            raise EditError(
                f"none of {len(chosen)} dry edits moved a parameter of the model, so that there is nothing to watch; "
                "expected an apply that edits the model that it is given, or attach(sites=...)"
            )
        self._calibrated = True
        for says in record.broken:
            self.note("probe-off", f"in the dry edits, {says}")
        self._recorder.dry(record.rows, seconds)

    def _may_calibrate(self) -> None:
        """Raises UsageError unless dry edits can be made now."""
        if self._closed:
            why = "the monitor is closed"
        elif self._open is not None or self._calibrating:
            why = "an edit is open"
        elif self._calibrated:
            why = f"dry edits were made already ({self.path})"
        elif self.edits:
            why = f"{self.edits} edit{'s were' if self.edits > 1 else ' was'} made already"
        else:
            return
        raise UsageError(f"{why}; expected calibrate once, before the first edit; attach again for a new run")

    def autopsy(self, apply: Callable[[Any, Any], object], request: Any) -> Operation | None:
        """Make an edit once more under the full tracer, and name the first operation whose result is not finite.

        Then in fp32 and fp64, where there is memory: whether it is finite there (`Operation.kind`: what the numbers'
        range is to blame for, or the algebra). With ``attach(..., replay=True)`` it is made from the state before the
        last edit, with the random numbers of that time; else from the present one, as long as that is finite.
        Everything is put back bit for bit, as by `calibrate`, and outer variables of `apply` too; what it prints or
        writes to files, it does again. What is found is recorded with the last edit, and notes of kind ``replay`` say
        what else there is to say.

        apply: the bare editing function; it may return a model, as in `wrap`; what it raises is not passed on. Returns
        the operation; None where none was found, or the edit could not be made once more. Raises UsageError where there
        is nothing to make it from.
        """
        if self._closed:
            raise UsageError("the monitor is closed; expected autopsy before close()")
        if self._open is not None or self._calibrating or self._rounds.replays.busy:
            raise UsageError("an edit is open; expected autopsy between edits, or after the last one")
        self._rounds.flush()
        clock = time.perf_counter()
        try:
            return self._rounds.replays.autopsy(self._rounds.model, lambda model: Application(apply, (model, request)))
        finally:
            self._rounds.pause(time.perf_counter() - clock)

    def diagnosis(self) -> Diagnosis:
        """What the analyzer says so far; the same that `stabilitylab.load(run).diagnosis()` says of the rows so far.

        Waits for an accelerator: the last edit is read first.
        """
        self._rounds.flush()
        return self._recorder.diagnosis()

    @property
    def last_edit_moved(self) -> bool:
        """Whether the last edit was seen to change a watched weight; never, where no copies of the weights are kept.

        Waits for an accelerator: the last edit is read first.
        """
        return self._rounds.last_edit_moved

    def observe_outcome(self, model: nn.Module | None = None) -> OutcomeKind | None:
        """See what became of the last edit by now and record it, once; None when there is nothing to observe.

        model: what the loop edits from now on, where it took off a wrapper that the edit had put around it.

        Called at the next edit's start and at close; call it earlier where a loop undoes an edit by itself. The weights
        as they are now are what the next edit starts from. Waits for an accelerator; the next edit's start does not,
        and leaves what it sees to be read with the last edit.
        """
        if model is not None and any(inner is model for inner in self._rounds.model.modules()):
            self._rounds.model = model
        return self._rounds.observe_outcome()

    def sites_are_guessed(self) -> None:
        """Tell that the sites are what a host says that it edits: what else moves is looked for, and watched then.

        To be called before the first edit. It takes a checksum of every other parameter now, and after the edits 1, 2,
        4, 8, …
        """
        self._rounds.look_elsewhere()

    def editor_grew(self) -> None:
        """Tell that the editor has built more of itself inside an edit, such as its hypernetwork in its first call.

        What enters that is seen from now on. Outside of an edit there is nothing to tell.
        """
        if self._open is not None:
            self._rounds.editor_grew(self._open.capture)

    def inspect_editor(self) -> tuple[Caution, ...]:
        """Look at what the editor holds now, as `stabilitylab.scan` does: what it divides by, how fast it writes.

        To be called before a hypernetwork is saved, or used: a unit without any spread is found here, and at its first
        value that is not zero otherwise. Each warning is recorded, once in a run; what needs mending is said on stderr
        too. Returns all that there are, the most urgent first; none without an editor.
        """
        found: tuple[Caution, ...] = ()
        if self._editor is not None:
            found = self._recorder.guard("the look at the editor", lambda: cautions(editor_figures(self._editor))) or ()
        for caution in found:
            says = f"{caution.says} {caution.advice}"
            if says not in self._warned:
                self._warned.add(says)
                self._recorder.note(EDITOR_STATE, says)
                if caution.urgency == "fatal":
                    logger.warning("stabilitylab: %s", says)
        return found

    def note(self, kind: str, says: str) -> None:
        """Record something that was not measured, or not as asked."""
        self._recorder.note(kind, says)

    def close(self) -> None:
        """Observe what became of the last edit, fold the log into the run file, let go of the model. Idempotent.

        An edit that is still open ends here, as failed.
        """
        if self._closed:
            return
        with held_back():
            if self._open is not None:
                self._open.end(None if self._open.by_step else "never ended: the monitor was closed inside it")
            self.observe_outcome()
            self._closed = True
            self._recorder.close()
            # A monitor that is kept for its diagnosis must not keep the model, the editor or the copies of the weights.
            self._rounds.release()
            self._editor = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if self._open is not None:
                self._open.end(_said(error))
            self._rounds.leave()  # who raises alone must not wait for the others
        self.close()

    def __del__(self) -> None:
        # A monitor that nobody holds any more must not leave hooks behind, nor an edit without an end.
        forgotten = not getattr(self, "_closed", True) and self._process == os.getpid() and not sys.is_finalizing()
        if forgotten:
            with contextlib.suppress(Exception):
                self._rounds.leave()
                self.close()

    @staticmethod
    def _label(label: Callable[..., object], *args: Any, **kwargs: Any) -> str:
        try:
            return str(label(*args, **kwargs))
        except Exception as error:
            logger.warning("stabilitylab: the label failed: %s: %s", type(error).__name__, error)
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
        self.application: Application | None = None
        """How it is made, where that is known."""
        self.by_step = False
        """Whether it ends where the next one begins."""
        self._monitor = monitor

    def returns(self, model: M) -> M:
        """Hand over the model that the editor gave back: the same object, a wrapper or a clone. Returns it."""
        if not isinstance(model, nn.Module):
            raise UsageError(f"edit.returns got a {type(model).__name__}; expected the torch.nn.Module after the edit")
        self._monitor._rounds.model = model
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
        self._entered = self._monitor._rounds.model
        try:
            with held_back():
                self.capture = self._monitor._rounds.begin(self.application)
                self._monitor._open = self
        except BaseException as error:  # a Ctrl-C that waited: no `__exit__` follows
            self.end(f"{_said(error)} (before it began)")
            raise
        self.application = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self._monitor._rounds.replays.interrupted()
        self.end(None if error is None else _said(error))

    def end(self, error: str | None) -> None:
        """It is over, with what was raised inside of it. Once: a monitor that is closed ends it too."""
        if self._monitor._open is not self:
            return
        self._monitor._open = None
        rounds = self._monitor._rounds
        # A copy of the model that is watched takes its hooks along.
        foreign = rounds.model is not self._entered and not carries_hooks(rounds.model)
        self.capture.__exit__(None, None, None)
        swept = {model: sweep(model) for model in {self._entered, rounds.model}}
        taken = Taken(self.label, self.started, self.clock, error)
        try:
            with held_back():
                self._monitor._recorder.guard(
                    "the record of an edit",
                    lambda: rounds.end(
                        taken, self.capture, self.reports, self._entered, swept[rounds.model], foreign=foreign
                    ),
                )
        finally:  # `edit` outlives its block: it must not hold what the edit was made of
            self.reports.clear()
            del self.capture, self._entered


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
