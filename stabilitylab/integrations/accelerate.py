"""accelerate in two lines: ``watched = watch(accelerator, model, run="runs/ft")``, ``for batch in watched(loader):``.

accelerate itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import nn
from typing_extensions import Unpack

from stabilitylab.watching.attaching import attach
from stabilitylab.watching.monitor import Edit, Monitor
from stabilitylab.watching.options import Options, expect_known
from stabilitylab.watching.sites import Patterns
from stabilitylab.watching.spread import is_spread

__all__ = ["Watched", "watch"]

T = TypeVar("T")


def watch(
    accelerator: Any,
    model: nn.Module,
    run: str | Path | None = None,
    *,
    sites: Patterns | None = None,
    **options: Unpack[Options],
) -> Watched:
    """Attach to a model that accelerate has prepared; hand the loop's batches through what is returned.

    accelerator: an ``accelerate.Accelerator``; its loss scaler is read. model: what its ``prepare`` returned. The other
    arguments are those of `stabilitylab.attach`, which says what it raises. Started again, the run goes on in the next
    free folder, ``run-2``, which is said. Of several processes the first one watches; where weights are spread over
    them, all do, and one writes.
    """
    expect_known(options)
    inner = accelerator.unwrap_model(model)
    if not (accelerator.is_main_process or any(map(is_spread, inner.parameters()))):
        return Watched(accelerator, None)
    scaler = getattr(accelerator, "scaler", None)
    editor = None if scaler is None else {"scaler": scaler}
    return Watched(accelerator, attach(inner, sites, run, editor=editor, resume=True, **options))


class Watched:
    """The loop of one accelerator: each optimizer step, with the batches that it accumulates, is one edit.

    What ``accelerator.accumulate`` says decides: a loop that counts its batches by itself has an edit for each.
    """

    def __init__(self, accelerator: Any, monitor: Monitor | None) -> None:
        self.monitor = monitor
        """None in a process that does not watch."""
        self._accelerator = accelerator
        self._edit: Edit | None = None
        self._steps = 0

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches. An edit begins with the first one of a step, before it is handed out, and ends when the
        loop asks for the next one after it; after a ``break``, with the next such loop or the run.
        """
        self._end_where_stepped()
        for batch in batches:
            if self.monitor is not None and self._edit is None:
                self._steps += 1
                self._edit = self.monitor.step(f"step {self._steps}")
            yield batch
            self._end_where_stepped()

    def _end_where_stepped(self) -> None:
        if self._edit is not None and self._accelerator.sync_gradients:
            self._edit.end(None)
            self._edit = None

    def close(self) -> None:
        """End the run, and an edit that is still open. Idempotent."""
        if self.monitor is not None:
            self.monitor.close()

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.monitor is not None:
            self.monitor.__exit__(kind, error, traceback)
