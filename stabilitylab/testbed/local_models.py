"""Causal language models from local folders, as transformers writes them; nothing is fetched."""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.testbed.blip2_digits import PRECISIONS


def load_folder(path: str | PathLike[str], precision: str = "fp32") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Any causal language model of a local folder, as ``save_pretrained`` writes it, frozen, with its tokenizer.

    Raises:
        UsageError: no such folder, no config.json, no tokenizer (or one without character offsets), no causal language
            model, weights missing or not readable, an unknown precision.
    """
    dtype = dtype_of(precision)
    folder = Path(path)
    if not folder.is_dir():
        near = did_you_mean(folder.name, _names(folder.parent))
        raise UsageError(f"{folder}: no such folder, expected one with a causal language model{near}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json, expected a folder that transformers' save_pretrained wrote")
    _expect_causal(folder)
    tokenizer = read_tokenizer(folder)
    return read_model(folder, dtype), tokenizer


def dtype_of(precision: str) -> torch.dtype:
    """The dtype called `precision`.

    Raises:
        UsageError: there is none of that name.
    """
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UsageError(f"no precision {precision!r}; expected {known}{did_you_mean(precision, PRECISIONS)}")
    return PRECISIONS[precision]


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, one that knows the characters of each token.

    Raises:
        UsageError: there is none, or one without character offsets.
    """
    from transformers import AutoTokenizer

    try:
        with silent():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers make of a stranger's files
        raise UsageError(f"{folder} has no tokenizer that can be loaded: {_one_line(error)}") from None
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UsageError(f"{folder}: the tokenizer ({kind}) gives no character offsets, expected a tokenizer.json")
    if not tokenizer("word", add_special_tokens=False)["input_ids"]:
        # Of some families transformers makes an empty one when there is no file.
        raise UsageError(f"{folder} has no tokenizer that knows a word, expected a tokenizer.json")
    return tokenizer


def read_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The folder's model in `dtype`, frozen and in eval mode.

    Raises:
        UsageError: it can't be loaded, or some of its weights are missing.
    """
    from transformers import AutoModelForCausalLM

    try:
        with silent():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **in_dtype(dtype)
            )
    except Exception as error:  # the same
        raise UsageError(f"{folder} holds no model that can be loaded: {_one_line(error)}") from None
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        # transformers would go on with random numbers in their place.
        raise UsageError(f"{folder} lacks {len(absent)} of the model's weights, {absent[0]!r} first")
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of ``from_pretrained`` for a dtype: transformers 4.56 renamed it."""
    release = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    return {"dtype" if release >= (4, 56) else "torch_dtype": dtype}


@contextmanager
def silent() -> Iterator[None]:
    """transformers without bars and advice: what matters is raised, or looked at by `read_model`."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with ExitStack() as undo:
        undo.callback(logging.set_verbosity, level)
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if had_bars:
            undo.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # Its bar over a GGUF's tensors heeds no setting.
        undo.enter_context(redirect_stderr(io.StringIO()))
        yield


def _expect_causal(folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: dict[str, Any] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'config.json'} can't be read as JSON: {_one_line(error)}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in known:
        near = did_you_mean(kind, known) if isinstance(kind, str) else ""
        raise UsageError(f"{folder} holds a model of type {kind!r}, expected a causal language model{near}")
    held = config.get("architectures") or []
    expected = (known[kind],) if isinstance(known[kind], str) else tuple(known[kind])
    if held and not set(held) & set(expected):
        raise UsageError(f"{folder} holds {', '.join(held)}, expected a causal language model: {', '.join(expected)}")


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= 200 else f"{words[:199]}…"


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
