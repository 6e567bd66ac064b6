"""The user's cache: what is made once and can be made again, such as converted models and trained editors."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "STABILITYLAB_CACHE"


def cache_folder() -> Path:
    """``$STABILITYLAB_CACHE``, else ``stabilitylab`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It need not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stabilitylab"
