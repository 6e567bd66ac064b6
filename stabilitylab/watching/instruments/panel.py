"""From a model at one moment to measurements on the host: which tensors are reduced, when, and what is left out.

The middle between hooks and probes: one instrument for each kind of tensor. They know which reduction serves which
measurement, and no formula of either.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.probes.base import Probe
from stabilitylab.probes.output_pass import NormInput
from stabilitylab.probes.weight_pass import WeightPass, WeightScan
from stabilitylab.record.packed import PackedReadings
from stabilitylab.watching.canary import Canary
from stabilitylab.watching.compiled import inside_compiled
from stabilitylab.watching.editor_parts import find_scaler
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.guard import NoteTaker
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.instruments.attention import AttentionInstrument
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.editor import EditorInstrument
from stabilitylab.watching.instruments.exchange import Exchange
from stabilitylab.watching.instruments.feedback import FeedbackInstrument
from stabilitylab.watching.instruments.gradients import GradientInstrument
from stabilitylab.watching.instruments.inputs import InputsInstrument
from stabilitylab.watching.instruments.logits import CanaryInstrument, LogitsInstrument
from stabilitylab.watching.instruments.loss import LossInstrument
from stabilitylab.watching.instruments.outputs import OutputInstrument
from stabilitylab.watching.instruments.reading import Measured, Reader
from stabilitylab.watching.instruments.references import Home
from stabilitylab.watching.instruments.state import StateInstrument
from stabilitylab.watching.instruments.transfer import Shipment
from stabilitylab.watching.instruments.weights import WeightInstrument
from stabilitylab.watching.sites import Site, locate
from stabilitylab.watching.spread import is_spread
from stabilitylab.watching.walking import NamedModules, named_modules_of


@dataclass(frozen=True)
class Cargo:
    """What was measured of one edit, on its way to the host, and the probes that were due then."""

    edit: int
    due: tuple[Probe[Any], ...]
    shipments: tuple[Shipment, ...]

    @property
    def is_here(self) -> bool:
        """Whether reading it waits for nothing."""
        return all(shipment.is_here for shipment in self.shipments)


class Instruments:
    """Runs the measurements that a set of probes needs, and the probes on them. Whatever breaks is switched off."""

    def __init__(
        self,
        probes: Sequence[Probe[Any]],
        editor: object | None,
        canary: Canary | None,
        note: NoteTaker,
        home: Home = "device",
    ) -> None:
        """home: where the copies of the weights are kept."""
        self._bench = bench = Bench(probes, note)
        self.probe_time, self.canary_time = bench.probe_time, bench.canary_time
        self.canary = CanaryInstrument(bench, canary)
        self._exchange = exchange = Exchange(bench)
        self._weights = WeightInstrument(bench, exchange, home)
        self._gradients = GradientInstrument(bench, exchange, find_scaler(editor))
        self._outputs = OutputInstrument(bench)
        self._logits = LogitsInstrument(bench, canary)
        self._loss = LossInstrument(bench)
        self._editor = EditorInstrument(bench, editor)
        self._inputs = InputsInstrument(bench)
        self._attention = AttentionInstrument(bench)
        self._feedback = FeedbackInstrument(bench)
        self._state = StateInstrument(bench)
        self.references = self._weights.references
        self.keeps_references = self._weights.keeps_references
        self._reader = Reader(bench)
        self._opened: tuple[Cargo, Measured] | None = None
        """What has arrived and is not read yet: it is asked for several times."""

    def adopt(self, site: Site, weight: Tensor) -> None:
        """Watch a weight from now on, which is as it was before any edit."""
        self._step("weights", lambda: self._weights.adopt(site, weight))
        self._step("gradients", lambda: self._gradients.adopt(site, weight))

    @property
    def is_spread(self) -> bool:
        """Whether any watched weight is spread over processes."""
        return self._weights.is_spread

    @property
    def lost(self) -> str | None:
        """The first site where the last edit wrote to the placeholder of a weight that is offloaded."""
        return self._weights.lost

    @property
    def together(self) -> bool:
        """Whether all processes that weights are spread over came to where this one was last."""
        return self._exchange.settled

    def leave(self) -> None:
        """This process ends its part: no other waits for it."""
        self._exchange.leaves()

    # -- inside the edit: what hooks call, see `hooks.Watcher` ----------------------------------------------------

    def begin(self, edit: int, in_full: bool = True) -> None:
        """From now on measure what the probes that are due at this edit need. in_full: those that are dear, too."""
        self._bench.begin(edit, in_full)
        self._step("inputs", self._inputs.begin)
        self._step("gradients", self._gradients.begin)
        self._step("outputs", self._outputs.begin)
        self._step("logits", self._logits.begin)
        self._step("losses", self._loss.begin)

    def _step(self, instrument: str, step: Callable[[], object]) -> None:
        """What an instrument does between two passes of the model. One that breaks is off, and takes no other along."""
        self._bench.safely(f"what looks at {instrument}", step, as_the_loop=True)

    def capture(self, model: nn.Module, named: NamedModules, sites: Sequence[Site]) -> Capture:
        """The hooks of one edit on the sites as they are in `model` now; all of them or, on an error, none. named: the
        model's modules.
        """
        self._weights.begin(model, sites)
        with contextlib.ExitStack() as stack:
            capture = stack.enter_context(Capture(self, inside_compiled(named)))
            any_gradient = False
            for site in sites:
                found = locate(model, site)
                if found is None or self._weights.is_gone(site, found[1]):
                    continue
                layer, weight = found
                if self._weights.has_placeholder(site):
                    look = functools.partial(self._weights.look_at_placeholder, site, layer)
                    capture.before_calls(layer, look)
                factors = site.is_layer and self._gradients.needs_factors(site)
                needed = self._gradients.needs(site)
                if needed:
                    self._gradients.watch(site, layer)
                    any_gradient = True
                if site.is_layer and (factors or self._outputs.wants(site.name)):
                    capture.watch_layer(site.name, layer, factors)
                if needed and (not factors or is_spread(weight)):  # the layer may hold a gathered copy in its place
                    capture.watch_leaf(site.name, weight)
            if any_gradient:
                capture.watch_optimizers()
            capture.watch_model(model)
            if self._bench.needed(NormInput):
                capture.watch_norms(named)
            self._step("the editor", lambda: self._editor.watch(capture, model, named))
            self._step("attention", lambda: self._attention.enter(capture.stack, model))
            stack.pop_all()  # every hook is in place: they stay until the edit ends
        return capture

    def editor_grew(self, capture: Capture) -> None:
        """The editor has built more of itself inside the edit."""
        with self.probe_time:
            self._step("the editor", lambda: self._editor.grew(capture))

    def no_capture(self) -> Capture:
        """A capture without hooks."""
        return Capture(self)

    def layer_output(self, site: str, fired: int, output: Tensor) -> None:
        """See `hooks.Watcher`, as all of these."""
        with self.probe_time:
            self._outputs.on_output(site, fired, output)

    def layer_pass(self, site: str, fired: int, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
        """A backward has answered a forward."""
        with self.probe_time:
            self._gradients.on_pass(site, fired, x, delta, product)

    def overwritten(self, site: str) -> None:
        """A pass whose gradient can't be told."""
        self._gradients.overwritten(site)

    def adopts(self, site: str, weight: Tensor) -> bool:
        """Whether to tell of a weight's `.grad`."""
        return self._gradients.adopts(site, weight)

    def accumulated(self, site: str, weight: Tensor) -> None:
        """A backward has added to one."""
        self._gradients.accumulated(site, weight)

    def backward_ended(self) -> None:
        """And is over."""
        with self.probe_time:
            self._gradients.backward_ended()

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        with self.probe_time:
            self._gradients.optimizer_steps(optimizer)

    @property
    def awaits_norm(self) -> bool:
        """Whether a layer's first output is to be followed to the normalisation after it."""
        return self._outputs.awaits_norm

    def norm_input(self, entering: Tensor) -> None:
        """A normalisation is about to run."""
        with self.probe_time:
            self._outputs.on_norm_input(entering)

    def model_called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is about to run."""
        with self.probe_time:
            self._inputs.model_called(args, kwargs)
        self._attention.model_called(kwargs)

    def model_output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """The model has run."""
        with self.probe_time:
            self._logits.on_output(kwargs, output)
            self._loss.on_output(output)

    def loss_answered(self, weight: Tensor) -> None:
        """A backward has come to the model's own loss."""
        with self.probe_time:
            self._loss.answered(weight)

    # -- after the edit -------------------------------------------------------------------------------------------

    def before_any_edit(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Measure the state that the first edit starts from."""
        named = named_modules_of(model)
        inside_compiled(named)  # what takes long of it is done only once
        self._step("the editor", lambda: self._editor.after(named, None, {}, sites))
        self._step("weights", lambda: self._weights.after(model, sites))
        self._step("other processes", lambda: self._exchange.settle("edit 0"))
        self._step("weights", self._weights.settled)
        self._step("the whole state", lambda: self._state.before_any_edit(model, sites))

    def after(
        self,
        model: nn.Module,
        named: NamedModules,
        sites: Sequence[Site],
        capture: Capture,
        reports: Mapping[str, EditorReport],
        *,
        failed: bool = False,
    ) -> None:
        """Measure what an edit left, all but the canary. W₋ is the weight before the edit until the end of this.

        named: the model's modules. failed: whether it raised, so that other processes may not come to its end.
        """
        self._step("inputs", self._inputs.after)
        self._step("outputs", lambda: self._outputs.after(sites))
        self._step("logits", self._logits.after)
        self._step("losses", self._loss.after)
        self._step("feedback", lambda: self._feedback.after(model, sites, capture.model_call, self.references))
        self._step("gradients", lambda: self._gradients.after(model, sites, self.references))
        self._step("the editor", lambda: self._editor.after(named, capture, reports, sites))
        self._step("updates", lambda: self._weights.compare(model, sites, self._editor.updates))
        self._step("weights", lambda: self._weights.after(model, sites))
        if failed:
            self._exchange.stays_away()
        else:
            self._step("other processes", lambda: self._exchange.settle(f"the end of edit {self._bench.edit}"))
        self._step("weights", self._weights.settled)
        self._step("the whole state", lambda: self._state.after(model, named, sites))

    def look_everywhere_next(self) -> None:
        """Something is wrong: after the next edit look at every entry of the model."""
        self._step("the whole state", self._state.look_in_full_next)

    def look_at_weights(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Measure the weights between two edits; what they are now is what the next edit starts from. Of what is spread
        more is known when the next edit ends, or by `settle_looks`.
        """
        self._weights.look(model, sites)

    def settle_looks(self) -> None:
        """Combine now what was looked at of weights that are spread: all processes must."""
        self._exchange.settle(f"the look after edit {self._bench.edit}", at_the_end=True)

    def changed(self, model: nn.Module, sites: Sequence[Site]) -> list[Site]:
        """The sites whose weight differs from what the last edit left. Synchronises an accelerator."""
        return self._weights.changed(model, sites)

    # -- on the host ----------------------------------------------------------------------------------------------

    def send(self, more_of: Cargo | None = None) -> Cargo:
        """Start the copy to the host of everything measured since the last one."""
        shipment = self._bench.safely("copy to the host", self._bench.stack.send)
        added = () if shipment is None else (shipment,)
        if more_of is not None:
            return replace(more_of, shipments=(*more_of.shipments, *added))
        return Cargo(self._bench.edit, self._bench.due, added)

    def send_looks(self, more_of: Cargo) -> Cargo:
        """The same of the looks at what is spread, which the exchange has combined by now."""
        shipment = self._bench.safely("copy to the host", self._weights.looks.send)
        return more_of if shipment is None else replace(more_of, shipments=(*more_of.shipments, shipment))

    def scans(self, cargo: Cargo) -> dict[str, WeightScan]:
        """What it says of each weight, by site, without running any probe; waits for it."""
        return {site: seen for site, seen in self._arrived(cargo) if isinstance(seen, WeightScan)}

    def passes(self, cargo: Cargo) -> dict[str, WeightPass]:
        """The same of those that have references."""
        return {site: seen for site, seen in self.scans(cargo).items() if isinstance(seen, WeightPass)}

    def read(self, cargo: Cargo, *, from_original: bool = False) -> PackedReadings:
        """Every probe that was due on every measurement; waits for it. from_original: the edit began at W₀, not W₋."""
        measured = self._arrived(cargo)
        if from_original:
            began = ((site, seen, isinstance(seen, WeightPass)) for site, seen in measured)
            measured = [(site, replace(seen, update=seen.drift) if whole else seen) for site, seen, whole in began]
        self._opened = None
        return self._reader.read(measured, cargo.due, cargo.edit)

    def put_away(self) -> None:
        """What has arrived was read: hold on to none of it."""
        self._opened = None

    def _arrived(self, cargo: Cargo) -> Measured:
        if self._opened is None or self._opened[0] is not cargo:
            self._opened = cargo, [one for shipment in cargo.shipments for one in self._reader.arrived(shipment)]
        return self._opened[1]
