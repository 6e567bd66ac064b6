"""One round an edit: what is measured before, inside and after it, and when that is read and recorded.

On a CPU a row is written as its edit ends. On an accelerator it is read one edit later, so that nothing is waited for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from stabilitylab.acting.replay import Application
from stabilitylab.acting.schedule import Trace
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing
from stabilitylab.errors import UsageError
from stabilitylab.probes.base import Probe
from stabilitylab.probes.weight_pass import WeightPass, WeightScan
from stabilitylab.record.note_kinds import MOVED_OUTSIDE
from stabilitylab.record.packed import Frame, PackedReadings, PerFrame
from stabilitylab.record.readings import EditRow, OutcomeKind, Status
from stabilitylab.watching import interrupts
from stabilitylab.watching.budget import Budget
from stabilitylab.watching.canary import Canary
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.instruments.panel import Cargo, Instruments
from stabilitylab.watching.instruments.references import Home
from stabilitylab.watching.model_call import ModelCall
from stabilitylab.watching.one_hook import logger
from stabilitylab.watching.outcomes import Adapters, Passes, is_independent, outcome_of
from stabilitylab.watching.pacing import Pacing
from stabilitylab.watching.recording import Recorder
from stabilitylab.watching.replaying import Replays
from stabilitylab.watching.silence import Silence, Unanswered
from stabilitylab.watching.sites import Site
from stabilitylab.watching.underway import Looked, Taken, Times, Unread
from stabilitylab.watching.walking import NamedModules, named_modules_of
from stabilitylab.watching.watched import Watched

_CHANGED: Final = {
    "restore": "after edit {edit} the weights changed: not back to what they were before it, or before any edit",
    MOVED_OUTSIDE: "edit {edit} moved no weight, and the weights moved after it had ended: put what applies it, such as"
    " the optimizer's step, inside of it, or call monitor.step() at the top of each round",
}
"""Notes of weights that move between two edits."""


def _counts(frame: Frame) -> NDArray[np.intp]:
    """Where a row has its counts of values that are not finite."""
    named = zip(frame.keys, frame.starts.tolist(), strict=True)
    return np.array([start for (metric, _), start in named if metric.endswith(".nonfinite")], dtype=np.intp)


_COUNTS: Final = PerFrame(_counts)


class Rounds:
    """Watches a model through the edits of a loop. Knows no formula and decides nothing."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site] | None,
        recorder: Recorder,
        probes: Sequence[Probe[Any]],
        editor: object | None,
        canary: Canary | None,
        skipped: Mapping[str, str] | None = None,
        trace: Trace | None = None,
        replay: bool = False,
        budget: Budget | None = None,
        home: Home = "device",
    ) -> None:
        """sites: None for what the first edit moves. skipped: sites that can't be measured, each with the reason.
        budget: None to measure everything at each edit. home: where the copies of the weights are kept.
        """
        self.model = model
        self._recorder = recorder
        self._guard = recorder.guard
        self._instruments = Instruments(probes, editor, canary, recorder.note, home)
        self._silence = Silence(canary is not None)
        self._unanswered = Unanswered()
        self._said: set[str] = set()
        self._pacing = Pacing(canary, budget)
        self._in_full = True
        self._writing = 0.0
        self._tracing = Tracing(trace, recorder.note)
        self._tracer: Tracer | None = None
        self._adapters = Adapters(named_modules_of(model))
        self._unread: Unread | None = None
        self._outcome_due: int | None = None
        self._looked: Looked | None = None
        self._passes: Passes = {}
        self._last_moved = False
        self._watched = Watched(model, sites, self._instruments, recorder)
        for name, reason in (skipped or {}).items():
            self._note("skipped-site", f"{name}: {reason}")
        if not self._instruments.keeps_references:
            self._note("no-references", "no copies of the weights are kept: no update, drift or outcome is measured")
        if canary is None:
            self._note("logits-lag", "no canary: the logits are those of each edit's own input before it took effect")
        self.replays = Replays(model, editor, recorder, keeps=replay)
        self._first_row()

    def _note(self, kind: str, says: str) -> None:
        self._recorder.note(kind, says)

    # -- the round ------------------------------------------------------------------------------------------------

    def _first_row(self) -> None:
        """Edit 0: the state before any edit."""
        taken = Taken("", time.time(), time.perf_counter())
        with self._instruments.probe_time:
            self._instruments.before_any_edit(self.model, self.sites)
        tracers: tuple[Tracer, ...] = ()
        if self._instruments.together:
            tracers = self._guard("the canary", lambda: self._forward_canary(0, None)) or ()
        if self._instruments.canary.failure:
            raise UsageError(f"the canary can't be run: {self._instruments.canary.failure}")
        with self._instruments.probe_time:
            cargo = self._instruments.send()
        self._read(Unread(0, taken, "start", cargo, tracers=tracers))

    def begin(self, application: Application | None = None) -> Capture:
        """An edit begins: see what became of the last one, and put hooks on the model. application: see `Replays`."""
        with self._instruments.probe_time:
            named = named_modules_of(self.model)
            if self._instruments.is_spread:
                self._guard("observing the outcome", lambda: self._look_for_the_exchange(named))
            elif self._unread is None:
                self.observe_outcome(named)
            else:
                self._guard("observing the outcome", lambda: self._observe_later(named))
            self._guard("keeping what an edit may touch", lambda: self.replays.before(self.model, application))
            self._guard("which probes are due", self._choose_probes)
            capture = self._guard("hooks", lambda: self._instruments.capture(self.model, named, self.sites))
            capture = capture or self._instruments.no_capture()
        self._guard("the tracer", lambda: self._trace(capture))
        return capture

    def _choose_probes(self) -> None:
        edit = self._recorder.edits + 1
        self._in_full = self._pacing.wants_in_full(edit)
        self._instruments.begin(edit, self._in_full)

    def editor_grew(self, capture: Capture) -> None:
        """The editor has built more of itself inside the edit."""
        self._instruments.editor_grew(capture)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Those that are watched by now."""
        return self._watched.sites

    def look_elsewhere(self) -> None:
        """The sites are a guess: what edits move besides is looked for, and watched from then on."""
        self._watched.look_elsewhere(self.model)

    def _trace(self, capture: Capture) -> None:
        """Enter the tracer, if it is on: last, so that it is left first, and sees nothing of what we do around."""
        self._tracer = self._tracing.begin(self._recorder.edits + 1, self.model)
        if self._tracer is not None:
            capture.watch_output(self._tracer.gave)
            capture.stack.enter_context(self._tracing.entered(self._tracer))

    def end(
        self,
        taken: Taken,
        capture: Capture,
        reports: Mapping[str, EditorReport],
        entered: nn.Module,
        named: NamedModules,
        *,
        foreign: bool = False,
    ) -> None:
        """An edit has ended, and its hooks are gone: measure what it left, and record it as soon as nothing waits.

        entered: the model that it began with. named: the modules of the one that it left. foreign: whether that was not
        made from the first.
        """
        self._recorder.edits += 1
        tracers: tuple[Tracer, ...] = ()
        if self._tracer is not None:
            tracers, self._tracer = (self._tracer,), None
            self._tracing.left(tracers[0], list(dict.fromkeys((self.model, entered))))
        edit, instruments, applied = self._recorder.edits, self._instruments, taken.error is None
        self.flush()
        self._say_broken(capture)
        with instruments.probe_time:
            self._adapters.edited(named)
            self._guard("finding the moved parameters", lambda: self._watched.discover(self.model))
            instruments.after(self.model, named, self.sites, capture, reports, failed=not applied)
            cargo = instruments.send()
            last = self._looks_settled()
        due = applied and self._guard("the canary's schedule", lambda: self._canary_is_due(cargo))
        if due and not interrupts.is_asked_for():
            with interrupts.stoppable():
                tracers += self._guard("the canary", lambda: self._forward_canary(edit, capture.model_call)) or ()
            with instruments.probe_time:
                cargo = instruments.send(more_of=cargo)
        status: Status = "applied" if applied else "failed"
        unread = Unread(
            edit,
            taken,
            status,
            cargo,
            last,
            in_full=self._in_full,
            tracers=tracers,
            compiled=capture.compiled,
            asked=bool(capture.asked),
            heard=capture.heard,
            heard_itself=capture.heard_itself,
            unanswered={site: site in capture.batched for site in capture.asked - capture.answered},
            foreign=applied and foreign,
        )
        capture.clear()
        self._outcome_due = edit if applied and instruments.together else None
        if applied and not cargo.is_here and not self.replays.keeps:
            # Read one edit later, so that nothing waits for the accelerator.
            self._unread = replace(unread, times=self._times(taken.clock))
        else:
            self._read(unread)

    def _say_broken(self, capture: Capture) -> None:
        """Of hooks that failed, each way of it once a run."""
        for says in dict.fromkeys(capture.broken):
            if says not in self._said:
                self._said.add(says)
                logger.warning("stabilitylab: a hook failed, and is off in such edits: %s", says)
                self._note(
                    "hook-off", f"a hook failed in edit {self._recorder.edits}, and is off in such edits: {says}"
                )

    def _times(self, clock: float) -> Times:
        """Seconds since `clock`, and those of them that probes, canary and tracer took; their counts start anew.

        To write the row before belongs to both.
        """
        instruments, writing = self._instruments, self._writing
        self._writing = 0.0
        return Times(
            time.perf_counter() - clock + writing,
            instruments.probe_time.take() + writing,
            instruments.canary_time.take(),
            self._tracing.take_seconds(),
        )

    def flush(self) -> None:
        """Read what is still on its way: before anything is said of the last edit, and after an exception."""
        unread, self._unread = self._unread, None
        if unread is not None:
            self._read(unread)

    def _read(self, unread: Unread) -> None:
        """Wait for an edit's measurements and record them. Notes are of that edit."""
        with self._recorder.about(unread.edit):
            self._guard("the record of an edit", lambda: self._record(unread))
        self._instruments.put_away()

    def _record(self, unread: Unread) -> None:
        instruments, taken, last = self._instruments, unread.taken, unread.last
        if last is not None:
            self._guard(
                "observing the outcome", lambda: self._judge(last.edit, last.cargo, self._passes, last.adapters)
            )
        with instruments.probe_time:
            scans = instruments.scans(unread.cargo)
            passes = self._passes = {site: seen for site, seen in scans.items() if isinstance(seen, WeightPass)}
            independent = unread.foreign and unread.edit > 1 and is_independent(passes)
            readings = instruments.read(unread.cargo, from_original=independent)
            self._guard("what an edit's readings lead to", lambda: self._learn(unread, scans, passes, readings))
        found = [self._guard("the tracer", functools.partial(self._tracing.read, each)) for each in unread.tracers]
        named = [operation for operation in found if operation is not None]
        for operation in named:
            self._recorder.operation(operation)
        times = unread.times or self._times(taken.clock)
        row = EditRow(
            edit=unread.edit,
            label=taken.label,
            status=unread.status,
            started=taken.started,
            seconds=times.whole,
            probe_seconds=times.probes,
            canary_seconds=times.canary,
            trace_seconds=times.tracer,
            error=taken.error,
            readings=readings,
        )
        if (unread.edit == 0 or self.replays.keeps) and not interrupts.is_asked_for():
            with interrupts.stoppable():
                self.pause(self._guard("the replay", lambda: self.replays.after(row, self.model, named)) or 0.0)
        clock = time.perf_counter()
        self._recorder.row(row)
        self._writing += time.perf_counter() - clock
        self._guard("the schedules", lambda: self._pacing.heard(row, times, unread, self._tracing, self._recorder))
        between = unread.between
        if independent:
            self._outcome_due = self._looked = None
            self._recorder.outcome(unread.edit, "independent")
        elif between is not None:
            self._guard("observing the outcome", lambda: self._judge(unread.edit, between, passes, unread.adapters))

    def _learn(self, unread: Unread, scans: Mapping[str, WeightScan], passes: Passes, readings: PackedReadings) -> None:
        """Where to look at the next edit, and what is to be said of this one besides its readings."""
        instruments = self._instruments
        if (readings.flat[_COUNTS.of(readings.frame)] > 0).any():
            instruments.look_everywhere_next()
        for site, seen in passes.items():
            instruments.references.edited(site, seen)
        self._last_moved = any(seen.update != 0 for seen in passes.values())
        self._pacing.weights_are(unread.edit, scans)
        if (unread.asked or unread.compiled) and unread.status == "applied":
            note = self._silence.after(unread.compiled, unread.heard, unread.heard_itself, self._last_moved)
            moved = {site for site, seen in passes.items() if seen.update != 0}
            unseen = self._unanswered.after(unread.unanswered, moved) if unread.heard else None
            for kind, says in filter(None, (note, unseen)):
                self._note(kind, says)

    # -- the canary -----------------------------------------------------------------------------------------------

    def _forward_canary(self, edit: int, last_call: ModelCall | None) -> tuple[Tracer, ...]:
        """Returns the tracers that were on."""
        canary, before = self._instruments.canary, self._instruments.canary_time.seconds
        tracer = self._tracing.around_canary(edit, self.model) if canary.wanted else None
        logits = canary.forward(self.model, last_call, None if tracer is None else self._tracing.entered(tracer))
        self._pacing.paid_for_canary(self._instruments.canary_time.seconds - before)
        # Where a forward needs other processes, none can decide by itself to make one more.
        alone = not self._instruments.is_spread
        if tracer is None and alone and logits is not None and not logits.is_cuda and not bool(logits.isfinite().all()):
            tracer = self._tracing.second_look(edit, self.model)
            if tracer is not None:
                logits = canary.forward_again(self.model, last_call, self._tracing.entered(tracer))
        if tracer is None:
            return ()
        tracer.gave(logits)
        self._tracing.left(tracer, [self.model])
        return (tracer,)

    def _canary_is_due(self, cargo: Cargo) -> bool:
        """Whether to forward the canary after this edit, by what the weights do as far as it is known by now: where
        nothing has to be waited for, up to this edit, else up to the one before.
        """
        if not self._instruments.canary.wanted or not self._instruments.together:
            return False  # a forward that needs other processes, which may not be there
        if self._pacing.decides_on_weights and cargo.is_here:
            self._pacing.weights_are(self._recorder.edits, self._instruments.scans(cargo))
        return self._pacing.canary_is_due(self._recorder.edits)

    def pause(self, seconds: float) -> None:
        """So much of the time was no part of the loop: a canary that has a share of it has none in that."""
        self._pacing.pause(seconds)

    # -- what became of an edit -----------------------------------------------------------------------------------

    @property
    def last_edit_moved(self) -> bool:
        """Whether the last edit was seen to change a watched weight."""
        self.flush()
        return self._last_moved

    def is_lost(self) -> str | None:
        """Where the last edit was lost altogether: what it wrote to was a placeholder, and no watched weight moved.
        None where it was not.
        """
        site = self._instruments.lost
        return site if site is not None and self._instruments.keeps_references and not self.last_edit_moved else None

    def observe_outcome(self, named: NamedModules | None = None) -> OutcomeKind | None:
        """Look now at what became of the last edit, once; None when nothing is due or no weight is watched. named: the
        model's modules, where they are known.
        """
        self.flush()
        due, self._outcome_due = self._outcome_due, None
        if due is None or not self._instruments.keeps_references:
            return None
        edit = due
        return self._guard(
            "observing the outcome",
            lambda: self._observe(edit, named_modules_of(self.model) if named is None else named),
        )

    def _observe_later(self, named: NamedModules) -> None:
        """The same as `observe_outcome`, read with the last edit's row: its measurements are still on their way."""
        due, self._outcome_due = self._outcome_due, None
        if self._unread is not None and due is not None and self._instruments.keeps_references:
            self._watched.adopt_late(self.model)
            self._instruments.look_at_weights(self.model, self.sites)
            adapters = self._adapters.outcome(named)
            self._unread = replace(self._unread, between=self._instruments.send(), adapters=adapters)

    def _look_for_the_exchange(self, named: NamedModules) -> None:
        """The same where weights are spread: what the processes know of it goes over when the edit that begins ends."""
        due, self._outcome_due = self._outcome_due, None
        if due is not None and self._instruments.keeps_references:
            self._looked = self._look(due, named, self.sites if self._unread is not None else None)

    def _look(self, edit: int, named: NamedModules, sites: Sequence[Site] | None) -> Looked:
        """sites: None for those that changed, which waits for an accelerator."""
        self._watched.adopt_late(self.model)
        sites = self._instruments.changed(self.model, self.sites) if sites is None else sites
        self._instruments.look_at_weights(self.model, sites)
        return Looked(edit, self._instruments.send(), self._adapters.outcome(named))

    def _looks_settled(self) -> Looked | None:
        """The look at the last edit, now that the processes have met; None where they have not, or there is none."""
        looked, self._looked = self._looked, None
        if looked is None or not self._instruments.together:
            return None
        return replace(looked, cargo=self._instruments.send_looks(looked.cargo))

    def _observe(self, edit: int, named: NamedModules) -> OutcomeKind | None:
        self._looked = self._look(edit, named, None)
        left: Passes = {}
        if self._instruments.is_spread:
            left = self._passes
            self._instruments.settle_looks()
        looked = self._looks_settled()
        return None if looked is None else self._judge(edit, looked.cargo, left, looked.adapters)

    def _judge(self, edit: int, looks: Cargo, left: Passes, adapters: OutcomeKind | None) -> OutcomeKind | None:
        if not self.sites and adapters is None:
            return None
        outcome = outcome_of(self._instruments.passes(looks), left, self._instruments.references)
        if outcome == "committed" and adapters is not None:
            outcome = adapters
        if outcome is None:
            kind = "restore" if self._last_moved else MOVED_OUTSIDE
            if kind not in self._said:
                self._said.add(kind)
                self._note(kind, _CHANGED[kind].format(edit=edit))
        self._recorder.outcome(edit, outcome or "committed")
        return outcome or "committed"

    def leave(self) -> None:
        """Wait for no other process any more, of those that weights are spread over."""
        self._instruments.leave()

    def release(self) -> None:
        """Let go of the model, the editor and the copies of the weights."""
        self.leave()
        self.replays.release()
        self.model, self._instruments = nn.Module(), Instruments((), None, None, self._recorder.note)
        self._watched.release(self._instruments)
