"""What an editor is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Editor(Protocol):
    """Edits a model; the model that comes back may be the same object, changed in place."""

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """The model with `request` carried out."""
        ...
