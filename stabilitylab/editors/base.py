"""What an editor is, and what it asks of whoever has the requests (a testbed, or a user's own loop)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Part = Literal["train", "validation"]
Batch = Mapping[str, Any]
"""Arguments of ``model(**batch)``; it answers with ``.logits`` [rows, tokens, words] and, given labels, ``.loss``."""
Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is measured)."""


def quiet(done: int, steps: int, says: str) -> None:
    """Progress that is shown to nobody."""


@dataclass(frozen=True, eq=False)
class Located:
    """A request as the editors see it that work at one token of the prompt (ROME, MEMIT, AlphaEdit).

    batch: R rows with labels: the prompt, each row behind another prefix (the first without), followed by the wanted
    answer. subject: long [R], in each row the position of the subject's last token, where the edit takes place. kept:
    rows without labels whose prediction at the last position should not change ("{subject} is a"), or None.
    kept_subject: long [rows of kept], as `subject`.
    """

    batch: Batch
    subject: Tensor
    kept: Batch | None = None
    kept_subject: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Example:
    """One step of training: an edit, what should follow from it, and what should stay as it was.

    Of an answer of several tokens the first one is trained on; the others follow from it, or don't.
    """

    edit: Batch
    """With labels: the edit itself."""
    asked: Batch
    """Without labels, left-padded: rows whose last position predicts the answer: `wanted` first, then the kept."""
    wanted: Tensor
    """Token numbers [W] that the first W rows of `asked` should give after the edit."""


class Prompts(Protocol):
    """How requests become the model's arguments. A testbed has one; a user's loop may write its own."""

    def edit_batch(self, request: Any) -> Batch:
        """One row, with labels at the wanted answer and -100 elsewhere: the loss of it is what editing lowers."""
        ...

    def located(self, request: Any) -> Located:
        """The request for the editors that work at one token of the prompt."""
        ...

    def examples(self, seed: int, part: Part = "train") -> Iterator[Example]:
        """Endless examples, of requests that no stream of edits holds.

        part: those to train on, or the others, about other subjects, to choose the best state by.
        """
        ...

    def texts(self) -> Iterator[Batch]:
        """Ordinary text, rows without labels: what the keys of the edited layers look like in general."""
        ...


@runtime_checkable
class Editor(Protocol):
    """Edits a model."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the layers that it edits: what to watch."""
        ...

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """The model with `request` carried out; it may be the same object, changed in place.

        One request. MALMEN, MEMIT and AlphaEdit also take a list of them, to be carried out together.
        """
        ...


@runtime_checkable
class Remembering(Editor, Protocol):
    """An editor that knows the weights its last edit left, and takes other ones for a model that was restored."""

    def take_over(self, model: nn.Module) -> None:
        """Take the weights in `model` for those that the last edit left."""
        ...


@runtime_checkable
class Prepared(Editor, Protocol):
    """An editor that must see data before its first edit: it trains a hypernetwork, or gathers statistics of keys."""

    file: str
    """The file name of its state, such as ``mend.safetensors``."""

    @property
    def learned_with(self) -> Mapping[str, Any]:
        """The settings that what it learns hangs on, as plain values: a state of others must not be taken for it."""
        ...

    def prepare(self, model: nn.Module, prompts: Prompts, *, seed: int, progress: Progress = quiet) -> None:
        """Learn what it needs; the model is left as it was."""
        ...

    def save(self, folder: str | Path) -> Path:
        """Write the state as safetensors into `folder`, whole or not at all; returns the file."""
        ...

    def restore(self, folder: str | Path) -> None:
        """Take over the state that `save` wrote.

        Raises:
            UsageError: no such file, not one of this editor's, or one of layers of another shape.
        """
        ...
