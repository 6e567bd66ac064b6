"""What the `.grad` of each edited weight held when the loop used it: at an optimizer's step, else after its backward.

`hooks.Capture` tells when a gradient was accumulated, when that backward had ended (an all-reduce included), and when
an optimizer is about to step. A loss scale is known from the scaler that lets it step.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.accumulated_gradient import (
    END,
    FACTORS,
    PARTS,
    SCALED_FACTORS,
    STEP,
    AccumulatedGradient,
    Use,
    gradient_norm,
    needs_matrix,
    reduce_used,
    reduce_uses,
)
from stabilitylab.probes.gradient_factors import GradientSize, GradientSpectrum, norm_of
from stabilitylab.record.readings import Rebuild
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.sites import Orientation, why_unmeasurable
from stabilitylab.watching.spread import is_spread, part_of

_FRAMES = 12
"""How far above an optimizer's step its scaler may be: torch's own wrappers, a scheduler's, accelerate's."""


@dataclass(frozen=True)
class Group:
    """What an optimizer's groups say of the steps with one weight.

    rate: the largest learning rate, or one that is NaN; None where none is known. ascends: whether any of them
    maximises.
    """

    rate: float | None = None
    ascends: bool = False

    def beside(self, other: Group) -> Group:
        """Of both."""
        known = [rate for rate in (self.rate, other.rate) if rate is not None]
        return Group(float(np.max(known)) if known else None, self.ascends or other.ascends)


@dataclass
class _Weight:
    """One weight inside one edit.

    orientation: how it meets its input; where it doesn't, its gradient has a norm, and no spectrum is formed. stale:
    whether `.grad` held something before the edit's first backward. fresh: whether a backward has added to it since it
    was last used; just_now: whether the one that is under way has. added: whether it was written to after it was made:
    a sum over backwards, or zeroed in place. last: that gradient, as long as anyone else holds it. carried: how many
    steps used what a step had used already. looks: as each backward since the last step left it.
    steps: each time that an optimizer used it. by: what that optimizer's group says.
    """

    weight: Tensor
    orientation: Orientation
    stale: bool
    fresh: bool = False
    just_now: bool = False
    added: bool = False
    last: Callable[[], Tensor | None] = lambda: None
    carried: int = 0
    looks: list[Use] = field(default_factory=list)
    steps: list[Use] = field(default_factory=list)
    by: Group = Group()
    matrix: tuple[Tensor, Rebuild[GradientSize]] | None = None

    @property
    def gradient(self) -> Tensor | None:
        """Its `.grad`, where that can be read; this process's part of one that is spread."""
        found = self.weight.grad
        if found is None:
            return None
        part = part_of(found)
        unreadable = part.layout != torch.strided or why_unmeasurable(part) is not None
        # An empty part of what is spread is a part all the same: the others have theirs.
        return None if unreadable and not (is_spread(found) and not part.numel()) else part


@dataclass
class _Used:
    """Whether `.grad` still holds what a step has used, told by how often it was written.

    version: of the gradient, as the last step or backward left it. holds: whether nobody has cleared it since that
    step: a backward adds in one write, clearing in place is another, and a new gradient has none before it.
    """

    version: int = -1
    holds: bool = False

    def added(self, gradient: Tensor) -> None:
        """A backward has added to it."""
        self.holds = self.holds and gradient._version - 1 == self.version
        self.version = gradient._version

    def stepped(self, gradient: Tensor | None) -> bool:
        """A step uses it. Returns whether it holds what one has used before."""
        again, self.holds = self.holds, gradient is not None
        self.version = -1 if gradient is None else gradient._version
        return again


@dataclass(frozen=True)
class Accumulated:
    """What is known of one site at the edit's end. matrix: what `.grad` itself shows, where it was needed.

    source: as `AccumulatedGradient` has it.
    """

    packed: Tensor
    rebuild: Rebuild[AccumulatedGradient]
    source: float
    matrix: tuple[Tensor, Rebuild[GradientSize]] | None = None


@dataclass(frozen=True)
class FirstPass:
    """The factors of a site's first pass, as they were reduced.

    is_plain: whether it is the only one so far, of a layer that forms plain products: then they must make the gradient.
    narrow: whether they are float16. scale: the loss scale that was in force.
    """

    packed: Tensor
    is_plain: bool
    narrow: bool
    scale: Tensor | None


class AccumulatedInstrument:
    """Looks at `.grad` when it is used. Forms no gradient, keeps none."""

    def __init__(self, bench: Bench, scaler: torch.amp.GradScaler | None = None) -> None:
        """scaler: of the loop's loss, where it is known before it lets an optimizer step."""
        self._bench = bench
        self._weights: dict[str, dict[int, _Weight]] = {}
        self._scaler = None if scaler is None else weakref.ref(scaler)
        self._stepped = False
        self._first_scale: Tensor | None = None
        self._used: dict[str, _Used] = {}
        self._parts: dict[str, frozenset[int]] = {}
        self._parts_stepped: dict[str, Group] = {}

    def begin(self) -> None:
        """A new edit."""
        self._weights, self._stepped, self._first_scale = {}, False, None
        self._parts, self._parts_stepped = {}, {}

    def made_of(self, site: str, parts: Iterable[Tensor]) -> None:
        """In this edit the site's weight is none of its own, but computed from these."""
        self._parts[site] = frozenset(map(id, parts))

    def adopt(self, site: str, weight: Tensor, orientation: Orientation) -> bool:
        """Whether to tell of what is accumulated in this weight: a leaf that is not watched yet in this edit."""
        known = self._weights.setdefault(site, {})
        if id(weight) in known or not (weight.is_leaf and weight.requires_grad):
            return False
        known[id(weight)] = _Weight(weight, orientation, stale=weight.grad is not None, last=_weakly(weight.grad))
        return True

    @property
    def scale(self) -> Tensor | None:
        """The loss scale that is in force, as far as a scaler is known: a copy, for it changes in place."""
        scaler = None if self._scaler is None else self._scaler()
        found = None if scaler is None else scaler._scale
        return None if found is None else found.detach().clone()

    def accumulated(self, site: str, weight: Tensor) -> None:
        """A backward has added to a weight's gradient."""
        one = self._weights[site][id(weight)]
        one.fresh = one.just_now = True
        # The same tensor as before is a sum, or was zeroed in place. (Not by its version: that also counts how autograd
        # added up the passes of one backward.)
        one.added = one.added or (weight.grad is not None and weight.grad is one.last())
        one.last = _weakly(weight.grad)
        if weight.grad is not None:
            self._used.setdefault(site, _Used()).added(weight.grad)

    def backward_ended(self) -> None:
        """The backward that added to gradients is over."""
        for one in (one for known in self._weights.values() for one in known.values()):
            if one.just_now and (gradient := one.gradient) is not None:
                one.looks.append(Use(gradient_norm(gradient), scale=self.scale))
            one.just_now = False

    def optimizer_steps(self, optimizer: torch.optim.Optimizer, first: Mapping[str, FirstPass]) -> None:
        """An optimizer is about to step. first: the first pass of each site that had one."""
        self._stepped = True
        groups = [(group["params"], _said_by(group)) for group in optimizer.param_groups]
        mine = {id(weight): group for held, group in groups for weight in held}
        if self._parts:
            moving = {id(weight) for held, _ in groups for weight in held if weight.grad is not None}
            for site, parts in self._parts.items():
                for part in parts & moving:
                    self._parts_stepped[site] = self._parts_stepped.get(site, Group()).beside(mine[part])
        scaler = next(_scalers_above(sys._getframe()), None)
        self._scaler = self._scaler if scaler is None else weakref.ref(scaler)
        within: Any = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales by itself
        scale = within if isinstance(within, Tensor) else None if scaler is None else self.scale
        self._first_scale = scale if self._first_scale is None else self._first_scale
        for site, known in self._weights.items():
            for key, one in known.items():
                gradient = one.gradient
                if key not in mine or not one.fresh or gradient is None:
                    continue
                stepped = gradient_norm(gradient)
                stepped = stepped if within is None else stepped / within.to(stepped.device)
                use = Use(one.looks[-1].before if one.looks else None, stepped, scale)
                if not one.steps:
                    self._look_closer(site, one, gradient, use, first.get(site))
                one.steps.append(use)
                one.by = one.by.beside(mine[key])
                one.carried += self._used.setdefault(site, _Used()).stepped(one.weight.grad)
                one.fresh = False
                one.looks = []

    def _look_closer(self, site: str, one: _Weight, gradient: Tensor, use: Use, first: FirstPass | None) -> None:
        if one.orientation == "none" or is_spread(one.weight):  # no part shows the spectrum of the whole
            return
        norm = use.stepped if use.before is None else use.before
        # Both hold the loss scale where the norm is that of the backward.
        factors = None if first is None else norm_of(first.packed)
        if norm is not None and needs_matrix(gradient, norm, factors, first is not None and first.is_plain):
            with_spectrum = self._bench.needed(GradientSpectrum, site)
            one.matrix = reduce_used(gradient, one.orientation == "in_out", with_spectrum)

    def after(self, site: str, first: FirstPass | None) -> Accumulated | None:
        """What became known of one site; None where it had no gradient at all."""
        known = self._weights.get(site, {}).values()
        # What FSDP gathers has a gradient for a while too, and no optimizer steps with it.
        one = next((one for one in known if one.steps), None) or next((one for one in known if one.looks), None)
        if one is not None and one.steps:
            return self._of(one.steps, STEP, one, one.by)
        if one is not None and self._is_used(one):
            gradient = one.gradient
            if gradient is not None and len(one.looks) == 1:
                self._look_closer(site, one, gradient, one.looks[0], first)
            return self._of(one.looks, END, one)
        if first is None:
            return None
        # Of the run's first edit the scaler became known as it stepped, after the pass.
        scale = self._first_scale if first.scale is None else first.scale
        factors = PARTS if site in self._parts_stepped else FACTORS
        by = self._parts_stepped.get(site, Group())
        if one is None and scale is not None:
            return self._of([Use(norm_of(first.packed), scale=scale)], factors, None, by)
        source = SCALED_FACTORS if first.narrow and scale is None else factors
        return self._of([] if one is None else one.looks, source, None, by)

    def _is_used(self, one: _Weight) -> bool:
        """Whether `.grad` is all that anyone can have used, although no optimizer stepped with it: none stepped at all
        after its backward, and each backward began a new one.
        """
        return not self._stepped and (not one.added or (len(one.looks) == 1 and not one.stale))

    def _of(self, uses: list[Use], source: float, one: _Weight | None, by: Group = Group()) -> Accumulated:
        packed, rebuild = reduce_uses(uses, source, 0 if one is None else one.carried, by.rate, by.ascends)
        return Accumulated(packed, rebuild, source, None if one is None else one.matrix)


def _said_by(group: Mapping[str, Any]) -> Group:
    """The learning rate is None where the group has none, or where reading it would wait for a device."""
    rate = group.get("lr")
    if isinstance(rate, Tensor):
        rate = rate.item() if rate.device.type == "cpu" and rate.numel() == 1 else None
    return Group(float(rate) if isinstance(rate, (int, float)) else None, group.get("maximize") is True)


def _weakly(gradient: Tensor | None) -> Callable[[], Tensor | None]:
    return (lambda: None) if gradient is None else weakref.ref(gradient)


def _scalers_above(frame: FrameType | None) -> Iterator[torch.amp.GradScaler]:
    """The loss scalers whose step is under way."""
    for _ in range(_FRAMES):
        if frame is None:
            return
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.amp.GradScaler):
            yield owner
        frame = frame.f_back
