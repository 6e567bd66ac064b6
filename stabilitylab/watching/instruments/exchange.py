"""Figures of weights that are spread over processes: each knows its part, and one exchange makes those of the whole."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from stabilitylab.probes.weight_pass import on_cpu
from stabilitylab.record.note_kinds import EXCHANGE_OFF
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.rendezvous import AT_THE_END, MUST_COME, Rendezvous
from stabilitylab.watching.spread import Spread

How = Literal["norm", "sum", "least", "most", "first"]
"""How the parts' figures make that of the whole: by the root of the sum of their squares, …; ``first``: it is the same
of all parts, or one process decides."""

_COMBINED: Final[dict[How, Callable[[Tensor], Tensor]]] = {
    "norm": lambda parts: torch.linalg.vector_norm(parts, dim=0),
    "sum": lambda parts: parts.sum(dim=0),
    "least": lambda parts: parts.amin(dim=0),
    "most": lambda parts: parts.amax(dim=0),
    "first": lambda parts: parts[0],
}
NOTHING: Final[dict[How, float]] = {"norm": 0.0, "sum": 0.0, "least": torch.inf, "most": -torch.inf, "first": 0.0}
"""What a process has to say that holds an empty part."""


_WHAT: Final = "exchange"


@dataclass(frozen=True, eq=False)
class _Item:
    what: str
    spread: Spread
    part: Tensor
    how: tuple[How, ...]
    then: Callable[[Tensor], None]


class Exchange:
    """Collects what this process knows, and combines it with what the others know, all at once.

    All processes must add the same things in the same order, and settle at the same times. What one of them failed to
    measure is measured of none.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._items: list[_Item] = []
        self._ranks: set[int] = set()
        self._over: Spread | None = None
        self._rendezvous: Rendezvous | None = None
        self.settled = True
        """Whether all processes were there the last time, so that they can do something else together."""

    def joins(self, spread: Spread) -> None:
        """Something that is watched is spread over these processes."""
        self._ranks.update(spread.ranks)
        self._over = spread

    def leaves(self) -> None:
        """No more is exchanged. Waits for nobody."""
        if self._rendezvous is not None:
            self._bench.off.setdefault(_WHAT, "it has ended")
            with contextlib.suppress(Exception):  # nobody may be there to tell
                self._rendezvous.leaves()

    def stays_away(self) -> None:
        """The edit has failed here, and maybe not elsewhere: nothing is exchanged this time, by anyone."""
        self._items, self.settled = [], not self._ranks
        if self._ranks:
            self._bench.safely(_WHAT, lambda: self._meeting().stays_away())

    def _meeting(self) -> Rendezvous:
        import torch.distributed as dist

        if self._rendezvous is None:
            assert self._over is not None
            store = dist.distributed_c10d._get_default_store()
            self._rendezvous = Rendezvous(store, dist.get_rank(), sorted(self._ranks), self._over.timeout)
        return self._rendezvous

    def add(
        self,
        what: str,
        spread: Spread,
        measure: Callable[[], Tensor | None],
        how: Sequence[How],
        then: Callable[[Tensor], None],
    ) -> None:
        """measure: gives the figures of this process's part, 1-d float64, one for each of `how`; None: it is empty.
        then: gets those of the whole, on the device.
        """
        home: Any = {"dtype": torch.float64, "device": spread.device}
        found = self._bench.safely(what, lambda: (measure(),))
        if found is None:  # it failed
            part = torch.zeros(1 + len(how), **home)
        else:
            own = (
                torch.tensor([NOTHING[each] for each in how], **home)
                if found[0] is None
                else found[0].to(spread.device)
            )
            part = torch.cat([torch.ones(1, **home), own])
        self._items.append(_Item(what, spread, part, ("least", *how), then))

    def settle(self, place: str, *, at_the_end: bool = False) -> None:
        """Combine what was collected: one collective for each dimension that its weights are spread along.

        place: where in the loop all processes must be, as in "the end of edit 5". at_the_end: nothing may follow, so
        that others may be gone.
        """
        if not self._ranks:
            return
        items, self._items = self._items, []
        figures = sum(len(item.how) for item in items)
        kind = "probe-off" if at_the_end else EXCHANGE_OFF
        patience = AT_THE_END if at_the_end else MUST_COME
        self.settled = bool(
            self._bench.safely(_WHAT, lambda: self._meeting().all_at(place, figures, patience), kind=kind)
        )
        if not self.settled:
            return
        for key in dict.fromkeys(item.spread.key for item in items):
            mine = [each for each in items if each.spread.key == key]
            self._bench.safely(_WHAT, functools.partial(self._settle, mine), kind=kind)

    def _settle(self, items: Sequence[_Item]) -> None:
        whole = _combined(
            torch.cat([item.part for item in items]), [how for item in items for how in item.how], items[0].spread
        )
        for item, found in zip(items, torch.split(whole, [len(item.how) for item in items]), strict=True):
            if item.what not in self._bench.off:
                self._bench.safely(item.what, lambda: _handed_on(item, found))  # noqa: B023


def _handed_on(item: _Item, found: Tensor) -> None:
    if on_cpu(found) and found[0].item() != 1:
        raise RuntimeError("another process could not measure its part")
    item.then(torch.where(found[0] == 1, found[1:], torch.nan))


def _combined(mine: Tensor, how: Sequence[How], spread: Spread) -> Tensor:
    import torch.distributed as dist

    places = {each: [at for at, one in enumerate(how) if one == each] for each in dict.fromkeys(how)}
    for dim in spread.dims:
        group = spread.mesh.get_group(dim)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        together, mine = torch.stack(parts), torch.empty_like(mine)
        for each, at in places.items():
            mine[at] = _COMBINED[each](together[:, at])
    return mine
