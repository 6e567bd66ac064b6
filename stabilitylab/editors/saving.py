"""An editor's state as one safetensors file: there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stabilitylab.errors import UsageError


def write_whole(file: Path, content: bytes) -> Path:
    """Write `content` to `file`, whose folder is made; an earlier file stays until the new one is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
        Path(name).chmod(0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return file


def write_state(file: Path, state: Mapping[str, Tensor], about: Mapping[str, str]) -> Path:
    """Write tensors and their metadata to `file`, see `write_whole`."""
    from safetensors.torch import save

    held = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return write_whole(file, save(held, metadata=dict(about)))


def read_state(file: Path, absent: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in `file`, on the CPU, and its metadata.

    Raises:
        UsageError: no such file, said with the words `absent` about what to do; or it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UsageError(f"no checkpoint {file}; {absent}")
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(about)  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{file} can't be read as safetensors: {error}") from None
