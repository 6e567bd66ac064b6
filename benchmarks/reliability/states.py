"""All that an edit loop could see of a monitor, as digests by name: two loops are the same where these are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizers

from benchmarks.reliability.promise import digest

State = dict[str, str]
_KINDS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
_DEPTH: Final = 3


def bits(tensor: Tensor) -> str:
    """Of the values, every NaN's payload among them."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tuple(tensor.shape)} {tensor.dtype} {digest(plain.view(torch.uint8).numpy().tobytes())}"


def state_of(model: nn.Module, editor: object) -> State:
    """Parameters, gradients, flags, modes, modules, hooks, the editor's tensors and the random numbers to come."""
    found: State = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        gradient = "none" if tensor.grad is None else bits(tensor.grad)
        hooks = len(tensor._backward_hooks or ()) + len(getattr(tensor, "_post_accumulate_grad_hooks", None) or ())
        found[f"tensor {name}"] = (
            f"{bits(tensor)} needs {tensor.requires_grad} leaf {tensor.is_leaf} hooks {hooks} ∇ {gradient}"
        )
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = sum(len(getattr(module, kind)) for kind in _KINDS)
        own = "forward" in vars(module)
        found[f"module {name}"] = f"{type(module).__qualname__} training {module.training} hooks {hooks} patched {own}"
    for where, tensor in _tensors(editor, "editor", _DEPTH):
        found[where] = bits(tensor)
    found["global hooks"] = str(
        [len(each) for name, each in sorted(vars(global_hooks).items()) if name.startswith("_global_") and _sized(each)]
        + [len(optimizers._global_optimizer_pre_hooks), len(optimizers._global_optimizer_post_hooks)]
    )
    found["random"] = " ".join([bits(torch.get_rng_state()), digest(repr(random.getstate()).encode()), _numpy_state()])
    found["modes"] = f"{torch.is_grad_enabled()} {torch.is_inference_mode_enabled()} {torch.get_default_dtype()}"
    return found


def _sized(value: object) -> bool:
    return isinstance(value, dict)


def _numpy_state() -> str:
    return digest(repr(np.random.get_state(legacy=False)).encode())  # noqa: NPY002 - the user's, not ours


def _tensors(held: object, where: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, models apart: those are looked at themselves."""
    if isinstance(held, Tensor):
        yield where, held
    elif depth and not isinstance(held, nn.Module):
        parts: list[tuple[Any, Any]] = []
        if isinstance(held, Mapping):
            parts = list(held.items())
        elif isinstance(held, list | tuple):
            parts = list(enumerate(held))
        elif hasattr(held, "__dict__"):
            parts = list(vars(held).items())
        for name, part in parts:
            yield from _tensors(part, f"{where}.{name}", depth - 1)


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names that differ."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
