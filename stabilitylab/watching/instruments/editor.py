"""The editor's own state: what its attributes show, what the model's adapters show, and what it reports."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.probes.codebook import CodebookHits, CodebookPass, query_of, reduce_codebook, reduce_hits
from stabilitylab.probes.linear_solve import (
    CovarianceExtremes,
    SolveResidual,
    SystemExtremes,
    reduce_extremes,
    reduce_residual,
)
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass, reduce_normaliser
from stabilitylab.probes.null_space import KeyCachePass, NullSpacePass, trace_of
from stabilitylab.probes.rank_one import ClampHits, Denominator, TargetValue, reduce_denominator, reduce_target
from stabilitylab.probes.side_memory import SideMemoryPass, reduce_side_memory
from stabilitylab.record.readings import EDITOR_SITE, Rebuild
from stabilitylab.record.serving import SERVES, serving_says
from stabilitylab.watching import editor_parts as parts
from stabilitylab.watching.calls import watch_solves
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.served_layers import layers_behind
from stabilitylab.watching.sites import Site
from stabilitylab.watching.walking import NamedModules

WIDEST_ON_CPU = 4096
"""The widest matrix whose condition number is measured on a CPU: 2 s on one core, and the time grows with the cube."""


def _site(*names: str) -> str:
    return ".".join(part for part in (EDITOR_SITE, *names) if part)


def _scalar(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().double().reshape(1)


class EditorInstrument:
    """Measures what `watching.editor_parts` finds. Each part at each site is switched off by itself when it breaks.

    State inside the editor has sites under ``editor.``; what belongs to a layer has that layer's name.
    """

    def __init__(self, bench: Bench, editor: object | None) -> None:
        self._bench = bench
        self._editor = editor
        self._names: frozenset[str] = frozenset()
        self._skipped: set[str] = set()
        self._told: set[str] = set()
        self._updates: dict[str, Tensor] = {}
        self._read: weakref.WeakSet[EditorReport] = weakref.WeakSet()

    def watch(self, capture: Capture, model: nn.Module, named: NamedModules) -> None:
        """Hook what enters the editor's normalisers and the model's codebooks during the edit."""
        self._see(named)
        self._bench.safely("hooks on the editor", functools.partial(self._hook, capture, model, named))

    def grew(self, capture: Capture) -> None:
        """Hook what the editor has built since the edit began, such as a hypernetwork."""
        self._bench.safely("hooks on the editor", functools.partial(self._hook_normalisers, capture))

    def _hook_normalisers(self, capture: Capture) -> None:
        if self._bench.needed(NormaliserPass):
            for name, normaliser in parts.find_normalisers(self._editor).items():
                if name not in capture.editors:
                    capture.watch_editor(name, normaliser.module)

    def _hook(self, capture: Capture, model: nn.Module, named: NamedModules) -> None:
        self._hook_normalisers(capture)
        if self._bench.needed(SystemExtremes) or self._bench.needed(SolveResidual):
            self._watch_solves(capture, model)
        if self._bench.needed(CodebookHits):
            for name in parts.find_codebooks(named):
                self._watch_codebook(capture, model, name)

    @property
    def updates(self) -> Mapping[str, Tensor]:
        """What the editor said that it meant to add to the weights in this edit, by layer."""
        return self._updates

    def after(
        self,
        named: NamedModules,
        capture: Capture | None,
        reports: Mapping[str, EditorReport],
        sites: Sequence[Site] = (),
    ) -> None:
        """Reduce everything that is needed of the editor, of the adapters in the model, and of what was reported.

        named: the model's modules. capture: what entered the normalisers, or None before the first edit. reports: those
        of this edit, by layer. sites: what is watched of the model.
        """
        self._see(named)
        self._bench.safely("editor state", functools.partial(self._editor_state, capture, sites))
        self._bench.safely("adapters in the model", functools.partial(self._adapters, named))
        self._bench.safely("the editor's reports", functools.partial(self._all_reports, reports))

    def _see(self, named: NamedModules) -> None:
        self._names = self._names or frozenset(name for name, _ in named)

    def _take(self, need: type[Any], site: str, reduce: Callable[[], Tensor], rebuild: Rebuild[Any]) -> None:
        """Add a measurement if a probe that is due needs it."""
        if self._bench.needed(need, site):
            what = f"{need.__name__} of {site}"
            self._bench.safely(what, lambda: self._bench.add(site, reduce(), rebuild))

    # -- in the editor --------------------------------------------------------------------------------------------

    def _editor_state(self, capture: Capture | None, sites: Sequence[Site]) -> None:
        if self._editor is None:
            return
        if self._bench.needed(NormaliserPass):
            self._normalisers(capture, sites)
        if self._bench.needed(LearningRates):
            for name, rates in parts.find_learning_rates(self._editor).items():
                self._take(LearningRates, _site(name), rates.double, LearningRates)
        for name, projection in parts.find_projections(self._editor).items():
            reduce = functools.partial(trace_of, projection, mean=True)
            self._take(NullSpacePass, _site(name), reduce, NullSpacePass.from_host)
        for name, cache in parts.find_key_caches(self._editor).items():
            self._take(KeyCachePass, _site(name), functools.partial(trace_of, cache), KeyCachePass.from_host)
        for name, covariance in parts.find_covariances(self._editor).items():
            self._condition(CovarianceExtremes, name, covariance)

    def _normalisers(self, capture: Capture | None, sites: Sequence[Site]) -> None:
        for name, normaliser in parts.find_normalisers(self._editor).items():
            self._tell_layers(name, normaliser, sites)
            calls = capture.editors[name].calls if capture is not None and name in capture.editors else []
            for kind in normaliser.statistics:
                reduce = functools.partial(_normalised, kind, kind.entered(calls))
                self._take(NormaliserPass, _site(name, kind.kind), reduce, NormaliserPass.from_host)

    def _tell_layers(self, name: str, normaliser: parts.Normaliser, sites: Sequence[Site]) -> None:
        """Note, once, which layers a normaliser serves that is named by their shape."""
        if name not in self._told:
            layers = layers_behind(name, [kind.std.numel() for kind in normaliser.statistics], sites)
            if layers:
                self._told.add(name)
                self._bench.note(SERVES, serving_says(_site(name), layers))

    def _condition(self, need: type[CovarianceExtremes | SystemExtremes], site: str, matrix: Tensor) -> None:
        if matrix.device.type == "cpu" and min(matrix.shape, default=0) > WIDEST_ON_CPU:
            what = f"condition of the {'covariance' if need is CovarianceExtremes else 'system'} at {site}"
            if self._bench.needed(need, site) and what not in self._skipped:
                self._skipped.add(what)
                shape = "×".join(map(str, matrix.shape))
                self._bench.note("skipped", f"{what}: {shape} on a CPU would take too long; at most {WIDEST_ON_CPU}")
            return
        self._take(need, site, functools.partial(reduce_extremes, matrix), need.from_host)

    # -- in the model ---------------------------------------------------------------------------------------------

    def _layer(self, name: str) -> str:
        """The name that a layer had in the model as it was first seen: an editor may wrap the model, or unwrap it."""
        steps = name.split(".")
        for start in range(len(steps)):
            if (inner := ".".join(steps[start:])) in self._names:
                return inner
        return next((known for known in self._names if known.endswith(f".{name}")), name)

    def _adapters(self, named: NamedModules) -> None:
        if self._bench.needed(CodebookPass):
            for name, book in parts.find_codebooks(named).items():
                reduce = functools.partial(reduce_codebook, book.keys, book.values, book.radii)
                self._take(CodebookPass, self._layer(name), reduce, CodebookPass.from_host)
        if self._bench.needed(SideMemoryPass):
            for name, memory in parts.find_side_memories(named).items():
                reduce = functools.partial(reduce_side_memory, memory.sides, memory.original)
                rebuild = functools.partial(SideMemoryPass.from_host, stored=memory.stored)
                self._take(SideMemoryPass, self._layer(name), reduce, rebuild)

    def _watch_codebook(self, capture: Capture, model: nn.Module, name: str) -> None:
        """See whether the first input of the edit falls inside a ball, before the adapter takes it in."""
        site, asked = self._layer(name), False

        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal asked
            book = None if asked else parts.codebook_of(module)
            asked = True
            if book is not None and args and isinstance(args[0], Tensor):
                with self._bench.probe_time:
                    self._take(CodebookHits, site, functools.partial(_hits, book, args[0]), CodebookHits.from_host)

        capture.own(model.get_submodule(name).register_forward_pre_hook(capture.hook(before_forward)))

    # -- solved inside the edit -----------------------------------------------------------------------------------

    def _watch_solves(self, capture: Capture, model: nn.Module) -> None:
        """Hear of the linear systems that are solved during the edit: MALMEN's, MEMIT's, AlphaEdit's."""
        solved = 0

        def on_solve(kind: str, system: Tensor, right_side: Tensor | None, solution: Tensor) -> None:
            nonlocal solved
            solved += 1
            report = EditorReport(system=system, solution=solution, right_side=right_side)
            with self._bench.probe_time:
                self._report(_site(f"solve{solved}"), report)

        reason = watch_solves(capture.stack, model, on_solve)
        if reason is not None and reason not in self._skipped:
            self._skipped.add(reason)
            self._bench.note("capture", f"solves left out: {reason}")

    # -- reported -------------------------------------------------------------------------------------------------

    def _all_reports(self, reports: Mapping[str, EditorReport]) -> None:
        """Those of the loop, over those that the editor shows; one that was read after an earlier edit is stale."""
        found = {name: own for name, own in parts.find_reports(self._editor).items() if own not in self._read}
        self._read.update(found.values())
        for name, report in reports.items():
            found[name] = found[name].with_later(report) if name in found else report
        for name, report in found.items():
            self._report(name, report)
        self._updates = {name: report.update for name, report in found.items() if report.update is not None}

    def _report(self, site: str, report: EditorReport) -> None:
        key, direction, target, initial = report.key, report.direction, report.target_value, report.initial_value
        if key is not None and direction is not None:
            reduce = functools.partial(reduce_denominator, key, direction)
            self._take(Denominator, site, reduce, Denominator.from_host)
        if target is not None and initial is not None:
            self._take(TargetValue, site, functools.partial(reduce_target, target, initial), TargetValue.from_host)
        if report.clamp_hits is not None:
            self._take(ClampHits, site, functools.partial(_scalar, report.clamp_hits), ClampHits.from_host)
        if report.covariance is not None:
            self._condition(CovarianceExtremes, site, report.covariance)
        system, solution, right_side = report.system, report.solution, report.right_side
        if system is not None:
            self._condition(SystemExtremes, site, system)
        if system is not None and solution is not None and right_side is not None:
            reduce = functools.partial(reduce_residual, system, solution, right_side)
            self._take(SolveResidual, site, reduce, SolveResidual.from_host)


def _normalised(kind: parts.Statistics, entered: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    inputs, beside = [values for values, _ in entered], [other for _, other in entered]
    return reduce_normaliser(kind.mean, kind.std, inputs, kind.guard, kind.rows, learns=kind.learns, beside=beside)


def _hits(book: parts.Codebook, entered: Tensor) -> Tensor:
    return reduce_hits(query_of(entered, book.token), book.keys, book.radii)
