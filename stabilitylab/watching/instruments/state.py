"""Everything in the model but the watched weights: is it finite?"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabilitylab.probes.native_scan import ADDRESS, STEP, count_nonfinite_in, table_of
from stabilitylab.probes.state_pass import BadTensor, StatePass, count_bad, state_of, step_of
from stabilitylab.probes.weight_pass import extremes
from stabilitylab.record.note_kinds import WRITTEN_BESIDES
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.sites import Site, locate, why_unmeasurable
from stabilitylab.watching.walking import NamedModules, named_modules_of, named_tensors_of, tensors_of

_NAMED = 3
OFTEN: Final = 3
"""Edits that write a parameter, from which on they mean it."""

_Sign = tuple[int, int]
_Kind = tuple[type[Tensor], torch.dtype, int, bool]


@dataclass
class _Plan:
    """What a look is at, as long as the model holds the same tensors. It holds none of them.

    marks, ids, watched: of what the model is made, and which of it others look at. names, places: of those that are
    looked at, and where they stand among all. kinds: their types and extents. unread: where those stand that can't be
    read. signs: by which a write is seen. parameters: which of those that are looked at are no buffers. table: for
    native code; None where they are not all for that.
    """

    marks: list[str | None]
    ids: list[int]
    watched: set[int]
    names: list[str]
    places: list[int]
    kinds: list[_Kind]
    unread: list[int]
    signs: list[_Sign | None]
    parameters: list[bool]
    table: NDArray[np.int64] | None


class StateInstrument:
    """Looks in full at what was written to, at one more tensor an edit in turn, and at everything when told to."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._designed: set[str] = set()
        self._plan: _Plan | None = None
        self._turn = 0
        self._in_full = True
        self._written: Counter[str] | None = Counter()
        """Edits that wrote each unwatched parameter; None once that is said."""

    @property
    def wanted(self) -> bool:
        """Whether a probe asks for it."""
        return self._bench.needed(StatePass) or self._bench.needed(BadTensor)

    def look_in_full_next(self) -> None:
        """Something is wrong: the next look is at every entry."""
        self._in_full = True

    def before_any_edit(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Look at everything. What is infinite now is meant: a mask; and so is a buffer that nobody has written yet.
        Waits for an accelerator.
        """
        self._bench.safely("masks in the model's state", lambda: self._learn_design(model, sites))
        self.after(model, named_modules_of(model), sites)

    def _learn_design(self, model: nn.Module, sites: Sequence[Site]) -> None:
        if not self.wanted:
            return
        buffers = dict(model.named_buffers())
        unwritten: list[str] = []
        watched = _watched(model, sites)
        for name, tensor in (*model.named_parameters(), *buffers.items()):
            if id(tensor) not in watched and _is_readable(tensor):
                ends = torch.stack(extremes(tensor))  # NaN where the tensor has one; makes no mask of its size
                lost, infinite = bool(torch.isnan(ends).any()), bool(torch.isinf(ends).any())
                if lost and name in buffers:
                    unwritten.append(name)
                if (lost and name in buffers) or (infinite and not lost):
                    self._designed.add(name)
        if unwritten:
            more = f" and {len(unwritten) - _NAMED} more" if len(unwritten) > _NAMED else ""
            hold, are = ("holds", "is") if len(unwritten) == 1 else ("hold", "are")
            self._bench.note(
                "state-before",
                f"{', '.join(unwritten[:_NAMED])}{more} {hold} NaN before the first edit, and {are} not looked at",
            )

    def after(self, model: nn.Module, named: NamedModules, sites: Sequence[Site]) -> None:
        """Look, after an edit. named: the model's modules."""
        if self.wanted:
            self._bench.safely("the model's state", lambda: self._look(model, named, sites))

    def _look(self, model: nn.Module, named: NamedModules, sites: Sequence[Site]) -> None:
        watched = _watched(model, sites)
        marks, tensors = tensors_of(named)
        plan = self._plan
        if plan is None or not _fits(plan, marks, tensors, watched):
            plan = self._plan = self._planned(named, watched, marks, tensors)
        held = [tensor for place in plan.places if (tensor := tensors[place]) is not None]
        if not held:
            return
        self._turn = (self._turn + 1) % len(held)
        signs = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in held]
        whole = [at for at, (was, now) in enumerate(zip(plan.signs, signs, strict=True)) if was != now]
        # By its version: one that was moved to another place, as offloading does, was not written.
        written = [at for at in whole if (was := plan.signs[at]) is not None and was[1] != signs[at][1]]
        self._tell_of_writes(plan, written, lambda: _inside(model, sites))
        if plan.table is not None:
            plan.table[whole, ADDRESS] = [signs[at][0] for at in whole]
        plan.signs = list(signs)
        whole = list(range(len(held))) if self._in_full else sorted({*whole, self._turn})
        self._in_full = False
        if plan.table is None:
            self._count_by_device(plan, held, set(whole))
            return
        table = plan.table.copy()
        table[whole, STEP] = 1
        counts, names = count_nonfinite_in(table), plan.names
        if counts.any():  # those that were looked at in full are named first
            order = [*whole, *sorted({*range(len(held))} - {*whole})]
            counts, names = counts[order], [names[at] for at in order]
        self._add(torch.from_numpy(counts.astype(np.float64)), names)

    def _tell_of_writes(self, plan: _Plan, changed: Sequence[int], inside: Callable[[], set[int]]) -> None:
        """Say once that edits write parameters which nobody watches. inside: those of the watched layers, by `id`: what
        an adapter adds to a weight is watched with it, and a bias belongs to its layer.
        """
        if self._written is None:
            return
        self._written.update(plan.names[at] for at in changed if plan.parameters[at])
        often = [name for name, edits in self._written.items() if edits >= OFTEN]
        if often:
            theirs = inside()
            own = {name for name, at in zip(plan.names, plan.places, strict=True) if plan.ids[at] in theirs}
            self._written = Counter({name: edits for name, edits in self._written.items() if name not in own})
            often = [name for name in often if name not in own]
        if often:
            self._written = None
            more = f" and {len(often) - _NAMED} more" if len(often) > _NAMED else ""
            are = "is not watched" if len(often) == 1 else "are not watched"
            self._bench.note(WRITTEN_BESIDES, f"edits also write to {', '.join(often[:_NAMED])}{more}, which {are}")

    def _count_by_device(self, plan: _Plan, held: Sequence[Tensor], in_full: set[int]) -> None:
        whole, sampled = _ByDevice(), _ByDevice()
        for at, (name, tensor) in enumerate(zip(plan.names, held, strict=True)):
            (whole if at in in_full or not tensor.is_contiguous() else sampled).add(name, tensor)
        devices = list(dict.fromkeys((*whole.tensors, *sampled.tensors)))
        counts = [count_bad(whole.tensors[device], sampled.tensors[device]) for device in devices]
        names = [name for device in devices for name in (*whole.names[device], *sampled.names[device])]
        self._add(torch.cat([count.to(devices[0]) for count in counts]), names)

    def _add(self, counts: Tensor, names: Sequence[str]) -> None:
        self._bench.add(MODEL_SITE, counts, functools.partial(state_of, names=names))

    def _planned(
        self, named: NamedModules, watched: set[int], marks: list[str | None], tensors: Sequence[Tensor | None]
    ) -> _Plan:
        ids = list(map(id, tensors))
        asked = [
            (name, tensor)
            for name, tensor in named_tensors_of(named)
            if id(tensor) not in watched and name not in self._designed
        ]
        read = [(name, tensor) for name, tensor in asked if _is_readable(tensor)]
        place = {known: at for at, known in enumerate(ids)}
        before = {} if self._plan is None else dict(zip(self._plan.names, self._plan.signs, strict=True))
        held = [tensor for _, tensor in read]
        return _Plan(
            marks,
            ids,
            watched,
            names=[name for name, _ in read],
            places=[place[id(tensor)] for tensor in held],
            kinds=_kinds(held),
            unread=[place[id(tensor)] for _, tensor in asked if not _is_readable(tensor)],
            signs=[before.get(name) for name, _ in read],
            parameters=[isinstance(tensor, nn.Parameter) for tensor in held],
            table=table_of([(tensor, step_of(tensor)) for tensor in held]),
        )


def _fits(plan: _Plan, marks: list[str | None], tensors: Sequence[Tensor | None], watched: set[int]) -> bool:
    """Whether the model still is what a look was planned for."""
    if plan.marks != marks or plan.watched != watched or plan.ids != list(map(id, tensors)):
        return False
    if plan.kinds != _kinds(tensors[place] for place in plan.places):
        return False
    unread = (tensors[place] for place in plan.unread)
    return not any(_is_readable(tensor) for tensor in unread if tensor is not None)


def _kinds(tensors: Iterable[Tensor | None]) -> list[_Kind]:
    # Of another tensor that took the place of one that is no more, each can be another; and so it can after `.data =`.
    return [
        (type(tensor), tensor.dtype, tensor.numel(), tensor.is_contiguous()) for tensor in tensors if tensor is not None
    ]


class _ByDevice:
    """Tensors and their names, by device."""

    def __init__(self) -> None:
        self.tensors: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        self.names: defaultdict[torch.device, list[str]] = defaultdict(list)

    def add(self, name: str, tensor: Tensor) -> None:
        """One more."""
        self.tensors[tensor.device].append(tensor)
        self.names[tensor.device].append(name)


def _watched(model: nn.Module, sites: Sequence[Site]) -> set[int]:
    """The watched weights, by `id`: others look at them."""
    located = (locate(model, site) for site in sites)
    return {id(found[1]) for found in located if found is not None}


def _inside(model: nn.Module, sites: Sequence[Site]) -> set[int]:
    """The parameters of the watched layers, by `id`."""
    located = (locate(model, site) for site in sites)
    return {id(parameter) for found in located if found is not None for parameter in found[0].parameters()}


def _is_readable(tensor: Tensor) -> bool:
    return why_unmeasurable(tensor) is None and tensor.layout is torch.strided
