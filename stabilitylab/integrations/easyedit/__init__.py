"""EasyEdit in one line: ``with stabilitylab.integrations.easyedit.watch(editor, run="runs/mend"): editor.edit(...)``.

For its editors and for its trainers of hypernetworks. EasyEdit itself is not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from stabilitylab.errors import UsageError
from stabilitylab.integrations.easyedit.editors import watch_editor
from stabilitylab.integrations.easyedit.layers import edited_layers
from stabilitylab.integrations.easyedit.trainers import is_trainer, watch_trainer
from stabilitylab.watching.monitor import Monitor
from stabilitylab.watching.options import Options, expect_known
from stabilitylab.watching.sites import Patterns

__all__ = ["edited_layers", "watch"]


@contextlib.contextmanager
def watch(
    editor: Any,
    run: str | Path | None = None,
    *,
    sites: Patterns | None = None,
    **options: Unpack[Options],
) -> Iterator[Monitor]:
    """Record every edit that an EasyEdit editor makes, or every step that a trainer makes, inside the ``with`` block.

    editor: any EasyEdit editor (``BaseEditor``, ``MultimodalEditor``, …), or a trainer of a hypernetwork
    (``EditTrainer``, ``MultimodalTrainer``): one step of training is one edit then, and what is edited is the
    hypernetwork. sites: by default the layers that the hyperparameters name, with a trainer the hypernetwork's
    parameters too; else what the first edit moves. The other arguments are those of `stabilitylab.attach`. Whether
    edits are single or sequential is read from the call: of single ones, weights that nobody puts back are named as
    the cause. ROME's u, k and v* live inside its functions and are not seen; a loop that has them can report them, see
    `EditorReport`.
    Raises UsageError for an object of another kind, or one that has no model, and what `attach` raises.
    """
    expect_known(options)
    if is_trainer(editor):
        host = watch_trainer(editor, sites, run, options)
    elif hasattr(editor, "apply_algo") and hasattr(editor, "model"):
        host = watch_editor(editor, sites, run, options)
    else:
        lacks = "model" if hasattr(editor, "apply_algo") else "apply_algo"
        raise UsageError(
            f"{type(editor).__name__} has no '{lacks}'; expected an EasyEdit editor such as BaseEditor, or a trainer "
            "such as EditTrainer"
        )
    with host as monitor:
        yield monitor
