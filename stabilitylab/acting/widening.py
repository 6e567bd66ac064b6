"""An edit in a wider precision: its tensors are widened where they are; what its code casts or makes, as it does so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from stabilitylab.watching.snapshot import Snapshot

_BYTES: Final[Mapping[torch.dtype, int]] = {
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.float32: 4,
    torch.float64: 8,
}
"""Of an entry, in each dtype that is widened."""
_TARGETS: Final = (torch.float32, torch.float64)
_ROOM: Final = 2
"""Times the widened tensors that an edit is taken to need: as much again for gradients and what lies on the way."""
_CASTS: Final = {Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16, Tensor.float: torch.float32}
_DRAWS: Final = frozenset({"rand", "randn", "rand_like", "randn_like", "normal"})
"""What draws random numbers: in another dtype it would draw others."""
_LEFT_ALONE: Final = frozenset({"__get__", "__set__", "__deepcopy__", "grad", "backward"})
"""What is about the very tensors that it is given: their attributes, copies or gradients."""
_IN_PLACE: Final = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
) | {"__setitem__"}


def is_narrower(dtype: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers of this dtype have to be widened to get to `target`."""
    return _BYTES.get(dtype, 16) < _BYTES[target]


def wider_than(snapshot: Snapshot) -> list[torch.dtype]:
    """The precisions in which something of what was kept would be wider; the narrowest first."""
    held = {values.memory.dtype for values in snapshot.values if values.memory is not None}
    return [target for target in _TARGETS if any(is_narrower(dtype, target) for dtype in held)]


def room_for(snapshot: Snapshot, target: torch.dtype) -> dict[torch.device, int]:
    """About how many more bytes the edit takes in this precision, by device."""
    storages = {_storage_of(memory): memory for memory in _narrow(snapshot, target)}
    found: dict[torch.device, int] = {}
    for (_, dtype), memory in storages.items():
        wide = memory.untyped_storage().nbytes() // _BYTES[dtype] * _BYTES[target]
        found[memory.device] = found.get(memory.device, 0) + _ROOM * wide
    return found


def widen(snapshot: Snapshot, target: torch.dtype) -> None:
    """Give each narrower tensor of what was kept other memory, in a wider precision. The memory that it had stays as it
    is, for `Snapshot.put_back` to give back. Tensors that shared memory still do.
    """
    wide: dict[tuple[int, torch.dtype], Tensor] = {}
    for values in snapshot.values:
        memory = values.memory
        if memory is None or not is_narrower(memory.dtype, target):
            continue
        key = _storage_of(memory)
        if key not in wide:
            storage = memory.untyped_storage()
            entries = storage.nbytes() // _BYTES[memory.dtype]
            wide[key] = memory.new_empty(0).set_(storage, 0, (entries,)).to(target)  # type: ignore[call-overload]
        values.tensor.data = wide[key].as_strided(memory.shape, memory.stride(), memory.storage_offset())


def _narrow(snapshot: Snapshot, target: torch.dtype) -> Iterator[Tensor]:
    for values in snapshot.values:
        if values.memory is not None and is_narrower(values.memory.dtype, target):
            yield values.memory


def _storage_of(memory: Tensor) -> tuple[int, torch.dtype]:
    return memory.untyped_storage().data_ptr(), memory.dtype


class Wider(TorchFunctionMode):
    """While it is entered, torch's functions take and give nothing narrower than `target`: casts to less are left out,
    what is made in less is widened (random numbers after they were drawn), and autocast is off.
    """

    def __init__(self, target: torch.dtype) -> None:
        super().__init__()
        self._target = target

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func`, wider."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _LEFT_ALONE:
            return func(*args, **kwargs)
        if func in _CASTS and is_narrower(_CASTS[func], self._target):
            return self._widened(args[0])
        written = [kwargs.get("out"), args[0] if args and _is_in_place(name) else None]

        def widened(value: Any) -> Any:
            if isinstance(value, torch.dtype) and name not in _DRAWS:
                return self._target if is_narrower(value, self._target) else value
            return value if any(value is each for each in written) else self._widened(value)

        args, kwargs = tree_map(widened, (args, dict(kwargs)))
        with _without_autocast():
            return tree_map(widened, func(*args, **kwargs))

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_narrower(value.dtype, self._target):
            return value
        if value.is_leaf and value.requires_grad and not isinstance(value, nn.Parameter):
            return value.detach().to(self._target).requires_grad_()  # one that was made just now, to be learnt
        return value.to(self._target)


def _is_in_place(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
