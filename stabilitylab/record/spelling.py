"""Text in which nothing is hidden: what steers a terminal or turns round what is read is spelled out; logs too."""

from __future__ import annotations

import logging
import unicodedata
from typing import Final

_JOINERS: Final = "\u200c\u200d"
"""Format characters that words and emoji are spelled with; all others of their kind can only mislead."""

_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def spelled(text: str, keep: str = "") -> str:
    """`text` with control, bidirectional, zero-width, unassigned and surrogate characters spelled out (``\\u202e``).

    keep: characters that stay.
    """
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in _HIDDEN and char not in _JOINERS and char not in keep
        else char
        for char in text
    )


def spell(record: logging.LogRecord) -> bool:
    """A filter of loggers: what is logged holds names of folders and words of exceptions, which are anyone's."""
    record.msg, record.args = spelled(record.getMessage(), "\n\t"), ()
    return True


logger: Final = logging.getLogger("stabilitylab")
"""Of all stations."""
logger.addFilter(spell)
