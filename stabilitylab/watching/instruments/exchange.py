"""Figures of weights that are spread over processes: each knows its part, and one exchange makes those of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from stabilitylab.probes.weight_pass import on_cpu
from stabilitylab.watching.instruments.bench import Bench
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

    def settle(self) -> None:
        """Combine what was collected: one collective for each dimension that its weights are spread along."""
        items, self._items = self._items, []
        for key in dict.fromkeys(item.spread.key for item in items):
            self._bench.safely("exchange", lambda: self._settle([each for each in items if each.spread.key == key]))  # noqa: B023

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
