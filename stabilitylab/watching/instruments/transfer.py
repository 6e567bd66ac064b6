"""Small device tensors to the host in one copy, at once or later."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stabilitylab.record.readings import Array, Rebuild

_Item = tuple[str, Tensor, Rebuild[Any]]


@dataclass(frozen=True)
class Shipment:
    """Measurements on their way to the host: one copy per device. Nothing waits for it but `arrived`."""

    items: tuple[_Item, ...]
    copies: tuple[tuple[tuple[int, ...], Tensor, torch.cuda.Event | None], ...]
    """(which items, their values on the host, when they will be there) of each device."""

    @property
    def is_here(self) -> bool:
        """Whether nothing of it comes from an accelerator, and so has to be waited for.

        Not whether it happens to have come by now: what is decided on it must not differ from run to run.
        """
        return all(event is None for _, _, event in self.copies)

    @cached_property
    def arrived(self) -> list[Arrived]:
        """Each item sent, in order; waits."""
        host: dict[int, Array] = {}
        for places, values, event in self.copies:
            if event is not None:
                event.synchronize()
            start, whole = 0, values.numpy()
            for at in places:
                end = start + self.items[at][1].numel()
                host[at], start = whole[start:end], end
        return [Arrived(site, rebuild, host[at]) for at, (site, _, rebuild) in enumerate(self.items)]


class Arrived:
    """A measurement on the host, which is made once."""

    __slots__ = ("_made", "_rebuild", "_seen", "_values", "site")

    def __init__(self, site: str, rebuild: Rebuild[Any], values: Array) -> None:
        self.site = site
        self._rebuild = rebuild
        self._values = values
        self._made = False
        self._seen: Any = None

    @property
    def name(self) -> str:
        """What its maker is called, and where it was measured."""
        maker = getattr(getattr(self._rebuild, "func", self._rebuild), "__qualname__", "measurement")
        return f"{maker} of {self.site}"

    def make(self) -> Any:
        """The measurement."""
        if not self._made:
            self._seen, self._made = self._rebuild(self._values), True
        return self._seen


class Stack:
    """Collects packed measurements and sends them to the host together."""

    def __init__(self) -> None:
        self._items: list[_Item] = []

    def add(self, site: str, packed: Tensor, rebuild: Rebuild[Any]) -> None:
        """packed: 1-d float64. rebuild: turns its values, on the host, into the measurement that probes read."""
        self._items.append((site, packed, rebuild))

    def send(self) -> Shipment:
        """Start the copies of everything collected; the stack is empty afterwards."""
        items, self._items = tuple(self._items), []
        copies = []
        for device in dict.fromkeys(packed.device for _, packed, _ in items):
            here = tuple(at for at, (_, packed, _) in enumerate(items) if packed.device == device)
            together = torch.cat([items[at][1] for at in here])
            copies.append((here, *_to_host(together)))
        return Shipment(items, tuple(copies))


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(values on the host, the event that says when they are there; None: they are). Waits only for a device that is
    neither a CPU nor CUDA: no event of it is known.
    """
    if values.device.type != "cuda":
        return values.cpu(), None
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    return pinned, event
