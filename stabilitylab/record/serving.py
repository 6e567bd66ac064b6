"""Which layers a part of the editor serves, as a note: written where it is seen, read where it is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SERVES: Final = "editor-layers"
"""The kind of such a note."""
_SERVES: Final = " serves "
_NAMED: Final = 3


def serving_says(site: str, layers: Sequence[str]) -> str:
    """The note that the editor's part at `site` serves these layers, one or more; the first of them by name."""
    more = len(layers) - _NAMED
    return f"{site}{_SERVES}{', '.join(layers[:_NAMED])}{f' and {more} more' if more > 0 else ''}"


def read_serving(says: str) -> tuple[str, str] | None:
    """(the site, its layers in words) of such a note; None for another sentence."""
    site, found, layers = says.rpartition(_SERVES)
    return (site, layers) if found and site and layers else None
