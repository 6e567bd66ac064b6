"""Which watched layers an editor's part serves that is named by a shape: one hypernetwork for all layers of that shape.

EasyEdit's MEND, MALMEN and UltraEdit name it by (inputs, outputs), as in ``mend.(256, 64)``, this package's editors by
the weight, as in ``transforms.64x256``. Knows shapes and names, and no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from stabilitylab.watching.sites import Site

_SHAPE: Final = re.compile(r"(?:[(\[](\d+), ?(\d+),?[)\]]|(?<!\w)(\d+)x(\d+)(?!\w))")


def layers_behind(name: str, parts: Sequence[int], sites: Sequence[Site]) -> tuple[str, ...]:
    """The watched layers that a part of the editor serves, in their order; none where its name holds no shape.

    name: the part's. parts: how many units it keeps of a layer's inputs and of its outputs, where it tells them apart;
    they say which way round the shape is meant. Where no layer is that way round, either way will do.
    """
    shape = _SHAPE.search(name)
    if shape is None:
        return ()
    first, second = (int(size) for size in shape.groups() if size is not None)
    meant = tuple(parts) if sorted(parts) == sorted((first, second)) else (first, second)
    exact = tuple(site.name for site in sites if _flow(site) == meant)
    return exact or tuple(site.name for site in sites if sorted(site.shape) == sorted(meant))


def _flow(site: Site) -> tuple[int, ...] | None:
    """(inputs, outputs) of a layer; None where its tensor is no matrix between them."""
    if site.orientation == "out_in":
        return tuple(reversed(site.shape))
    return site.shape if site.orientation == "in_out" else None
