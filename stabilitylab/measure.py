"""From a model at one moment to measurements on the host: which tensors are reduced, when, and what is left out.

The middle between hooks and probes. It knows which reduction serves which measurement, and no formula of either.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from stabilitylab import canary as canaries
from stabilitylab.hooks import Capture, ModelCall, logger
from stabilitylab.probes.base import Probe
from stabilitylab.probes.feedback import WINDOW, History
from stabilitylab.probes.gradient_factors import GradientSpectrum, reduce_factors
from stabilitylab.probes.logits_pass import CanaryPass, LogitsPass, last_token_logits, reduce_canary, reduce_logits
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass, reduce_normaliser
from stabilitylab.probes.output_pass import OutputPass, reduce_output
from stabilitylab.probes.weight_pass import WeightPass, WeightScan, scan_weight
from stabilitylab.probes.weight_spectrum import WeightSpectrum, spectrum_of_weight
from stabilitylab.readings import EDITOR_SITE, MODEL_SITE, Array, Key
from stabilitylab.references import References
from stabilitylab.sites import Site, find_learning_rates, find_normalisers, locate
from stabilitylab.transfer import Stack

_MATRIX = 2  # dimensions

NoteTaker = Callable[[str, str], None]
"""(kind, what was not measured and why)."""


class Stopwatch:
    """Adds up the time spent inside `with` blocks; a block inside another one counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._since = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._since = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """The seconds so far; the count starts anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Instruments:
    """Runs the measurements that a set of probes needs, and the probes on them. Whatever breaks is switched off.

    A failure of ours must never be the user's: it is noted once, logged, and that measurement is skipped from then on.
    """

    def __init__(self, probes: Sequence[Probe[Any]], editor: object | None, note: NoteTaker) -> None:
        self.references = References()
        self.probe_time = Stopwatch()
        self.canary_time = Stopwatch()
        self._probes = tuple(probes)
        self._due = self._probes
        self.keeps_references = any(probe.needs is WeightPass for probe in probes)
        self._editor = editor
        self._note = note
        self._off: set[str] = set()
        self._missing: set[str] = set()
        self._stack = Stack()
        self._original_logits: Tensor | None = None
        self._history: dict[Key, deque[tuple[float, float]]] = {}
        self._edit = 0

    def begin(self, edit: int) -> None:
        """From now on measure what the probes that are due at this edit need."""
        self._edit = edit
        self._due = tuple(probe for probe in self._probes if probe.is_due(edit))

    def _needed(self, need: type[Any], site: str | None = None) -> bool:
        """Whether a probe that is due needs this measurement, here or at all."""
        return any(probe.needs is need and (site is None or probe.is_for(site)) for probe in self._due)

    def _safely(self, what: str, action: Callable[[], Any]) -> Any:
        """`action()`, or None when it raised; `what` is then off for the rest of the run."""
        if what in self._off:
            return None
        try:
            return action()
        except Exception as error:
            self._off.add(what)
            says = f"{what} switched off: {type(error).__name__}: {error}"
            logger.warning("stabilitylab: %s (the edit loop goes on)", says)
            self._note("probe-off", says)
            return None

    # -- inside the edit ------------------------------------------------------------------------------------------

    def capture(self, model: nn.Module, sites: Sequence[Site]) -> Capture:
        """The hooks of one edit on the sites as they are in `model` now; all of them or, on an error, none."""
        with contextlib.ExitStack() as stack:
            capture = stack.enter_context(self.no_capture())
            for site in sites:
                found = locate(model, site) if site.is_layer else None
                factors = self._needed(GradientSpectrum, site.name) and site.orientation != "none"
                if found is not None and (factors or self._needed(OutputPass, site.name)):
                    capture.watch_layer(site.name, found[0], factors)
            capture.watch_model(model)
            if self._editor is not None and self._needed(NormaliserPass):
                for name, module in find_normalisers(self._editor).items():
                    capture.watch_editor(name, module)
            stack.pop_all()  # every hook is in place: they stay until the edit ends
        return capture

    def no_capture(self) -> Capture:
        """A capture without hooks."""
        return Capture(self._on_output, self._on_model_output)

    def _on_output(self, site: str, output: Tensor) -> None:
        if not self._needed(OutputPass, site):
            return

        def reduce() -> None:
            rebuild = functools.partial(OutputPass.from_host, dtype=output.dtype)
            self._stack.add(site, reduce_output(output), rebuild)

        with self.probe_time:
            self._safely(f"output of {site}", reduce)

    def _on_model_output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        if not self._needed(LogitsPass):
            return

        def reduce() -> None:
            logits = canaries.logits_of(output)
            if logits is not None:
                packed = reduce_logits(logits, canaries.mask_of(kwargs, output))
                self._stack.add(MODEL_SITE, packed, LogitsPass.from_host)

        with self.probe_time:
            self._safely("logits", reduce)

    # -- after the edit -------------------------------------------------------------------------------------------

    def gradients(self, capture: Capture) -> None:
        """Reduce the factors that the hooks caught."""
        if not self._needed(GradientSpectrum):
            return
        for site, buffer in capture.layers.items():
            forward = buffer.complete
            if forward is None or forward.delta is None:
                continue
            if forward.overwritten:
                self._note("capture", f"gradient of {site} left out: its input was overwritten before the edit ended")
                continue
            self._safely(f"gradient of {site}", functools.partial(self._factors, site, forward.x, forward.delta))

    def _factors(self, site: str, x: Tensor, delta: Tensor) -> None:
        packed, shapes = reduce_factors(x, delta)
        self._stack.add(site, packed, functools.partial(GradientSpectrum.from_host, shapes=shapes))

    def editor_state(self, capture: Capture | None) -> None:
        """Reduce the editor's normalisers and what entered them."""
        if self._editor is None:
            return
        self._safely("editor state", lambda: self._editor_state(capture))

    def _editor_state(self, capture: Capture | None) -> None:
        if self._needed(NormaliserPass):
            for name, module in find_normalisers(self._editor).items():
                calls = capture.editors[name].calls if capture is not None and name in capture.editors else []
                for place, kind in enumerate(("u", "v")):
                    inputs = [call[place] for call in calls if len(call) > place]
                    mean, std = getattr(module, f"{kind}_mean"), getattr(module, f"{kind}_std")
                    site = ".".join(part for part in (EDITOR_SITE, name, kind) if part)
                    self._stack.add(site, reduce_normaliser(mean, std, inputs), NormaliserPass.from_host)
        rates = find_learning_rates(self._editor) if self._needed(LearningRates) else None
        if rates is not None:
            self._stack.add(EDITOR_SITE, rates.double(), LearningRates)

    def weights(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """One look at each watched weight; at every edit where references are kept, since they must follow it."""
        if not (self.keeps_references or self._needed(WeightScan)):
            return
        for site in sites:
            found = locate(model, site)
            if found is not None:
                self._safely(f"weight pass of {site.name}", functools.partial(self._weight, site, found[1]))
            elif site.name not in self._missing:
                self._missing.add(site.name)
                self._note("skipped-site", f"{site.name}: no longer found in {type(model).__name__}")

    def _weight(self, site: Site, weight: Tensor) -> None:
        if self.keeps_references:
            packed = self.references.measure(site.name, weight)
            self._stack.add(site.name, packed, functools.partial(WeightPass.from_host, dtype=weight.dtype))
        elif self._needed(WeightScan, site.name):
            rebuild = functools.partial(WeightScan.from_scan, dtype=weight.dtype)
            self._stack.add(site.name, scan_weight(weight), rebuild)

    def weight_spectra(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """All singular values of each watched matrix, where a probe that is due needs them."""
        for site in sites:
            found = locate(model, site) if self._needed(WeightSpectrum, site.name) else None
            if found is not None and found[1].dim() == _MATRIX:
                self._safely(f"spectrum of {site.name}", functools.partial(self._spectrum, site, found[1]))

    def _spectrum(self, site: Site, weight: Tensor) -> None:
        self._stack.add(site.name, spectrum_of_weight(weight), WeightSpectrum)

    def canary(self, model: nn.Module, canary: canaries.Canary | None, last_call: ModelCall | None) -> None:
        """Forward the canary and reduce its logits, against those of its first forward unless it replays."""
        if canary is None or not self._needed(CanaryPass):
            return
        with self.canary_time:
            self._safely("canary", lambda: self._canary(model, canary, last_call))

    def _canary(self, model: nn.Module, canary: canaries.Canary, last_call: ModelCall | None) -> None:
        answer = canaries.forward(model, canary, last_call)
        if answer is None:
            return
        logits, mask = answer
        if isinstance(canary, str):  # a replay: each edit's own input, so there is no original to compare with
            self._stack.add(MODEL_SITE, reduce_logits(logits, mask), CanaryPass.from_host)
            return
        if self._original_logits is None:
            self._original_logits = last_token_logits(logits, mask).clone()
        self._stack.add(MODEL_SITE, reduce_canary(logits, mask, self._original_logits), CanaryPass.from_host)

    # -- on the host ----------------------------------------------------------------------------------------------

    def read(self) -> tuple[dict[Key, Array], dict[str, WeightPass]]:
        """One copy to the host, then every probe on every measurement: the readings, and the weight passes by site."""
        readings: dict[Key, Array] = {}
        passes: dict[str, WeightPass] = {}
        for site, seen in self._safely("copy to the host", self._stack.take) or []:
            if isinstance(seen, WeightPass):
                passes[site] = seen
            self._apply(site, seen, readings)
        followed = {metric for probe in self._probes for metric in probe.follows}
        for (metric, site), values in list(readings.items()):
            if metric in followed:
                history = self._remember((metric, site), values)
                for probe in self._due:
                    if metric in probe.follows:
                        self._apply(site, history, readings, probe)
        return readings, passes

    def read_weights(self) -> dict[str, WeightPass]:
        """The weight passes collected so far, by site, without running any probe on them."""
        collected = self._safely("copy to the host", self._stack.take) or []
        return {site: seen for site, seen in collected if isinstance(seen, WeightPass)}

    def _remember(self, key: Key, values: Array) -> History:
        recent = self._history.setdefault(key, deque(maxlen=WINDOW + 1))
        recent.append((float(values[0]), float(self._edit)))
        return History(*np.array(recent).T)

    def _apply(self, site: str, seen: Any, readings: dict[Key, Array], only: Probe[Any] | None = None) -> None:
        for probe in (only,) if only is not None else self._due:
            if not isinstance(seen, probe.needs) or not probe.is_for(site):
                continue
            values = self._safely(f"probe {type(probe).__name__}", functools.partial(probe.compute, seen))
            for metric, value in (values or {}).items():
                readings[(metric, site)] = np.atleast_1d(np.asarray(value, dtype=np.float64))
