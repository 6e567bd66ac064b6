"""Everything that an edit may change in a model and its editor: remembered, put back, and compared bit by bit.

What is followed from a root: the attributes of modules, optimisers, learning-rate schedules and gradient scalers, and
of objects whose class comes from the package of a root that is no module of torch's; dicts, lists, sets, deques and
tuples in them; and every tensor and NumPy array met there. An object of another kind is put back where it was, as it
then is: what it holds inside (slots, closures, C extensions, files) can't be seen, and so neither put back nor missed.
"""

from __future__ import annotations

import io
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stabilitylab.errors import UsageError
from stabilitylab.probes.weight_pass import same_bits

_FOLLOWED = (
    nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
)
_HOST = torch.device("cpu")
_NOBODYS = {"builtins", "torch", "numpy"}
"""Packages whose objects are no editor's own, even where a root is an object of theirs."""

_OURS, _USERS_OF_OURS = "stabilitylab.", ("stabilitylab.editors", "stabilitylab.testbed")

_PLAIN_NAMES = {"_parameters", "_buffers", "_modules"}
"""Attributes of a module that are no part of the names of what is in them."""


@dataclass(frozen=True, eq=False)
class _Holder:
    """A container, or the attributes of an object, and what was in it: of a dict, keys and values in turn."""

    name: str
    held: Any
    contents: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Values:
    """A tensor: the memory it had, a copy of the bits there (None: it has none of its own), and its gradient."""

    name: str
    tensor: Tensor
    memory: Tensor | None
    bits: Tensor | None
    requires_grad: bool
    gradient: Tensor | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """How things were. Its memory is that of all the tensors in it: a copy of each, where they lie."""

    holders: list[_Holder] = field(default_factory=list)
    values: list[_Values] = field(default_factory=list)
    arrays: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(default_factory=list)
    classes: list[tuple[str, Any, type]] = field(default_factory=list)
    """Of objects: a parametrisation gives its layer another one."""
    generators: list[Any] = field(default_factory=list)
    """Random generators that were met; see `RandomStates`."""
    iterators: list[str] = field(default_factory=list)
    """The names of what can't be put back once something was taken from it. Files are not among them."""

    @property
    def reached(self) -> list[Any]:
        """All that can be put back, whether or not anything else still holds it."""
        return [
            *(thing for _, thing, _ in self.classes),
            *(holder.held for holder in self.holders),
            *(values.tensor for values in self.values),
            *(array for _, array, _ in self.arrays),
            *self.generators,
        ]

    def sizes(self) -> dict[torch.device, int]:
        """The bytes of all the tensors in it, by where they lie; arrays are on the CPU."""
        all_bits = [values.bits for values in self.values if values.bits is not None]
        each = {(*_place(bits), bits.device): bits for bits in all_bits}
        found: dict[torch.device, int] = {}
        for bits in each.values():
            found[bits.device] = found.get(bits.device, 0) + bits.numel() * bits.element_size()
        for _, array, _ in self.arrays:
            found[_HOST] = found.get(_HOST, 0) + array.nbytes
        return found

    def put_back(self) -> list[str]:
        """Put everything back, and name what differs from how it was all the same."""
        for _, thing, kind in self.classes:
            if type(thing) is not kind:
                _try(setattr, thing, "__class__", kind)
        for holder in self.holders:
            if not _holds(holder):
                _try(_refill, holder)
        for values in self.values:
            _try(_write, values)
        for values in self.values:  # a gradient must have its dtype again before a tensor takes it
            _try(_write_gradient, values)
        for _, array, was in self.arrays:
            if array.tobytes() != was.tobytes():
                _try(np.copyto, array, was)
        return self.differences()

    def differences(self) -> list[str]:
        """The names of what isn't bit for bit as it was; NaNs and negative zeros included."""
        return [
            *(name for name, thing, kind in self.classes if type(thing) is not kind),
            *(holder.name for holder in self.holders if not _holds(holder)),
            *(values.name for values in self.values if not _is_as_it_was(values)),
            *(name for name, array, was in self.arrays if array.tobytes() != was.tobytes()),
        ]

    def unlike(self, other: Snapshot) -> list[str]:
        """The names of tensors and arrays that hold other bits in `other`, of the same things at another time; also of
        those that only one of the two has.
        """
        pairs = zip_longest(self.values, other.values)
        arrays = zip_longest(self.arrays, other.arrays)
        return [
            *((one or two).name for one, two in pairs if one is None or two is None or not _alike(one, two)),
            *((one or two)[0] for one, two in arrays if one is None or two is None or not _alike_arrays(one, two)),
        ]


def _try(act: Any, *arguments: Any) -> None:
    """Nothing is raised: what could not be put back shows when it is compared, and the rest must be put back too."""
    try:
        act(*arguments)
    except Exception:
        return


# -- taking it ----------------------------------------------------------------------------------------------------


def take(roots: Mapping[str, object]) -> Snapshot:
    """How everything that can be reached from `roots` is now; they have names, for messages ("" for the model).

    Raises:
        UsageError: a tensor whose bits can't be copied, such as a sparse one.
    """
    return _walk(roots, copied=True)


def look(roots: Mapping[str, object]) -> Snapshot:
    """The same without copies: to be measured, or compared with what was taken, before anything changes."""
    return _walk(roots, copied=False)


def _walk(roots: Mapping[str, object], *, copied: bool) -> Snapshot:
    packages = {_package(root) for root in roots.values()} - _NOBODYS
    top = {id(root) for root in roots.values()}
    snapshot = Snapshot()
    copies: dict[tuple[Any, ...], Tensor] = {}
    met: dict[int, object] = {}  # the objects too, so that no `id` is given to another one meanwhile
    waiting = list(reversed(list(roots.items())))  # the model first: what is the editor's too is named as the model's
    while waiting:
        name, thing = waiting.pop()
        if id(thing) in met or isinstance(thing, str | bytes | int | float | type | None):
            continue
        met[id(thing)] = thing
        if isinstance(thing, Tensor):
            snapshot.values.append(_values_of(name, thing, copies if copied else None))
            waiting += [(f"{name}.grad", thing.grad)] if thing.is_leaf else []
            if is_traceable_wrapper_subclass(thing):
                inner, _ = thing.__tensor_flatten__()
                waiting += [(f"{name}.{each}", getattr(thing, each)) for each in inner]
        elif isinstance(thing, np.ndarray):
            if not thing.dtype.hasobject:
                snapshot.arrays.append((name, thing, thing.copy() if copied else thing))
        elif isinstance(thing, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
            snapshot.generators.append(thing)
        elif isinstance(thing, tuple):
            waiting += reversed(list(_inside(name, thing)))  # the last one waits longest
        elif isinstance(thing, dict | list | set | deque):
            snapshot.holders.append(_Holder(name, thing, _contents(thing)))
            waiting += reversed(list(_inside(name, thing)))
        elif isinstance(thing, Iterator) and not isinstance(thing, io.IOBase) and not hasattr(thing, "__dict__"):
            snapshot.iterators.append(name)
        elif isinstance(thing, _FOLLOWED) or id(thing) in top or _belongs(thing, packages):
            attributes = getattr(thing, "__dict__", None)
            if isinstance(attributes, dict):
                snapshot.classes.append((name, thing, type(thing)))
                waiting.append((name, attributes))
    return snapshot


def _package(thing: object) -> str:
    where = thing.__name__ if isinstance(thing, ModuleType) else type(thing).__module__
    return where.partition(".")[0]


def _belongs(thing: object, packages: set[str]) -> bool:
    if isinstance(thing, ModuleType) or _package(thing) not in packages:
        return False
    return not is_ours(type(thing).__module__)


def is_ours(home: str) -> bool:
    """Whether what is from this Python module belongs to what watches, and must go on as it is."""
    return home.startswith(_OURS) and not home.startswith(_USERS_OF_OURS)


def _inside(name: str, held: Any) -> Iterator[tuple[str, object]]:
    named = held.items() if isinstance(held, dict) else enumerate(held)
    for key, value in named:
        if isinstance(key, str) and key.startswith("__"):
            continue  # of a Python module that holds an editor's state: what Python keeps there
        own = "" if key in _PLAIN_NAMES else str(key) if isinstance(key, str | int) else type(key).__name__
        yield ".".join(part for part in (name, own) if part), value


def _contents(held: Any) -> tuple[Any, ...]:
    if isinstance(held, dict):
        return tuple(part for item in held.items() for part in item)
    return tuple(held)


def _values_of(name: str, tensor: Tensor, copies: dict[tuple[Any, ...], Tensor] | None) -> _Values:
    """copies: of each place in memory, so that tied tensors cost one; None for none."""
    memory = bits = None
    if not (tensor.is_meta or is_traceable_wrapper_subclass(tensor)):
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
            raise UsageError(f"'{name}' can't be kept and put back: it is {kind}; expected dense tensors")
        memory = tensor.data
        key = (*_place(memory), memory.device)
        if copies is None:
            bits = memory
        else:
            bits = copies[key] = copies[key] if key in copies else memory.clone()
    gradient = tensor.grad if tensor.is_leaf else None
    return _Values(name, tensor, memory, bits, tensor.requires_grad, gradient)


# -- putting it back ----------------------------------------------------------------------------------------------


def _refill(holder: _Holder) -> None:
    held, contents = holder.held, holder.contents
    if isinstance(held, dict):
        wanted = dict(zip(contents[::2], contents[1::2], strict=True))
        for key in [key for key in held if key not in wanted]:
            del held[key]
        for key, value in wanted.items():  # one by one to the end: the order comes back, and no key is long away
            held.pop(key, None)
            held[key] = value
    elif isinstance(held, set):
        held.clear()
        held.update(contents)
    else:
        held.clear()
        held.extend(contents)


def _write(values: _Values) -> None:
    tensor, memory, bits = values.tensor, values.memory, values.bits
    if tensor.grad_fn is not None and values.memory is not None and not values.requires_grad:
        tensor.detach_()  # an edit with gradients was made in it
    if memory is not None and bits is not None:
        if _place(tensor) != _place(memory):
            tensor.data = memory
        if not _same(tensor, bits):
            # Not by `memory`: the tensor's version must count on, or whoever looks at that sees no change.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.detach().copy_(bits)
    if tensor.is_leaf and tensor.requires_grad != values.requires_grad:
        tensor.requires_grad_(values.requires_grad)


def _write_gradient(values: _Values) -> None:
    tensor = values.tensor
    if tensor.is_leaf and tensor.grad is not values.gradient:
        tensor.grad = values.gradient


# -- comparing ----------------------------------------------------------------------------------------------------


def _holds(holder: _Holder) -> bool:
    now = _contents(holder.held)
    if isinstance(holder.held, set):
        return set(map(id, now)) == set(map(id, holder.contents))
    return len(now) == len(holder.contents) and all(a is b for a, b in zip(now, holder.contents, strict=True))


def _is_as_it_was(values: _Values) -> bool:
    tensor = values.tensor
    gradient = tensor.grad if tensor.is_leaf else None
    if tensor.requires_grad != values.requires_grad or gradient is not values.gradient:
        return False
    if values.memory is None or values.bits is None:
        return True
    return _place(tensor) == _place(values.memory) and _same(tensor, values.bits)


def _alike(one: _Values, other: _Values) -> bool:
    if one.name != other.name or (one.bits is None) != (other.bits is None):
        return False
    if one.bits is None or other.bits is None:
        return True
    same_kind = one.bits.dtype == other.bits.dtype and one.bits.shape == other.bits.shape
    return same_kind and one.bits.device == other.bits.device and _same(one.bits, other.bits)


_Array = tuple[str, "np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


def _alike_arrays(one: _Array, other: _Array) -> bool:
    return one[0] == other[0] and one[2].dtype == other[2].dtype and one[2].tobytes() == other[2].tobytes()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _same(tensor: Tensor, bits: Tensor) -> bool:
    one, other = tensor.detach(), bits
    if one.numel() == 0:
        return True
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    return same_bits(one, other)


# -- random numbers -----------------------------------------------------------------------------------------------


class RandomStates:
    """The states of all random generators: Python's, NumPy's, torch's (CUDA's where it is in use), an editor's own."""

    def __init__(self, generators: list[Any]) -> None:
        """generators: those of an editor."""
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy = np.random.get_state()  # noqa: NPY002 -- the global one is what an editor may draw from
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if in_use else None
        own = [each for each in generators if not isinstance(each, random.SystemRandom)]  # which has no state
        self._own = [(generator, _state_of(generator)) for generator in own]

    def put_back(self) -> None:
        """Each goes on from where it was."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        for generator, state in self._own:
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.set_state(state)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()
