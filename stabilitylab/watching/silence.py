"""Whether the edits run the model that is watched: hooks that never fire see nothing, and say nothing of it."""

from __future__ import annotations

from typing import Final

from torch import nn

from stabilitylab.record.note_kinds import HOOKS_SILENT, NEVER_RUN

FEWEST: Final = 3
"""Edits without a sound, from the first on, that are no accident."""


class Silence:
    """Listens to whether anything was heard inside the edits; says once that nothing was."""

    def __init__(self, has_canary: bool) -> None:
        self._has_canary = has_canary
        self._silent = 0
        self._moved = False
        self._over = False

    def after(self, model: nn.Module, heard: bool, moved: bool) -> tuple[str, str] | None:
        """An edit was made with hooks on the model's layers. heard: whether it ran any of the model. moved: whether it
        moved a watched weight. Returns the note to take: (kind, what it says).
        """
        if self._over:
            return None
        self._over = heard
        self._silent, self._moved = self._silent + 1, self._moved or moved
        if self._over or self._silent < FEWEST:
            return None
        self._over = True
        edits = f"in {self._silent} edits"
        if not self._moved:
            return NEVER_RUN, f"{edits} the watched model was never run and never moved: they are made on another one"
        if _is_compiled(model):
            return HOOKS_SILENT, (
                f"{edits} no hook on the watched layers fired: a compiled graph runs past them. Attach before"
                " torch.compile, or compile with fullgraph off and after the first edit"
            )
        if self._has_canary:  # which watches the function all the same
            return None
        return HOOKS_SILENT, f"{edits} no hook on the watched layers fired: what happens inside the edits is not seen"


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
