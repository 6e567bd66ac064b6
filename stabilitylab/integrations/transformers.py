"""transformers' Trainer in one line: ``Trainer(..., callbacks=[StabilityCallback("runs/ft", sites="*.down_proj")])``.

transformers itself is not imported: a Trainer calls its callbacks by the names of its events, and asks for no base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from stabilitylab.watching.attaching import attach
from stabilitylab.watching.monitor import Edit, Monitor
from stabilitylab.watching.options import Options, expect_known
from stabilitylab.watching.sites import Patterns
from stabilitylab.watching.spread import is_spread

__all__ = ["StabilityCallback"]


class StabilityCallback:
    """Records every optimizer step of a Trainer as one edit, its accumulation and its clipping included.

    | event | what happens |
    |---|---|
    | ``on_train_begin`` | the run begins; one that an exception left open ends first, its open edit as failed |
    | ``on_step_begin`` | an edit begins, called "step N" by the Trainer's own count |
    | ``on_step_end`` | it ends, before the Trainer logs, evaluates and saves |
    | ``on_train_end`` | the run ends |

    A Trainer has no event for exceptions: after one, call `close`, or train again. Trained again, or in a script that
    is started again (``resume_from_checkpoint``), the run goes on in the next free folder, ``run-2``, which is said.
    Of several processes the first one watches; where weights are spread over them, all do, and one writes.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        sites: Patterns | None = None,
        **options: Unpack[Options],
    ) -> None:
        """The arguments are those of `stabilitylab.attach`; what is wrong with one is raised as training begins.

        Raises UsageError for one that it has not.
        """
        expect_known(options)
        self.monitor: Monitor | None = None
        """Of the training that is under way, or of the last one."""
        self._edit: Edit | None = None
        self._run, self._sites = run, sites
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **held: Any) -> None:
        """Attach to the Trainer's model, and read its loss scaler where it has one."""
        self.close()
        if state.is_world_process_zero or any(map(is_spread, model.parameters())):
            scaler = getattr(held.get("optimizer"), "scaler", None)
            editor = None if scaler is None else {"scaler": scaler}
            self.monitor = attach(model, self._sites, self._run, editor=editor, resume=True, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An edit begins."""
        if self.monitor is not None:
            self._edit = self.monitor.edit(f"step {state.global_step + 1}").__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """It ends."""
        if self._edit is not None:
            self._edit.end(None)
            self._edit = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The run ends."""
        self.close()

    def close(self) -> None:
        """End the run, and as failed an edit that is still open. Idempotent."""
        self._edit = None
        if self.monitor is not None:
            self.monitor.close()

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Every other event, those of later releases too, says nothing of edits."""
        if not event.startswith("on_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {event!r}")
        return lambda *_, **__: None
