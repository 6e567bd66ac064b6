"""Files of an editor's state: opened as tensors by name, whatever wrote them. Runs no code of theirs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from stabilitylab.acting.scanning.opening import PICKLE_HINT, flat, load_pickle, one_line
from stabilitylab.errors import UsageError, did_you_mean

_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"
_MOST_UNPACKED: Final = 1 << 30
_TIMES: Final = 20
"""Bytes that an archive may unpack to, and so many times its own besides: floats that were measured pack to half."""
_INSIDE: Final = ("model", "state_dict")
"""Where archives of training keep the state dict, beside that of the optimiser."""


@dataclass(frozen=True)
class Archive:
    """file: where it lies. tensors: by name. about: words beside them."""

    file: Path
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)


def open_archive(file: Path, *, pickles: bool = False) -> Archive:
    """A safetensors file, NumPy's ``.npz``, or what ``torch.save`` wrote; by its content, since archives of MEND have
    no suffix.

    pickles: also read the latter, with ``weights_only``.

    Raises:
        UsageError: no such file, none of these, damaged, or a pickle without leave.
    """
    if not file.is_file():
        what = "is a folder, expected a file" if file.is_dir() else "no such file, expected one"
        near = did_you_mean(file.name, [each.name for each in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise UsageError(f"{file}: {what} of an editor's state or of second moments{near}")
    with file.open("rb") as opened:
        begins = opened.read(4)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if begins == _ZIP and _is_npz(file):
        return _npz(file)
    if begins == _ZIP or begins[:1] == _PICKLE:
        if not pickles:
            raise UsageError(f"{file} is a pickle, which may run code when it is read; {PICKLE_HINT}")
        held = load_pickle(file)
        if isinstance(held, Mapping):
            held = next((held[key] for key in _INSIDE if isinstance(held.get(key), Mapping)), held)
        return Archive(file, dict(flat(held)))
    return _safetensors(file)


def _safetensors(file: Path) -> Archive:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = dict(opened.metadata() or {})
            return Archive(file, {name: opened.get_tensor(name) for name in opened.keys()}, about)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        kinds = "" if file.suffix == ".safetensors" else ", nor is it an .npz, or what torch.save wrote"
        raise UsageError(f"{file} can't be read as safetensors ({one_line(error)}){kinds}") from None


def _is_npz(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as opened:
            return any(name.endswith(".npy") for name in opened.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # damaged: names that are no text among it
        return file.suffix == ".npz"


def _expect_no_bomb(file: Path) -> None:
    with zipfile.ZipFile(file) as opened:
        size = sum(each.file_size for each in opened.infolist())
    if size > _MOST_UNPACKED + _TIMES * file.stat().st_size:
        raise ValueError(f"it says that it unpacks to {size:,} bytes")


def _npz(file: Path) -> Archive:
    """Numbers alone; text beside them, such as the name of a class, is what it is about."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    try:
        _expect_no_bomb(file)
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as opened:
            for name in opened.files:
                array = opened[name]
                if isinstance(array, np.ndarray) and array.dtype.kind in "fiu":
                    tensors[name] = torch.from_numpy(np.array(array))
                else:
                    about[name] = str(array)[:80]
    except Exception as error:  # headers are read as Python's own text, and what that raises is anyone's choice
        raise UsageError(f"{file} can't be read as .npz: {one_line(error)}") from None
    return Archive(file, tensors, about)
