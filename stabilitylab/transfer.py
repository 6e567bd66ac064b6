"""Small device tensors to the host in one copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.readings import Array

Rebuild = Callable[[Array], Any]


class Stack:
    """Collects packed measurements and brings them to the host together: one copy, and one wait, per device."""

    def __init__(self) -> None:
        self._items: list[tuple[str, Tensor, Rebuild]] = []

    def add(self, site: str, packed: Tensor, rebuild: Rebuild) -> None:
        """packed: 1-d float64. rebuild: turns its values, on the host, into the measurement that probes read."""
        self._items.append((site, packed, rebuild))

    def take(self) -> list[tuple[str, Any]]:
        """(site, measurement) of everything collected, in the order of collection; the stack is empty afterwards."""
        items, self._items = self._items, []
        host: dict[int, Array] = {}
        for device in {packed.device for _, packed, _ in items}:
            here = [at for at, (_, packed, _) in enumerate(items) if packed.device == device]
            values = torch.cat([items[at][1] for at in here]).cpu().numpy()
            ends = np.cumsum([items[at][1].numel() for at in here])
            host.update(zip(here, np.split(values, ends[:-1]), strict=True))
        return [(site, rebuild(host[at])) for at, (site, _, rebuild) in enumerate(items)]
