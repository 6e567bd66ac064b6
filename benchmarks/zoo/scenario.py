"""A scenario of the failure zoo: a real edit loop with one known mechanism at work, and what plain torch sees of it.

Nothing here asks the analyzer. The truth of a run comes from the mechanism itself, which testifies when it strikes
(`Witness`), or else from the model's own tensors after each edit (`State`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn

from stabilitylab.acting.schedule import Trace
from stabilitylab.editors.base import Batch
from stabilitylab.probes.base import Tier
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.sites import find_sites, locate

Course = Literal["exponential", "super-exponential", "jump", "static"]
"""How it goes from the onset to the end. ``static``: nothing grows, the fault is there and stays as it is."""

AGREEMENT_LOST: Final = 0.1
"""Share of the canary's answers that are still the unedited model's: at or below, the model is lost."""
PERPLEXITY_LOST: Final = 100.0
"""Perplexity of the unedited model's answers to the canary, over what it was: at or above, the model is lost."""
EDITS_PAST_THE_END: Final = 6
"""How many more edits a loop makes after the model is lost: what lasts for three is then seen to last."""


class Witness:
    """Told by a loop when and where its mechanism strikes. The first edit counts; also: the other places hit in it."""

    def __init__(self) -> None:
        self.edit = 0
        self.first: tuple[int, str | None] | None = None
        self.also: tuple[str, ...] = ()

    def saw(self, site: str | None, *, at: int | None = None, also: Sequence[str] = ()) -> None:
        """The mechanism struck at `site` (None: at no layer), now or at edit `at`. also: its place's other names."""
        edit = self.edit if at is None else at
        if self.first is None:
            self.first = (edit, site)
            self.also = tuple(also)
        elif self.first[0] == edit and site is not None:
            self.also += (site, *also)


@dataclass(frozen=True)
class Step:
    """One edit of a loop. apply: the model in, the model out. between: what comes after it, such as restoring."""

    label: str
    apply: Callable[[nn.Module], nn.Module]
    between: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True, eq=False)
class Loop:
    """An edit loop that is ready to go.

    sites: what is watched, in the order of the dataflow. steps: the edits. witness: who says when the mechanism struck;
    where it says nothing, the end of the model is the first bad edit. onset: the edit at which growth begins, None
    where that is the strike. to_nonfinite: whether the loop goes on after the canary is lost, until something is not
    finite. also: other names under which the place of the fault is known, such as the editor's part.
    """

    model: nn.Module
    sites: tuple[str, ...]
    canary: Batch
    steps: Iterator[Step]
    witness: Witness = field(default_factory=Witness)
    onset: int | None = None
    also: tuple[str, ...] = ()
    editor: object | None = None
    to_nonfinite: bool = False
    probes: Tier = "default"
    config: Mapping[str, Any] = field(default_factory=dict)


class Make(Protocol):
    """Makes a loop. The same seed (and variant) makes the same loop; another seed another stream, and what is cheap."""

    def __call__(self, seed: int, **variant: Any) -> Loop:
        """See the class."""
        ...


@dataclass(frozen=True)
class Scenario:
    """A mechanism and a loop in which it is at work.

    mechanism: its number in the list of FINDINGS section 10, None for one that is not listed there. cause: the true
    cause's name. known: False for a mechanism that no rule is to know: "unknown" is then the right answer. held_out:
    never used for tuning, on whatever seed: another editor, model or parameter than those that tuning saw. healthy:
    nothing is wrong.
    """

    name: str
    mechanism: int | None
    cause: str | None
    course: Course
    summary: str
    editor: str
    model: str
    make: Make
    known: bool = True
    held_out: bool = False

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, so that every alarm is a false one."""
        return self.cause is None


@dataclass(frozen=True)
class State:
    """What plain torch sees after one edit.

    updates: ‖W_t − W_{t−1}‖_F by site. drift: ‖W_t − W_0‖_F / ‖W_0‖_F by site. bad_weights, bad_outputs: sites with a
    weight, or with an output on the canary, that is not finite, in dataflow order. finite: whether the canary's logits
    are. agreement: share of the canary's answers that are the unedited model's. perplexity_ratio: of the unedited
    model's answers to the canary, over what it was then; NaN when a logit is.
    """

    edit: int
    updates: Mapping[str, float]
    drift: Mapping[str, float]
    bad_weights: tuple[str, ...]
    bad_outputs: tuple[str, ...]
    finite: bool
    agreement: float
    perplexity_ratio: float

    @property
    def nonfinite(self) -> bool:
        """Whether a watched weight or a logit of the canary is NaN or infinite."""
        return bool(self.bad_weights) or not self.finite

    @property
    def lost(self) -> bool:
        """Whether something is not finite, or the canary is lost."""
        return self.nonfinite or self.agreement <= AGREEMENT_LOST or self.perplexity_ratio >= PERPLEXITY_LOST

    @property
    def site(self) -> str:
        """Where: the first site in dataflow order that is not finite, else the one that drifted furthest."""
        bad = {*self.bad_weights, *self.bad_outputs}
        if bad:
            return next(site for site in self.drift if site in bad)
        return max(self.drift, key=lambda site: self.drift[site])


@dataclass(frozen=True)
class Truth:
    """What really happened.

    cause: None for a healthy run. onset: the edit at which it began. first_bad_edit, site: where the mechanism first
    struck, or the model's end; site is None for a fault that is at no layer. also: other right names of that place.
    lost_edit: the first edit after which something was not finite or the canary was lost; None: never.
    nonfinite_edit: the same for non-finite values alone.
    """

    cause: str | None
    course: Course
    onset: int | None
    first_bad_edit: int | None
    site: str | None
    also: tuple[str, ...]
    lost_edit: int | None
    nonfinite_edit: int | None


@dataclass(frozen=True)
class Outcome:
    """A run and the truth about it. states: edit 0 first."""

    scenario: Scenario
    seed: int
    run: Path
    truth: Truth
    states: tuple[State, ...]


class Sight:
    """Looks at a model's own tensors after each edit, with plain torch."""

    def __init__(self, model: nn.Module, sites: Sequence[str], canary: Batch) -> None:
        self._sites = find_sites(model, sites)
        self._canary = canary
        self._original = {name: weight.clone() for name, weight in self._weights(model).items()}
        self._before = dict(self._original)
        logits = self._forward(model)[0]
        self._answers = logits.argmax(-1)
        self._loss = self._loss_of(logits)

    def look(self, model: nn.Module, edit: int) -> State:
        """The state of `model` after edit number `edit`."""
        weights = self._weights(model)
        logits, bad_outputs = self._forward(model)
        finite = bool(logits.isfinite().all())
        # The argmax of NaN is 0 on both sides: what is not finite agrees with nothing.
        agrees = (logits.argmax(-1) == self._answers) & logits.isfinite().all(-1)
        ratio = math.exp(min(self._loss_of(logits) - self._loss, 700.0)) if finite else math.nan
        state = State(
            edit=edit,
            updates={name: _norm(weight.double() - self._before[name].double()) for name, weight in weights.items()},
            drift={
                name: _norm(weight.double() - self._original[name].double()) / max(_norm(self._original[name]), 1e-300)
                for name, weight in weights.items()
            },
            bad_weights=tuple(name for name, weight in weights.items() if not weight.isfinite().all()),
            bad_outputs=bad_outputs,
            finite=finite,
            agreement=float(agrees.double().mean()),
            perplexity_ratio=ratio,
        )
        self.restart(model)
        return state

    def restart(self, model: nn.Module) -> None:
        """Take the weights as they are now for those that the next edit starts from."""
        self._before = {name: weight.clone() for name, weight in self._weights(model).items()}

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        found = {site.name: locate(model, site) for site in self._sites}
        return {name: pair[1].detach() for name, pair in found.items() if pair is not None}

    @torch.no_grad()
    def _forward(self, model: nn.Module) -> tuple[Tensor, tuple[str, ...]]:
        """The canary's logits at the last position, float64 [rows, words], and the sites whose output is not finite."""
        finite: dict[str, bool] = {}
        handles = []
        try:
            for site in self._sites:
                found = locate(model, site)
                if found is not None:
                    handles.append(found[0].register_forward_hook(_note_finite(finite, site.name)))
            logits = model(**self._canary).logits[:, -1].double()
        finally:
            for handle in handles:
                handle.remove()
        return logits, tuple(site.name for site in self._sites if not finite.get(site.name, True))

    def _loss_of(self, logits: Tensor) -> float:
        return float(nn.functional.cross_entropy(logits, self._answers))


def _note_finite(finite: dict[str, bool], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        finite[name] = bool(output.isfinite().all())

    return note


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


CarryOut = Callable[[nn.Module, Step], nn.Module]
"""Carries out one edit: the model in, the model out. What it raises is the edit's own failure, see `watched`."""
Watch = Callable[[Loop], AbstractContextManager[CarryOut]]
"""Watches a loop from before its first edit to after its last."""


def run(
    scenario: Scenario,
    seed: int,
    folder: Path,
    *,
    canary: bool = True,
    trace: Trace = "auto",
    budget: float | None = None,
    **variant: Any,
) -> Outcome:
    """Go through the scenario's loop under a monitor that writes the run `folder`; it ends some edits after the model.

    The global random state is as before. seed: of the loop, see `Make`. canary: False for a monitor without one. trace:
    as for `stabilitylab.attach`, and budget too, but for what is left out: these edits take milliseconds. variant:
    further arguments of `scenario.make`.
    """
    config = {"zoo": scenario.name, "seed": seed}
    watch = partial(_monitored, folder=folder, config=config, canary=canary, trace=trace, budget=budget)
    loop, states = _go(scenario, seed, watch, variant)
    return Outcome(scenario, seed, folder, _truth(scenario, loop, states), tuple(states))


def watched(scenario: Scenario, seed: int, watch: Watch, **variant: Any) -> tuple[State, ...]:
    """Go through the same loop under another watch, with no monitor, and tell what plain torch saw: edit 0 first.

    An ArithmeticError, RuntimeError or ValueError fails the edit, and the loop goes on; anything else ends the loop and
    is passed on. The rest is as in `run`.
    """
    return tuple(_go(scenario, seed, watch, variant)[1])


@contextmanager
def _monitored(
    loop: Loop, folder: Path, config: Mapping[str, Any], canary: bool, trace: Trace, budget: float | None
) -> Iterator[CarryOut]:
    with attach(
        loop.model,
        sites=loop.sites,
        run=folder,
        editor=loop.editor,
        canary=loop.canary if canary else None,
        probes=loop.probes,
        announce=False,
        trace=trace,
        budget=budget,
        config={**config, **loop.config},
    ) as monitor:

        def carry_out(model: nn.Module, step: Step) -> nn.Module:
            with monitor.edit(label=step.label) as edit:
                return edit.returns(step.apply(model))

        yield carry_out


def _go(scenario: Scenario, seed: int, watch: Watch, variant: Mapping[str, Any]) -> tuple[Loop, list[State]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loop = scenario.make(seed, **variant)
        return loop, _edited(loop, watch)


def _edited(loop: Loop, watch: Watch) -> list[State]:
    model = loop.model
    sight = Sight(model, loop.sites, loop.canary)
    states = [sight.look(model, 0)]
    with watch(loop) as carry_out:
        for number, step in enumerate(loop.steps, start=1):
            loop.witness.edit = number
            with suppress(ArithmeticError, RuntimeError, ValueError):  # such as a solve of NaN: the run says it failed
                model = carry_out(model, step)
            states.append(sight.look(model, number))
            if step.between is not None:
                step.between(model)
                sight.restart(model)
            lost = _first(states, lambda state: state.nonfinite if loop.to_nonfinite else state.lost)
            if lost is not None and number >= lost + EDITS_PAST_THE_END:
                break
    return states


def _first(states: Sequence[State], holds: Callable[[State], bool]) -> int | None:
    return next((state.edit for state in states if holds(state)), None)


def _truth(scenario: Scenario, loop: Loop, states: Sequence[State]) -> Truth:
    lost = _first(states, lambda state: state.lost)
    struck = loop.witness.first
    if struck is None and lost is not None:
        struck = (lost, states[lost].site)
    edit, site = struck if struck is not None and not scenario.healthy else (None, None)
    return Truth(
        cause=scenario.cause,
        course=scenario.course,
        onset=loop.onset if loop.onset is not None and not scenario.healthy else edit,
        first_bad_edit=edit,
        site=site,
        also=(*loop.also, *loop.witness.also),
        lost_edit=lost,
        nonfinite_edit=_first(states, lambda state: state.nonfinite),
    )
