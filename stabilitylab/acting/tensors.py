"""Reading tensors inside a dispatch mode: sums, kinds, ranges. Only plain dense floating ones; a shard's own part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from stabilitylab.record.operations import Values

T = TypeVar("T")

_SHRUNK: Final = 2.0**-64

MINUS_INFINITY: Final = 1
INFINITY: Final = 2
NAN: Final = 4
"""Kinds of values that are not finite, as bits."""

SUMMED: Final[Mapping[torch.dtype, torch.dtype]] = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype in which a tensor of each dtype is summed; of others nothing is looked at."""


def quietly(action: Callable[[], T]) -> T:
    """`action()` without any mode of the user's seeing it."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return action()
    with torch._C._DisableTorchDispatch():
        return action()


def readable(values: Any) -> Iterator[Tensor]:
    """The tensors in a result or an argument that can be looked at; of one that is spread out, this process's part."""
    if isinstance(values, Tensor):
        tensor: Any = values
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            tensor = getattr(tensor, "_local_tensor", None)
            if type(tensor) is not Tensor:
                return
        if tensor.dtype in SUMMED and tensor.layout is torch.strided and not tensor.is_nested and _has_memory(tensor):
            yield tensor
    elif isinstance(values, tuple | list):
        for value in values:
            yield from readable(value)


def _has_memory(tensor: Tensor) -> bool:
    """Not so of meta tensors, and of the zeros that autograd stands in for gradients that are none."""
    return not (tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor._is_zerotensor())


_ON_HOST: Final[dict[int, bool]] = {}


def is_on_host(tensor: Tensor) -> bool:
    """Whether it can be looked at, here and now. All that this hangs on shows in its dispatch keys: asked for once."""
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    known = _ON_HOST.get(keys)
    if known is None:
        known = _ON_HOST[keys] = tensor.device.type == "cpu" and any(True for _ in readable(tensor))
    return known


def in_output(output: Any) -> list[Any]:
    """Everything in what a model returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [value for value in output.values() if isinstance(value, Tensor)]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """A number for the memory that it lies in: its own as long as anything holds that memory, strongly or weakly."""
    number: int = tensor.untyped_storage()._cdata
    return number


class Held(Protocol):
    """A weak hold on memory: while it lasts, no other memory gets its number."""

    def expired(self) -> bool:
        """Whether the memory is gone."""


def held(tensor: Tensor) -> Held:
    """A weak hold on the memory of a tensor."""
    hold: Held = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return hold


def is_whole(tensor: Tensor) -> bool:
    """Whether it is all of its memory."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def total(tensor: Tensor) -> Tensor:
    """Its sum, 0-d, such that it can't overflow: not finite exactly where an entry isn't."""
    if tensor.dtype == torch.float64:
        return quietly(lambda: torch.sum(tensor * _SHRUNK))
    return quietly(lambda: torch.sum(tensor, dtype=torch.float32 if tensor.dtype == torch.float16 else torch.float64))


def sums_up(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether its sum in that dtype is finite: then every entry is."""
    if torch._C._len_torch_dispatch_stack() == 0:  # as `quietly`, but this is done for each operation
        return math.isfinite(torch.sum(tensor, dtype=dtype).item())
    return quietly(lambda: math.isfinite(torch.sum(tensor, dtype=dtype).item()))


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is: by the sum, and where that isn't by each of them."""
    return quietly(
        lambda: math.isfinite(torch.sum(tensor, dtype=SUMMED[tensor.dtype]).item()) or bool(tensor.isfinite().all())
    )


def kinds_of(tensor: Tensor) -> int:
    """Which values that are not finite are in it, as bits."""
    if is_finite(tensor):
        return 0
    tests = ((MINUS_INFINITY, torch.isneginf), (INFINITY, torch.isposinf), (NAN, torch.isnan))
    return quietly(lambda: sum(kind for kind, test in tests if bool(test(tensor).any())))


def kind_of(value: float) -> int:
    """Of one number; 0 where it is finite."""
    if math.isfinite(value):
        return 0
    return NAN if math.isnan(value) else INFINITY if value > 0 else MINUS_INFINITY


def range_of(tensor: Tensor) -> tuple[float | None, float | None, int]:
    """(least and greatest finite entry, None where there is none; how many are not finite)."""

    def read() -> tuple[float | None, float | None, int]:
        finite = tensor.detach()[tensor.isfinite()]
        if not finite.numel():
            return None, None, tensor.numel()
        return float(finite.min()), float(finite.max()), tensor.numel() - finite.numel()

    return quietly(read)


def first_bad(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """(index, value) of the first entry that is not finite, in the order of its dimensions."""

    def read() -> tuple[tuple[int, ...], str]:
        place = int((~tensor.isfinite()).flatten().to(torch.uint8).argmax())
        index = tuple(int(each) for each in torch.unravel_index(torch.tensor(place), tensor.shape))
        return index, spelled(float(tensor.detach()[index]))

    return quietly(read)


def spelled(value: float) -> str:
    """``NaN``, ``∞`` or ``−∞``."""
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def spelled_kinds(kinds: int) -> str:
    """The worst of them as a word."""
    return "NaN" if kinds & NAN else "∞" if kinds & INFINITY else "−∞"


def dtype_of(tensor: Tensor) -> str:
    """``float16``."""
    return str(tensor.dtype).removeprefix("torch.")


def shape_of(name: str, tensor: Tensor) -> Values:
    """What is known of a tensor without reading it."""
    return Values(name, tuple(tensor.shape), dtype_of(tensor))


def values_of(name: str, tensor: Tensor) -> Values:
    """A tensor with its range."""
    least, greatest, bad = range_of(tensor)
    return Values(name, tuple(tensor.shape), dtype_of(tensor), least, greatest, bad)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that can be looked at, with their names."""
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            for found in readable(tensor):
                yield name, found


def largest_of(tensors: Iterator[Tensor]) -> float | None:
    """The largest magnitude of their finite entries; None where there is none."""
    ends = [end for tensor in tensors for end in range_of(tensor)[:2] if end is not None]
    return max(map(abs, ends), default=None)
