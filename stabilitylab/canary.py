"""The canary: a small fixed batch that is forwarded after each edit, and where a model's answer keeps its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stabilitylab.errors import UsageError
from stabilitylab.hooks import ModelCall, run_silently

Canary = Mapping[str, Any] | Tensor | Callable[[nn.Module], Any] | str
"""Keyword arguments or input ids for the model, a function of it, or ``"replay"``: the edit's own input again."""

REPLAY = "replay"
_LOGITS_DIMENSIONS = 2


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output: ``.logits``, ``["logits"]``, the tensor itself or the first of a tuple."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    usable = isinstance(found, Tensor) and found.is_floating_point() and found.dim() >= _LOGITS_DIMENSIONS
    return found if usable and found.numel() else None


def mask_of(kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
    """The attention mask that went into a model, or that came back with its output."""
    for found in (kwargs.get("attention_mask"), getattr(output, "attention_mask", None)):
        if isinstance(found, Tensor):
            return found
    return None


def check(canary: Canary | None) -> None:
    """Raises UsageError for a canary of no known form."""
    known = canary is None or isinstance(canary, Mapping | Tensor) or callable(canary) or canary == REPLAY
    if not known:
        raise UsageError(
            f"canary={canary!r} is not usable; expected a dict of model arguments, a tensor of input ids, "
            "a function of the model, or 'replay'"
        )


def describe(canary: Canary | None) -> str | None:
    """What the canary is, in a few words, for the manifest."""
    if canary is None or isinstance(canary, str):
        return canary
    if isinstance(canary, Mapping):
        shapes = {name: list(value.shape) for name, value in canary.items() if isinstance(value, Tensor)}
        return f"batch {shapes}"
    return f"input ids {list(canary.shape)}" if isinstance(canary, Tensor) else f"function {canary!r}"


def forward(model: nn.Module, canary: Canary, last_call: ModelCall | None) -> tuple[Tensor, Tensor | None] | None:
    """(logits, attention mask) of the canary on `model`; None for a replay before any edit.

    Runs in evaluation mode without gradients; RNG and module modes are as before. Raises ValueError when the model's
    output holds no logits.
    """
    kwargs: Mapping[str, Any] = {}
    if isinstance(canary, Mapping):
        kwargs = canary
        output = run_silently(model, lambda: model(**canary))
    elif isinstance(canary, Tensor):
        output = run_silently(model, lambda: model(canary))
    elif callable(canary):
        output = run_silently(model, lambda: canary(model))
    elif last_call is None:
        return None
    else:
        kwargs = last_call.kwargs
        output = run_silently(model, lambda: model(*last_call.args, **last_call.kwargs))
    logits = logits_of(output)
    if logits is None:
        raise ValueError(f"the canary's output ({type(output).__name__}) holds no logits")
    mask = mask_of(kwargs, output)
    return logits.detach(), mask
