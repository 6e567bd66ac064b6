"""Attach to an edit loop, watch each edit, write one row for it. Knows no formula and decides nothing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from stabilitylab import canary as canaries
from stabilitylab import manifest
from stabilitylab.analysis import Analyzer, Diagnosis, severity
from stabilitylab.errors import SiteError, UsageError
from stabilitylab.hooks import Capture, logger, sweep
from stabilitylab.measure import Instruments
from stabilitylab.probes import probes_of
from stabilitylab.probes.base import TIERS, Probe, Tier
from stabilitylab.probes.weight_pass import WeightPass, same_bits
from stabilitylab.readings import Alarm, Array, EditRow, Key, Note, OutcomeKind, Status
from stabilitylab.reports.sinks import Sink
from stabilitylab.sites import Patterns, Site, all_sites, find_sites, locate, why_unmeasurable
from stabilitylab.store import RunWriter

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def attach(
    model: nn.Module,
    sites: Patterns | None = None,
    run: str | Path | None = None,
    *,
    editor: object | None = None,
    canary: canaries.Canary | None = None,
    probes: Tier | Sequence[Probe[Any]] = "default",
    tensorboard: bool = False,
    sinks: Sequence[Sink] = (),
    config: Mapping[str, Any] | None = None,
) -> Monitor:
    """Watch an edit loop over `model`.

    sites: patterns of layer or parameter names (``*`` crosses dots), or None to watch what the first edit is seen to
    move. run: the run's new folder; by default one under ``runs/`` named by the time. editor: the editor, if its own
    state is to be read (MEND: its normaliser). canary: what to forward after each edit, see `stabilitylab.canary`.
    probes: a tier by its cost, ``"light"`` (keeps no copies of the weights), ``"default"`` or ``"deep"``, or instances
    with settings of their own, such as ``Drift(every=5)``. tensorboard: also write TensorBoard events into the run's
    folder. sinks: further receivers of each row. config: plain JSON values for the manifest.

    Nothing about the model changes: weights, logits, gradients, RNG state and modes are bit-identical with and without
    the monitor. Raises SiteError for a pattern that matches nothing, RunError for a run folder that exists, UsageError
    for other unusable arguments; nothing is written then.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    canaries.check(canary)
    chosen = _chosen(probes)
    found, skipped = (None, {}) if sites is None else _measurable(model, find_sites(model, sites))
    folder = Path(run) if run is not None else Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    options = {"patterns": [sites] if isinstance(sites, str) else None if sites is None else list(sites)}
    about = manifest.collect(model, found or (), editor, canaries.describe(canary), dict(config or {}))
    metrics = tuple(metric for probe in chosen for metric in probe.metrics)
    writer = RunWriter(folder, about | options, metrics)
    receivers = list(sinks)
    if tensorboard:
        from stabilitylab.reports.tensorboard import TensorBoardSink

        receivers.append(TensorBoardSink(folder, metrics))
    monitor = Monitor(model, found, writer, chosen, editor, canary, receivers)
    for name, reason in skipped.items():
        monitor.note("skipped-site", f"{name}: {reason}")
    return monitor


def _chosen(probes: str | Sequence[Probe[Any]]) -> tuple[Probe[Any], ...]:
    """The probes that a tier's name or a list means. Raises UsageError for anything else."""
    for tier in TIERS:
        if probes == tier:
            return probes_of(tier)
    if isinstance(probes, str):
        raise UsageError(f"probes={probes!r} is unknown; expected {', '.join(map(repr, TIERS))} or a list of probes")
    for probe in probes:
        if not isinstance(probe, Probe):
            raise UsageError(f"probes holds {probe!r}; expected instances of Probe, such as Drift(every=5)")
    names = [metric.name for probe in probes for metric in probe.metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two probes emit {twice!r}; expected each metric once")
    return tuple(probes)


def _measurable(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """The sites whose values can be read, and the reason for each of the others. Raises SiteError when none can."""
    kept, skipped = [], {}
    for site in sites:
        found = locate(model, site)
        reason = "not found" if found is None else why_unmeasurable(site, found[1])
        if reason is None:
            kept.append(site)
        else:
            skipped[site.name] = reason
    if not kept:
        name, reason = next(iter(skipped.items()))
        raise SiteError(f"none of the {len(sites)} matching sites can be measured; '{name}': {reason}")
    return kept, skipped


class Monitor:
    """Watches one edit loop. Made by `attach`; a context manager that closes the run when it is left."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site] | None,
        writer: RunWriter,
        probes: Sequence[Probe[Any]],
        editor: object | None,
        canary: canaries.Canary | None,
        sinks: Sequence[Sink],
    ) -> None:
        self.path: Path = writer.path.parent
        self._model = model
        self._writer = writer
        self._canary = canary
        self._sinks = list(sinks)
        self._instruments = Instruments(probes, editor, self.note)
        self._analyzer = Analyzer(tuple(metric for probe in probes for metric in probe.metrics))
        self._edits = 0
        self._open: Edit | None = None
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
                for candidate in (answer, answer[0] if isinstance(answer, tuple) and answer else None):
                    if isinstance(candidate, nn.Module):
                        edit.returns(candidate)
                        break
            return answer

        return watched

    def diagnosis(self) -> Diagnosis:
        """What the analyzer says so far; the same that `stabilitylab.load(run).diagnosis()` says of the rows so far."""
        return self._analyzer.diagnosis()

    @property
    def last_edit_moved(self) -> bool:
        """Whether the last edit was seen to change a watched weight; never, where no copies of the weights are kept."""
        return self._last_moved

    def observe_outcome(self) -> OutcomeKind | None:
        """See what became of the last edit by now and record it, once; None when there is nothing to observe.

        Called at the next edit's start and at close; call it earlier where a loop undoes an edit by itself. The weights
        as they are now are what the next edit starts from.
        """
        edit, self._outcome_due = self._outcome_due, None
        if edit is None or not self._sites or not self._instruments.keeps_references:
            return None
        outcome: OutcomeKind | None = self._guard("observing the outcome", lambda: self._record_outcome(edit))
        return outcome

    def note(self, kind: str, says: str) -> None:
        """Record something that was not measured, or not as asked."""
        with suppress(Exception):
            self._writer.note(Note(self._edits, kind, says))

    def close(self) -> None:
        """Observe what became of the last edit, fold the log into the run file, let go of everything. Idempotent."""
        if self._closed:
            return
        self.observe_outcome()
        self._closed = True
        for sink in self._sinks:
            self._guard(f"{type(sink).__name__}.close", sink.close)
        self._guard("the run file", lambda: self._writer.set_manifest({"closed": True}))
        self._guard("the run file", self._writer.close)
        self._candidates = None

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

    def _remember_everything(self) -> None:
        """Keep a host copy of every parameter until an edit shows which ones it moves."""
        self._candidates = {
            site.name: (site, found[1].detach().to("cpu", copy=True))
            for site in all_sites(self._model).values()
            if (found := locate(self._model, site)) is not None and why_unmeasurable(site, found[1]) is None
        }

    def _discover(self) -> None:
        """Watch what the first edit moved; keep looking when it moved nothing."""
        if self._candidates is None:
            return
        moved: dict[str, Tensor] = {}
        sites = []
        for site, original in self._candidates.values():
            found = locate(self._model, site)
            if found is not None and not same_bits(found[1].detach().cpu().contiguous(), original):
                moved[site.name] = original
                sites.append(site)
        if not moved:
            self.note("sites-discovered", f"edit {self._edits} moved no parameter of the model")
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
            self._instruments.editor_state(None)
            self._instruments.weights(self._model, self._sites)
            self._instruments.weight_spectra(self._model, self._sites)
        self._instruments.canary(self._model, self._canary, None)
        self._finish("", "start", started, clock, None)

    def _begin(self) -> Capture:
        with self._instruments.probe_time:
            self.observe_outcome()
            self._instruments.begin(self._edits + 1)
            capture = self._guard("hooks", lambda: self._instruments.capture(self._model, self._sites))
            return capture or self._instruments.no_capture()

    def _end(self, edit: Edit, error: BaseException | None) -> None:
        self._edits += 1
        instruments, capture = self._instruments, edit.capture
        with instruments.probe_time:
            self._guard("finding the moved parameters", self._discover)
            instruments.editor_state(capture)
            instruments.gradients(capture)
            instruments.weights(self._model, self._sites)
            instruments.weight_spectra(self._model, self._sites)
        if error is None:
            instruments.canary(self._model, self._canary, capture.model_call)
        says = None if error is None else f"{type(error).__name__}: {error}"
        self._finish(edit.label, "applied" if error is None else "failed", edit.started, edit.clock, says)
        capture.clear()
        self._outcome_due = self._edits if error is None else None

    def _finish(self, label: str, status: Status, started: float, clock: float, error: str | None) -> None:
        """Read everything, write the row, tell the analyzer and the sinks."""
        readings: dict[Key, Array] = {}
        passes: dict[str, WeightPass] = {}
        with self._instruments.probe_time:
            readings, passes = self._instruments.read()
            for site, seen in passes.items():
                self._instruments.references.edited(site, seen)
            self._last_moved = any(seen.update != 0 for seen in passes.values())
        seconds = time.perf_counter() - clock
        spent, canary = self._instruments.probe_time.take(), self._instruments.canary_time.take()
        row = EditRow(self._edits, label, status, started, seconds, spent, canary, error, readings)
        self._guard("the run file", lambda: self._writer.append(row))
        self._guard("the analyzer", lambda: self._analyze(row))

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

    def _record_outcome(self, edit: int) -> OutcomeKind:
        references = self._instruments.references
        changed = []
        for site in self._sites:
            found = locate(self._model, site)
            if found is not None and references.moved(site.name, found[1]):
                changed.append(site)
        outcome: OutcomeKind = "committed"
        if changed:
            self._instruments.weights(self._model, changed)
            passes = self._instruments.read_weights()
            seen = {references.changed_between(site, weight) for site, weight in passes.items()}
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
