"""An attribute that is replaced for as long as a host is watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(holder: Any, name: str, by: Any) -> Iterator[None]:
    """An attribute of an object, for as long as this lasts; then it is found where it was found before."""
    own = name in vars(holder)
    original = getattr(holder, name)
    setattr(holder, name, by)
    try:
        yield
    finally:
        setattr(holder, name, original) if own else delattr(holder, name)
