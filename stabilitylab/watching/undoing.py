"""A dry edit: whatever it changes is put back when it is over, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from stabilitylab.errors import EditError
from stabilitylab.watching.one_hook import logger
from stabilitylab.watching.snapshot import Snapshot

_NAMED: Final = 3
"""How many of the things that could not be put back a message names."""


@contextmanager
def undone(before: Snapshot, number: int, *, otherwise: str) -> Iterator[None]:
    """What is done inside is put back to `before`; what is raised inside passes through after that.

    number: of the dry edit, for the message. otherwise: what to do where it can't be put back.

    Raises:
        EditError: something was not bit for bit as before after it was put back.
    """
    try:
        yield
    except BaseException:
        left = before.put_back()
        if left:  # what the user's own code raised is what they must see
            logger.warning("stabilitylab: %s", _differs(number, left, otherwise))
        raise
    left = before.put_back()
    if left:
        raise EditError(_differs(number, left, otherwise))


def _differs(number: int, left: Sequence[str], otherwise: str) -> str:
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    names = ", ".join(repr(name or "the model's attributes") for name in left[:_NAMED])
    return (
        f"dry edit {number} can't be undone: {names}{more} could not be put back as before it; expected an edit that "
        f"changes tensors and attributes only; load the model anew and {otherwise}"
    )
