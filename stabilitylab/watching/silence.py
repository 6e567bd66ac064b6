"""Whether the edits run the model that is watched: hooks that never fire see nothing, and say nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final

from stabilitylab.record.note_kinds import HOOKS_SILENT, LAYER_SILENT, NEVER_RUN
from stabilitylab.watching.compiled import frames_compiled

FEWEST: Final = 3
"""Edits without a sound, from the first on, that are no accident."""
COMPILED: Final = "compiled"
"""The kind of the note that layers can't be looked into, of a run whose canary watches what the model does."""


class Silence:
    """Listens to whether anything was heard inside the edits; says once that nothing was."""

    def __init__(self, has_canary: bool) -> None:
        self._has_canary = has_canary
        self._silent = 0
        self._compiled = frames_compiled()
        self._moved = False
        self._over = False

    def after(
        self, compiled: Mapping[str, str], heard: bool, heard_itself: bool, moved: bool
    ) -> tuple[str, str] | None:
        """An edit was made with hooks on the model's layers. compiled: those that can't be hooked, see `Capture`.
        heard: whether it ran any of the model, or of a copy of it. heard_itself: of the model itself. moved: whether it
        moved a watched weight. Returns the note to take: (kind, what it says).
        """
        if self._over:
            return None
        self._silent, self._moved = self._silent + 1, self._moved or moved
        # A copy that is run may be what is handed over in the end; one that never is, is another model.
        self._over = heard_itself or (heard and self._moved)
        before, self._compiled = self._compiled, frames_compiled()
        # What was compiled in this very edit is no accident.
        patience = FEWEST if self._compiled == before else 1
        if compiled or (self._moved and self._silent >= patience and not heard and self._compiled > 0):
            self._over = True
            return COMPILED if self._has_canary else HOOKS_SILENT, _compiled_says(compiled)
        if self._over or self._silent < FEWEST:
            return None
        self._over = True
        return self._says(heard)

    def _says(self, heard: bool) -> tuple[str, str] | None:
        edits = f"in {self._silent} edits"
        if not self._moved:
            never = f"{edits} the watched model was never run, and no watched layer moved"
            if heard:
                return NEVER_RUN, f"{never}: they are made on copies of it that are not handed over (edit.returns)"
            return NEVER_RUN, f"{never}: they are made on another model, or on other layers by hand"
        if self._has_canary:  # which watches the function all the same
            return None
        return HOOKS_SILENT, f"{edits} no hook on the watched layers fired: what happens inside the edits is not seen"


def _compiled_says(layers: Mapping[str, str]) -> str:
    seen = "not seen; its weights, and the .grad that an optimizer steps with, are"
    if not layers:
        return (
            "no hook on the watched layers fired, and torch.compile is in use: what compiled code computes inside is "
            f"{seen}"
        )
    first, more = next(iter(layers)), f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    compiled = ", ".join(dict.fromkeys(layers.values()))
    return f"{first}{more}: compiled ({compiled}), so that what is computed inside is {seen}"


class Unanswered:
    """Listens to single layers: whose weight moves while no call of it is seen. Says so once of each."""

    def __init__(self) -> None:
        self._edits: dict[str, int] = {}

    def after(self, unanswered: Mapping[str, bool], moved: Set[str]) -> tuple[str, str] | None:
        """An edit ran the model. unanswered: the sites whose hooks saw nothing that could be read, and whether they
        were called inside ``vmap``. moved: the sites whose weight it changed. Returns the note to take.
        """
        said = {site: count for site, count in self._edits.items() if count >= FEWEST}
        # Of what runs inside vmap it is known at once why.
        counts = {
            site: max(self._edits.get(site, 0) + 1, FEWEST if batched else 0)
            for site, batched in unanswered.items()
            if site in moved
        }
        new = [site for site, count in counts.items() if count >= FEWEST and site not in said]
        self._edits = counts | said
        if not new:
            return None
        why = (
            ": they run inside vmap, where each value is many in one"
            if any(unanswered[site] for site in new)
            else f" in {FEWEST} edits: no call of the layers themselves was seen, as where a fused operation takes"
            " their weights"
        )
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        return LAYER_SILENT, (
            f"{new[0]}{more}: their weights are measured, but no activation and no gradient spectrum{why}"
        )
