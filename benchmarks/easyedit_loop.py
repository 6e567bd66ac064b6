"""EasyEdit's own `edit` as a row of the benchmark, where a checkout of it is at hand: see `tests/easyedit_hosts.py`.

Its loop is watched as a user of it does, by `stabilitylab.integrations.easyedit.watch`, which opens an edit around
what applies it. What `edit` does besides, evaluating before and after, is part of the loop, watched or not.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.workloads import CONTROL, Subject, Workload, twin, weight_of
from stabilitylab.integrations.easyedit import watch
from tests import easyedit_hosts as hosts

_LAYER: Final = 10
_SITE: Final = f"transformer.h.{_LAYER}.mlp.c_proj"
_CANARY: Final = (4, 16)  # rows x positions


def _editor(seed: int, folder: Path) -> Any:
    """FT of 25 steps on a GPT-2-small shape with random weights. Raises ImportError without EasyEdit."""
    reason = hosts.missing()
    if reason:
        raise ImportError(reason)
    from easyeditor import BaseEditor, FTHyperParams  # type: ignore[import-not-found,unused-ignore]

    path = hosts.model_folder(folder / "gpt2", steps=0)
    words = len(AutoTokenizer.from_pretrained(path))
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(vocab_size=words, bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    file = hosts.hparams_file(folder, "FT", path, layers=[_LAYER], batch_size=1, num_steps=25)
    return BaseEditor.from_hparams(FTHyperParams.from_hparams(file))


@contextlib.contextmanager
def _elsewhere() -> Iterator[Path]:
    """In a folder of its own: EasyEdit writes logs and results where it is run."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def easyedit_ft25(seed: int) -> Callable[[], Subject]:
    """Twins of one editor, each with a model of its own; each edit begins from the same weights."""
    with _elsewhere() as folder:
        first = _editor(seed, folder)
    vocabulary = first.model.get_input_embeddings().num_embeddings
    canary = torch.randint(0, vocabulary, _CANARY)

    def make() -> Subject:
        editor = copy.copy(first)
        editor.model = twin(first.model, (_SITE,))
        weight, trained = weight_of(editor.model, _SITE), weight_of(first.model, _SITE).detach().clone()

        def edit() -> list[Tensor]:
            with torch.no_grad():
                weight.copy_(trained)
            # It tells of each step, in the midst of our table.
            with _elsewhere(), contextlib.redirect_stdout(io.StringIO()):
                editor.edit(**hosts.requests(1), sequential_edit=True, verbose=False)
            return []

        return Subject(editor.model, (_SITE,), edit, canary, host=partial(watch, editor))

    return make


EASYEDIT: Final = Workload(
    "easyedit_ft25",
    "EasyEdit's own edit: FT of 25 steps on a GPT-2-small shape, evaluated before and after; one c_proj",
    150,
    easyedit_ft25,
    CONTROL,
    CONTROL,
)
