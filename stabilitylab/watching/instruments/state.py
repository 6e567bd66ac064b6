"""Everything in the model but the watched weights: is it finite?"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stabilitylab.probes.state_pass import BadTensor, StatePass, count_bad, state_of
from stabilitylab.probes.weight_pass import extremes
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.sites import Site, locate, why_unmeasurable
from stabilitylab.watching.walking import named_tensors_of

_NAMED = 3


class StateInstrument:
    """Looks in full at what was written to, at one more tensor an edit in turn, and at everything when told to."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._designed: set[str] = set()
        self._written: dict[str, tuple[int, int]] = {}
        self._turn = 0
        self._in_full = True

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
        self.after(model, sites)

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

    def after(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Look, after an edit."""
        if self.wanted:
            self._bench.safely("the model's state", lambda: self._look(model, sites))

    def _look(self, model: nn.Module, sites: Sequence[Site]) -> None:
        held = list(self._state(model, sites))
        if not held:
            return
        self._turn = (self._turn + 1) % len(held)
        whole, sampled = _ByDevice(), _ByDevice()
        for place, (name, tensor) in enumerate(held):
            sign = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            full = self._in_full or self._written.get(name) != sign or place == self._turn
            self._written[name] = sign
            (whole if full or not tensor.is_contiguous() else sampled).add(name, tensor)
        self._in_full = False
        devices = list(dict.fromkeys((*whole.tensors, *sampled.tensors)))
        counts = [count_bad(whole.tensors[device], sampled.tensors[device]) for device in devices]
        names = [name for device in devices for name in (*whole.names[device], *sampled.names[device])]
        packed = torch.cat([count.to(devices[0]) for count in counts])
        self._bench.add(MODEL_SITE, packed, functools.partial(state_of, names=names))

    def _state(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, Tensor]]:
        watched = _watched(model, sites)
        for name, tensor in named_tensors_of(model):
            if id(tensor) not in watched and name not in self._designed and _is_readable(tensor):
                yield name, tensor


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


def _is_readable(tensor: Tensor) -> bool:
    return why_unmeasurable(tensor) is None and tensor.layout is torch.strided
