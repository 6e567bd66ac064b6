"""A layer that PEFT has put adapters on, and the weight that it really computes with. Known by its attributes. A layer
whose weight a parametrization computes with parameters of its own is another such (`parametrised`).

Whatever kind the adapters are (LoRA, DoRA, IA³, OFT, …), that weight is what merging them would leave: a copy of the
layer is merged. So it is the same before a merge and after it, and adapters that are not active have no part in it.
Plain LoRA on a dense layer, which is most of what there is, is merged piece by piece, by PEFT's own operations in their
order: a fifth of the time, for no piece leaves the cache before it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.probes.native_scan import LowRankSum
from stabilitylab.probes.weight_pass import same_bits
from stabilitylab.probes.weight_pieces import InPieces, rows_of_a_piece
from stabilitylab.watching.parametrised import computed_weight, original_of, place_of_parts
from stabilitylab.watching.walking import named_modules_of, named_tensors_of

WRAPPER: Final = "base_model.model."
"""Where a `PeftModel` keeps the model that it wraps."""

_INNER: Final = "base_layer"
_LORA: Final = "peft.tuners.lora.layer.Linear"
_SMALL: Final = 1 << 16  # entries
_COPIES: Final = "modules_to_save"
_OWN: Final = (dict, list, set)
"""What a layer's attributes are kept in: what merging writes to must be the copy's own."""


def _child(module: nn.Module, name: str) -> nn.Module | None:
    held = module._modules  # a ScriptModule's have no `get`
    return held[name] if name in held else None  # noqa: SIM401


def is_adapted(module: nn.Module) -> bool:
    """Whether it computes with a weight that is made of parts: a layer inside PEFT's adapters, by the attributes that
    all of them have, or one with a parametrization that has parameters of its own.
    """
    if original_of(module) is not None:
        return True
    has_inner = isinstance(_child(module, _INNER), nn.Module)
    return has_inner and isinstance(getattr(module, "merged_adapters", None), list) and hasattr(module, "merge")


def is_made(module: nn.Module, tensor: Tensor) -> bool:
    """Whether such a layer makes its weight of this tensor of its own, and others. Its bias is not computed."""
    original = original_of(module)
    return is_adapted(module) if original is None else tensor is original


def running(module: nn.Module) -> nn.Module:
    """What runs in place of a module that PEFT trains a copy of (``modules_to_save``): the copy, or the original. Any
    other module itself.
    """
    copies = _child(module, _COPIES)
    if not isinstance(copies, nn.ModuleDict):
        return module
    state: Any = module
    names = [] if state.disable_adapters else [name for name in state.active_adapters if name in copies]
    found = copies[names[0]] if names else state.original_module
    assert isinstance(found, nn.Module)
    return found


def has_parts(module: nn.Module) -> bool:
    """Whether it is, with what is inside of it, one layer of the model that the user made."""
    return is_adapted(module) or running(module) is not module


def parts_of_layers(model: nn.Module) -> dict[str, str]:
    """Of each such layer, by name: what the names of its parts begin with."""
    found = ((name, module) for name, module in model.named_modules() if has_parts(module))
    return {name: f"{name}.{'' if original_of(module) is None else place_of_parts(module)}" for name, module in found}


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside all of its adapters."""
    while isinstance(inner := _child(module, _INNER), nn.Module):
        module = inner
    return module


def is_wrapper(model: nn.Module) -> bool:
    """Whether it is a `PeftModel`, whose layers have other names than in the model that the user made."""
    return callable(getattr(model, "get_base_model", None)) and "base_model" in model._modules


def base_weight(module: nn.Module) -> Tensor | None:
    """The parameter that the weight is made of, with others."""
    original = original_of(module)
    weight = getattr(base_of(module), "weight", None) if original is None else original
    return weight if isinstance(weight, Tensor) else None


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Of the weight of an adapted layer; of a packed one that which it stands for."""
    base, weight = base_of(module), base_weight(module)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return tuple(weight.shape)
    return (int(getattr(base, "out_features", 0)), int(getattr(base, "in_features", 0)))


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the effective weight: wide enough that what an adapter adds to a narrow weight is not rounded away. What is
    computed by a parametrization is computed as it is.
    """
    original = original_of(module)
    if original is not None:
        return original.dtype
    weight = base_weight(module)
    known = isinstance(weight, Tensor) and weight.is_floating_point()
    return torch.promote_types(weight.dtype, torch.float32) if known else torch.float32  # type: ignore[union-attr]


@torch.no_grad()
def effective_weight(module: nn.Module) -> Tensor:
    """The weight that an adapted layer computes with, of `shape_of` and `dtype_of`: W itself where no adapter counts.

    Raises whatever the adapters raise where they can't be merged. The layer is left as it is.
    """
    if original_of(module) is not None:
        return computed_weight(module)
    layer: Any = module
    weight = base_of(module).weight
    dtype = dtype_of(module)
    assert isinstance(weight, Tensor)
    pieces = in_pieces(module)
    if pieces is not None:
        return pieces.whole()
    packed = not weight.is_floating_point()
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        if packed:
            return _with_deltas(layer, dtype)
        if layer.disable_adapters != layer.merged:  # both: what was merged is taken off again as soon as it runs
            return weight.to(dtype)
        twin: Any = _twin(module, dtype)
        twin.unmerge() if layer.merged else twin.merge()
        merged = base_of(twin).weight
        assert isinstance(merged, Tensor)
        return merged.detach()


def in_pieces(module: nn.Module) -> InPieces | None:
    """The same, made piece by piece: of a layer on a CPU whose active adapters are all plain LoRA; else None."""
    layer: Any = module
    own = vars(module)
    if _kind(module) != _LORA or "merge" in own or "get_delta_weight" in own or layer.disable_adapters or layer.merged:
        return None
    weight = layer.base_layer._parameters.get("weight")
    is_plain = type(weight) is nn.Parameter and weight.is_floating_point()
    if not (is_plain and weight.is_cpu and weight.is_contiguous()):
        return None
    rows, columns = weight.shape
    # Where a product is small or of float64, that of transposed factors rounds otherwise than PEFT's, which a merge
    # between two edits would show.
    if layer.fan_in_fan_out and (weight.numel() <= _SMALL or weight.dtype == torch.float64):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    added = [_low_rank(layer, name) for name in names]
    if not added or None in added:
        return None
    dtype = dtype_of(module)
    known = [each for each in added if each is not None]
    return InPieces((rows, columns), dtype, partial(_pieces, weight.detach(), known, dtype), _sum(weight, known, dtype))


def _sum(weight: Tensor, added: Sequence[_LowRank], dtype: torch.dtype) -> LowRankSum | None:
    """The same in one, where that is a sum of two in fp32."""
    if len(added) != 1 or not added[0].left.dtype == added[0].dtype == dtype == torch.float32:
        return None
    return LowRankSum(weight.detach(), added[0].left, added[0].right, added[0].scale)


@dataclass(frozen=True)
class _LowRank:
    """What one adapter adds to a weight: scale · left @ right, rounded to a dtype. left: [rows of the weight, rank]."""

    left: Tensor
    right: Tensor
    scale: float
    dtype: torch.dtype


def _low_rank(layer: Any, name: str) -> _LowRank | None:
    """None for DoRA and other kinds of it, and where the factors are no plain layers on a CPU."""
    a, b, own = layer.lora_A[name], layer.lora_B[name], vars(layer)
    varied = name in own.get("lora_variant", ()) or own.get("use_dora", {}).get(name)
    if varied or not all(type(each) is nn.Linear and each.weight.is_cpu for each in (a, b)):
        return None
    left, right = b.weight.detach(), a.weight.detach()
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.float(), right.float()  # as PEFT does on a CPU
    if layer.fan_in_fan_out:
        left, right = right.t().contiguous(), left.t().contiguous()
    return _LowRank(left, right, float(layer.scaling[name]), b.weight.dtype)


@torch.no_grad()
def _pieces(weight: Tensor, added: Sequence[_LowRank], dtype: torch.dtype) -> Iterator[Tensor]:
    rows, columns = weight.shape
    step = rows_of_a_piece(columns)
    rooms = [torch.empty(min(step, rows), columns, dtype=each.left.dtype) for each in added]
    for start in range(0, rows, step):
        piece = weight[start : start + step]
        for each, room in zip(added, rooms, strict=True):
            product = torch.mm(each.left[start : start + step], each.right, out=room[: piece.shape[0]])
            if each.scale != 1:
                product.mul_(each.scale)
            if product.dtype == each.dtype == dtype:
                piece = torch.add(piece, product, out=product)
            else:
                piece = (piece.to(dtype) + product.to(each.dtype)).to(dtype)
        yield piece


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class Parts:
    """What the weight of an adapted layer was last made of: the adapters' tensors bit by bit, for they are small, and
    where its base weight lay.
    """

    def __init__(self, module: nn.Module) -> None:
        self._settings, self._base = _settings(module), _marks(module)
        self._own = {name: tensor.detach().clone() for name, tensor in _own_tensors(module)}

    def are_those_of(self, module: nn.Module) -> bool:
        """Whether the weight would be the same now. A write to the base weight through ``.data`` is not seen. Waits
        for an accelerator.
        """
        if self._settings != _settings(module) or self._base != _marks(module):
            return False
        now = dict(_own_tensors(module))
        return now.keys() == self._own.keys() and all(same_bits(now[name], was) for name, was in self._own.items())


def _settings(module: nn.Module) -> tuple[object, ...]:
    if original_of(module) is not None:
        return ()
    layer: Any = module
    scaling = getattr(layer, "scaling", {})
    return (layer.disable_adapters, *layer.merged_adapters, *layer.active_adapters, *scaling.items())


def _of_base(module: nn.Module) -> list[Tensor]:
    original = original_of(module)
    return list(base_of(module).parameters()) if original is None else [original]


def _marks(module: nn.Module) -> list[tuple[int, int, int]]:
    return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in _of_base(module)]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    base = {id(tensor) for tensor in _of_base(module)}
    held = named_tensors_of(named_modules_of(module))
    return ((name, tensor) for name, tensor in held if id(tensor) not in base)


def _with_deltas(layer: Any, dtype: torch.dtype) -> Tensor:
    """Of a packed layer: merging would pack it anew, and round away what the adapters add."""
    from peft.utils.integrations import dequantize_module_weight  # whose layer this is

    base = copy.copy(base_of(layer))
    vars(base).update({name: copy.copy(held) for name, held in vars(base).items() if name in ("_parameters", "state")})
    weight: Tensor = dequantize_module_weight(base).to(dtype)
    if not (layer.disable_adapters or layer.merged):
        there = set(layer._get_available_adapters())
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name).to(weight) if name in there else weight
    return weight


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A layer that shares the adapters' tensors, and has a base layer, lists and caches of its own."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(held) for name, held in vars(module).items() if isinstance(held, _OWN)})
    inner = _child(module, _INNER)
    if isinstance(inner, nn.Module):
        twin._modules[_INNER] = _twin(inner, dtype)
    else:  # the base layer
        for name, tensor in module._parameters.items():
            if tensor is not None:
                twin._parameters[name] = nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)
    return twin
