"""A scan's tensors by the block of the model that they are in: what one layer can take, in one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.caution import URGENCIES, Caution, Urgency
from stabilitylab.record.scanned import Scan, TensorScan


@dataclass(frozen=True)
class Block:
    """Tensors that belong together, in the order of the model. urgency: the most urgent warning that is about them."""

    name: str
    tensors: tuple[TensorScan, ...]
    urgency: Urgency | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of its tensors, each once."""
        return tuple(dict.fromkeys(tensor.dtype for tensor in self.tensors))

    @property
    def entries(self) -> int:
        """How many."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def headroom_bits(self) -> float | None:
        """The least of its tensors; None where none is known."""
        return min((bits for tensor in self.tensors if (bits := tensor.headroom_bits) is not None), default=None)

    @property
    def largest(self) -> float | None:
        """The largest magnitude of its finite entries."""
        return max((each.largest for each in self.tensors if each.largest is not None), default=None)

    @property
    def norm(self) -> float:
        """Frobenius, of all its finite entries."""
        return math.hypot(*(tensor.norm for tensor in self.tensors))

    @property
    def nonfinite(self) -> int:
        """Entries that are not finite; −∞ as masks have it counts too."""
        return sum(tensor.nonfinite for tensor in self.tensors)

    @property
    def zero_rows(self) -> int:
        """Outputs whose weights are all 0."""
        return sum(tensor.zero_rows.count for tensor in self.tensors)

    @property
    def outliers(self) -> int:
        """Rows and columns with a norm many times that of the median one."""
        return sum(tensor.loud_rows.count + tensor.loud_columns.count for tensor in self.tensors)

    @property
    def is_edited(self) -> bool:
        """Whether it holds a site."""
        return any(tensor.is_site for tensor in self.tensors)


def block_of(name: str) -> str:
    """The part of a name up to its first number: ``model.layers.2`` of ``model.layers.2.mlp.up_proj.weight``.

    A name without a number stands for itself.
    """
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return name if numbered is None else ".".join(parts[: numbered + 1])


def blocks(scan: Scan, cautions: Sequence[Caution] = ()) -> tuple[Block, ...]:
    """The model by blocks, in its order. A tensor that is in no numbered one is with the others of its layer."""
    held: dict[str, list[TensorScan]] = {}
    home: dict[str, str] = {}
    for tensor in scan.tensors:
        inside = block_of(tensor.name)
        name = (tensor.layer or tensor.name) if inside == tensor.name else inside
        held.setdefault(name, []).append(tensor)
        home[tensor.name] = home[tensor.layer] = home[name] = name
    urgent: dict[str, Urgency] = {}
    for caution in cautions:
        inside = home.get(caution.place, block_of(caution.place))
        urgent[inside] = min(urgent.get(inside, caution.urgency), caution.urgency, key=_RANK.__getitem__)
    return tuple(Block(name, tuple(tensors), urgent.get(name)) for name, tensors in held.items())


_RANK: Final = {urgency: place for place, urgency in enumerate(URGENCIES)}
