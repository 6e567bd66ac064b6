"""The reference copies of the watched weights, W₀ and W₋, and what became of an edit as they show it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.weight_pass import (
    Scanned,
    WeightPass,
    on_cpu,
    pass_at_rest,
    reduce_weight,
    same_bits,
    same_sample,
)
from stabilitylab.probes.weight_pieces import InPieces, reduce_pieces
from stabilitylab.record.readings import OutcomeKind
from stabilitylab.watching.sites import Site

Home = Literal["device", "pinned", "host"]
"""Where the copies are kept: beside the weight, or in the host's memory, pinned or not, and sent over when needed."""
HOMES: tuple[Home, ...] = get_args(Home)

Signature = tuple[float, float, float, float]
"""(‖W‖, ‖W−W₀‖, min, max): the same bits give the same signature, and no two states of a run share one by chance."""


def signature(seen: WeightPass) -> Signature:
    """What `seen` says of which state the weight is in."""
    return (seen.norm, seen.drift, seen.low, seen.high)


def _same(left: Signature, right: Signature) -> bool:
    return bool(np.array_equal(left, right, equal_nan=True))


def _nothing() -> None:
    """In place of a tensor."""


@dataclass
class _Copies:
    """previous: the same tensor as `original` until the weight is seen to move. at_rest: what a pass over W₀ finds."""

    original: Tensor
    previous: Tensor
    at_rest: Tensor
    mark: tuple[object, ...]
    """Where W was, and its version, when `previous` took its values."""
    is_part: bool
    seen: Callable[[], Tensor | None] = _nothing
    """Which tensor it was: one that is computed anew each time, as with adapters, may lie where the last one lay."""
    before: Signature | None = None
    after: Signature | None = None


def _mark(weight: Tensor) -> tuple[object, ...]:
    version = None if weight.is_inference() else weight._version
    return (weight.data_ptr(), version, weight.dtype, weight.device, weight.stride())


class References:
    """Two copies of each watched weight, in its dtype and on its device: before any edit, and before this edit.

    On a CPU they are one as long as the weight has never moved. Kept on the host, those of a weight on an accelerator
    are there for as long as they are compared with it, one weight after the other.
    """

    def __init__(self, home: Home = "device") -> None:
        self._home = home
        self._copies: dict[str, _Copies] = {}

    def adopt(self, site: Site, original: Tensor, *, is_part: bool = False) -> None:
        """Take `original` as W₀ and W₋ of a site. is_part: whether it is this process's part of a weight alone."""
        with torch.no_grad():
            first = original.detach().clone(memory_format=torch.contiguous_format)
            at_rest = pass_at_rest(first)
            kept = self._sent_home(first) if self._is_away(original) else first
            self._copies[site.name] = _Copies(kept, kept, at_rest, _mark(original), is_part)

    def _is_away(self, weight: Tensor) -> bool:
        """Whether the copies of a weight are elsewhere than it is."""
        return self._home != "device" and not on_cpu(weight)

    def _sent_home(self, tensor: Tensor) -> Tensor:
        """A copy in the host's memory; nothing waits for it where that is pinned."""
        pinned = self._home == "pinned"
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return kept.copy_(tensor, non_blocking=pinned)

    def at_rest(self, name: str) -> Tensor:
        """What a pass over W₀ finds, packed as `WeightPass` unpacks it: W is W₀."""
        return self._copies[name].at_rest

    def _on(self, name: str, weight: Tensor) -> _Copies:
        """The copies, moved after the weight when the user moved the model."""
        copies = self._copies[name]
        if self._is_away(weight):
            copies.at_rest = copies.at_rest.to(weight.device)
        elif copies.original.device != weight.device:
            one = copies.previous is copies.original
            copies.original = copies.original.to(weight.device)
            copies.previous = copies.original if one else copies.previous.to(weight.device)
            copies.at_rest = copies.at_rest.to(weight.device)
        return copies

    def holds(self, name: str) -> bool:
        """Whether there are copies of all of this site's weight."""
        return name in self._copies and not self._copies[name].is_part

    def original(self, name: str, weight: Tensor) -> Tensor:
        """W₀, on the device of the weight."""
        return self._beside(weight, self._on(name, weight).original)

    def _beside(self, weight: Tensor, kept: Tensor) -> Tensor:
        return kept.to(weight.device, non_blocking=True, copy=True) if self._is_away(weight) else kept

    def previous(self, name: str, weight: Tensor) -> Tensor:
        """W₋, on the device of the weight."""
        return self._beside(weight, self._on(name, weight).previous)

    def last(self, name: str) -> Tensor:
        """W as the last pass over it found it, where the copy of that is kept."""
        return self._copies[name].previous

    def measure(self, name: str, weight: Tensor | InPieces, want_change: bool = False) -> Scanned:
        """One pass over the weight, packed as `WeightPass` unpacks it; W₋ takes its values."""
        if isinstance(weight, InPieces):
            return self._measure_pieces(name, weight, want_change)
        copies = self._on(name, weight)
        if copies.previous is copies.original:
            same = on_cpu(weight) and weight.dtype == copies.original.dtype and same_bits(weight, copies.original)
            if same:
                copies.mark = _mark(weight)
                return Scanned(copies.at_rest, float(copies.at_rest[3]))
            copies.previous = self._sent_home(copies.original) if self._is_away(weight) else copies.original.clone()
        first, before = (self._beside(weight, kept) for kept in (copies.original, copies.previous))
        seen = reduce_weight(weight, first, before, copies.at_rest[1], want_change)
        if before is not copies.previous:
            copies.previous.copy_(before, non_blocking=self._home == "pinned")
        if copies.previous.dtype != weight.dtype:  # the user has cast the model
            live = weight.detach().clone(memory_format=torch.contiguous_format)
            copies.previous = self._sent_home(live) if self._is_away(weight) else live
        copies.mark, copies.seen = _mark(weight), weakref.ref(weight)
        return seen

    def _measure_pieces(self, name: str, weight: InPieces, want_change: bool) -> Scanned:
        copies = self._copies[name]
        held = (copies.original, copies.previous)
        if not all(
            on_cpu(each) and each.dtype == weight.dtype for each in held
        ):  # the user has moved or cast the model
            return self.measure(name, weight.whole(), want_change)
        copies.seen = _nothing
        if copies.previous is copies.original:
            if weight.is_same(copies.original):
                return Scanned(copies.at_rest, float(copies.at_rest[3]))
            copies.previous = copies.original.clone()
        return reduce_pieces(weight, copies.original, copies.previous, copies.at_rest[1], want_change)

    def untouched(self, name: str, weight: Tensor) -> bool:
        """Whether the weight shows no sign of a write since `measure`, on a CPU.

        It is the same tensor, its place and its version counter are as they were, and so is a cache line of each row:
        a write through ``weight.data`` leaves the counter alone, and one that misses all of those goes unseen here.
        """
        copies = self._on(name, weight)
        return (
            on_cpu(weight)
            and weight.is_contiguous()
            and copies.seen() is weight
            and copies.mark == _mark(weight)
            and same_sample(weight, copies.previous)  # on a CPU they are beside it
        )

    def moved(self, name: str, weight: Tensor) -> bool:
        """Whether the weight differs from W₋. Synchronises an accelerator."""
        if self.untouched(name, weight):
            return False
        copies = self._on(name, weight)
        return weight.dtype != copies.previous.dtype or not same_bits(weight, self._beside(weight, copies.previous))

    def edited(self, name: str, seen: WeightPass) -> None:
        """Remember the state that an edit left behind."""
        copies = self._copies[name]
        copies.before, copies.after = copies.after, signature(seen)

    def changed_between(self, name: str, seen: WeightPass) -> OutcomeKind | None:
        """What a change between two edits did to the last one; None when it led to a state not seen before."""
        copies = self._copies[name]
        now, copies.after = signature(seen), signature(seen)
        if seen.drift == 0:
            return "restored"
        return "rolled_back" if copies.before is not None and _same(now, copies.before) else None
