"""The tensors of a model, one at a time: of a folder of weights, or of a live model. Runs no code of the folder."""

from __future__ import annotations

import functools
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.record import plain_files
from stabilitylab.record.scanned import FLOATS
from stabilitylab.watching.adapted import has_parts
from stabilitylab.watching.sites import Site, all_sites, locate, orientation_of, why_unmeasurable

PICKLE_HINT: Final = "--pickle (in Python: pickles=True) reads pickled tensors, and tensors only"

_DTYPES: Final[Mapping[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_INDEXED: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PICKLED: Final = ("*.bin", "*.pt", "*.pth")
_NO_WEIGHTS: Final = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"})
"""What a Trainer leaves in the same folder."""
_INPUTS_FIRST: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gptsan-japanese"})
"""Types of models whose Conv1D keeps its weight as [inputs, outputs]."""
_CONV1D: Final = ("c_attn", "c_proj", "c_fc", "q_attn")
_MATRIX: Final = 2  # dimensions
_MOST_BYTES: Final = 256 << 20
"""Of an index: that of a model with a hundred thousand tensors has a tenth of it."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its name, and how it is read. dtype: torch's name, or the file's where torch has none.

    inputs_first: whether it is a matrix of the shape [inputs, outputs]. is_buffer: whether it is no parameter, as far
    as that is known. unreadable: why it can't be read, if it can't.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor] = field(compare=False)
    inputs_first: bool = False
    is_buffer: bool = False
    unreadable: str = ""


@dataclass(frozen=True)
class Opened:
    """A model whose tensors can be read. name: of the folder or class. model_type: what its config.json says."""

    name: str
    model_type: str
    entries: tuple[Entry, ...]


def open_model(model: nn.Module) -> Opened:
    """A live one: each parameter and buffer once, and the layers whose weight is no tensor that can be read."""
    transposed = {
        f"{name}.weight" for name, module in model.named_modules() if name and orientation_of(module) == "in_out"
    }
    found = [
        _of_live(name, tensor, name in transposed, is_buffer)
        for named, is_buffer in ((model.named_parameters(), False), (model.named_buffers(), True))
        for name, tensor in named
    ]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {entry.name for entry in found}
    others = [site for site in all_sites(model).values() if site.parameter not in known]
    # A layer with adapters has its own weight, and theirs, among the parameters.
    found += [_packed(model, site) for site in others if not has_parts(model.get_submodule(site.module))]
    kind = str(getattr(getattr(model, "config", None), "model_type", "") or "")
    return Opened(type(model).__name__, kind, tuple(found))


def _of_live(name: str, tensor: Tensor, inputs_first: bool, is_buffer: bool) -> Entry:
    dtype = _name_of(tensor)
    why = "" if dtype not in FLOATS else why_unmeasurable(tensor) or ""
    if not why and tensor.layout != torch.strided:
        why = f"its layout is {str(tensor.layout).removeprefix('torch.')}"
    why = "" if not tensor.numel() else why
    return Entry(name, tuple(tensor.shape), dtype, functools.partial(_itself, tensor), inputs_first, is_buffer, why)


def _packed(model: nn.Module, site: Site) -> Entry:
    """A quantised layer, whose weight is no parameter."""
    located = locate(model, site)
    why = "it is packed" if located is None else why_unmeasurable(located[1]) or "it is packed"
    dtype = str(site.dtype).removeprefix("torch.")
    return Entry(site.parameter, site.shape, dtype, torch.Tensor, unreadable=why)


def open_folder(path: Path, *, pickles: bool = False) -> Opened:
    """A folder that ``save_pretrained`` writes, or one file of weights.

    pickles: also read pickled weights, with ``weights_only``. safetensors files are preferred.

    Raises:
        UsageError: no such folder, no weights in it, pickled ones without leave, shards missing or damaged.
    """
    if not path.exists():
        near = did_you_mean(path.name, _names(path.parent))
        raise UsageError(f"{path}: no such folder, expected one with a model's weights{near}")
    config = {} if path.is_file() else _config(path / "config.json")
    kind = config.get("model_type")
    model_type = kind if isinstance(kind, str) else ""
    entries = _entries(path, pickles)
    if not entries:
        raise UsageError(f"{path} holds no tensor; expected a model's weights")
    marked = (_marked(entry, model_type) for entry in entries)
    return Opened(str(path), model_type, tuple(sorted(marked, key=_natural)))


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _marked(entry: Entry, model_type: str) -> Entry:
    layer, _, leaf = entry.name.rpartition(".")
    conv1d = model_type in _INPUTS_FIRST and leaf == "weight" and layer.rpartition(".")[2] in _CONV1D
    if not conv1d or len(entry.shape) != _MATRIX:
        return entry
    return Entry(entry.name, entry.shape, entry.dtype, entry.read, True)


def _natural(entry: Entry) -> tuple[tuple[int, str, int], ...]:
    """Layer 2 before layer 10: files are often sorted by the alphabet."""
    return tuple((0, "", int(part)) if part.isdigit() else (1, part, 0) for part in entry.name.split("."))


def _names(folder: Path) -> list[str]:
    try:
        return [each.name for each in folder.iterdir()]
    except OSError:
        return []


def _config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    held = read_json(file)
    return held if isinstance(held, dict) else {}


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises UsageError where it can't be read as such."""
    try:
        return plain_files.read_json(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read as JSON: {one_line(error)}") from None


def one_line(error: BaseException, length: int = 200) -> str:
    """What an error says, short."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= length else f"{words[: length - 1]}…"


def _entries(path: Path, pickles: bool) -> list[Entry]:
    if path.is_file():
        return list(_of_files([path], pickles))
    for index in (path / name for name in _INDEXED):
        if index.is_file() and (index.name == _INDEXED[0] or not list(path.glob("*.safetensors"))):
            return _of_index(index, pickles)
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not files:
        files = [each for kind in _PICKLED for each in sorted(path.glob(kind)) if each.name not in _NO_WEIGHTS]
    if not files:
        raise UsageError(f"{path} holds no weights; expected *.safetensors, or pytorch_model*.bin with {PICKLE_HINT}")
    return list(_of_files(files, pickles))


def _of_index(index: Path, pickles: bool) -> list[Entry]:
    """What an index lists, each tensor where it says."""
    held = read_json(index)
    places = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UsageError(f"{index} names no file; expected a 'weight_map' from tensors to files")
    if not places:
        raise UsageError(f"{index} names no file: its 'weight_map' is empty")
    shards = sorted(set(places.values()))
    if any(Path(shard).name != shard for shard in shards):
        wrong = next(shard for shard in shards if Path(shard).name != shard)
        raise UsageError(f"{index} names {wrong!r}; expected files in the same folder")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise UsageError(f"{index.parent} lacks {len(absent)} of its {len(shards)} shards, {absent[0]!r} first")
    found = {entry.name: entry for entry in _of_files([index.parent / shard for shard in shards], pickles)}
    lost = next((name for name in places if name not in found), None)
    if lost is not None:
        raise UsageError(f"{index.parent / places[lost]} lacks the tensor {lost!r}, which {index.name} says is there")
    return [entry for name, entry in found.items() if name in places]


def _of_files(files: Iterable[Path], pickles: bool) -> Iterator[Entry]:
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise UsageError(f"{file} is no file; expected a model's weights")
        if file.suffix == ".safetensors":
            yield from _of_safetensors(file)
        elif pickles:
            yield from _of_pickle(file)
        else:
            raise UsageError(f"{file} is a pickle, which may run code when it is read; {PICKLE_HINT}")


def _of_safetensors(file: Path) -> Iterator[Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                dtype = str(part.get_dtype())
                read = functools.partial(_read_safetensor, file, name)
                yield Entry(name, tuple(part.get_shape()), _DTYPES.get(dtype, dtype.lower()), read)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} can't be read as safetensors: {one_line(error)}") from None


def _read_safetensor(file: Path, name: str) -> Tensor:
    """One tensor. The file is opened anew for each, so that what was read before need not stay in memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: {name!r} can't be read: {one_line(error)}") from None


def _of_pickle(file: Path) -> Iterator[Entry]:
    for name, tensor in flat(load_pickle(file)):
        yield Entry(name, tuple(tensor.shape), _name_of(tensor), functools.partial(_itself, tensor))


def load_pickle(file: Path) -> Any:
    """What torch.save wrote, with ``weights_only``: no code of the file is run.

    Raises:
        UsageError: it can't be read, or holds more than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are not torch's: the error says it
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 can't be mapped into memory
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = str(error).partition("GLOBAL ")[2].split()
        if refused:
            raise UsageError(
                f"{file} holds more than tensors, which only code could read ({refused[0]}); load it where you trust"
                " it, and save the tensors of its state dict alone: {k: v for k, v in state.items() if"
                " torch.is_tensor(v)}"
            ) from None
        raise UsageError(f"{file} can't be read as a file of torch.save: no pickled tensors") from None
    except Exception as error:  # torch's reader takes what a damaged pickle says as it comes
        raise UsageError(f"{file} can't be read as a file of torch.save: {one_line(error)}") from None


def flat(held: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, by name."""
    if isinstance(held, Tensor):
        yield prefix, held
    elif isinstance(held, Mapping):
        for key, value in held.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
