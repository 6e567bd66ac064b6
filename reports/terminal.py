"""The door to a terminal: whatever is shown there goes through here, and nothing in it steers the terminal.

What is shown is cleaned where it is put together, too, since there it is known how long it may be.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

from stabilitylab.record.spelling import spelled


class Shown:
    """Something to be shown, with every control and bidirectional character in its text spelled out."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            plain = segment.control is not None  # Rich's own, such as a cursor that is moved
            yield segment if plain else Segment(spelled(segment.text, "\n"), segment.style)


def show(console: Console, what: RenderableType, **settings: Any) -> None:
    """Print it. settings: of `Console.print`."""
    console.print(Shown(what), **settings)
