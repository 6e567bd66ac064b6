"""What a model answers: where its output has the logits, and what text they are to predict."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from stabilitylab.probes.canary_places import IGNORED, MOST, next_tokens, real_tokens
from stabilitylab.watching.canary import Batch, Canary, Selector
from stabilitylab.watching.model_call import ModelCall
from stabilitylab.watching.one_hook import run_silently

_ROUNDING: Final = 4.0
"""Units of rounding by which the logits of other places may differ when one token is replaced: where the work is split
up differently, as between a mixture's experts."""
_NAMED: Final = 4
_BY_NAME: Final = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
_MANY: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Answer:
    """What a forward gave. logits: [batch, (positions,) vocabulary]. mask, tokens, labels: [batch, length], of the
    logits' positions or of their last ones; None where there are none, or none that can be told. The tokens are those
    that went in, the labels what was wanted of the logits in their own places.
    """

    logits: Tensor
    mask: Tensor | None
    tokens: Tensor | None
    labels: Tensor | None = None


def logits_of(output: Any, select: Selector | None = None) -> Tensor | None:
    """The logits in a model's output: ``.logits``, ``["logits"]``, the tensor itself or the first of a tuple; or what
    `select` says. One number a row, [batch], becomes [batch, 1]; one-dimensional logits that were selected are a row.
    """
    if select is not None:
        return _selected(output, select)
    found = _named(output, "logits")
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not _holds_numbers(found):
        return None
    logits: Tensor = found
    return logits[:, None] if logits.dim() == 1 else logits


def _selected(output: Any, select: Selector) -> Tensor | None:
    found = _named(output, select) if isinstance(select, str) else select(output)
    if not _holds_numbers(found):
        return None
    logits: Tensor = found
    return logits[None] if logits.dim() == 1 else logits


def _itself(output: Any) -> Any:
    return output


def _named(output: Any, name: str) -> Any:
    found = getattr(output, name, None)
    return output.get(name) if found is None and isinstance(output, Mapping) else found


def _holds_numbers(found: Any) -> bool:
    return isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 0 and found.numel() > 0


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output, ``.loss`` or ``["loss"]``: a scalar, or None."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 and found.is_floating_point() else None


def mask_of(kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
    """The attention mask that went into a model, or that came back with its output."""
    return _tensor(kwargs.get("attention_mask"), getattr(output, "attention_mask", None))


def _tensor(*values: Any) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)


def _takes(model: nn.Module) -> list[inspect.Parameter]:
    """What a call of the model takes; nothing where that can't be told. An editor's wrapper may have a ``__call__`` of
    its own, and no ``forward`` (GRACE).
    """
    has_forward = "forward" in vars(model) or type(model).forward is not nn.Module.forward
    try:
        return list(inspect.signature(model.forward if has_forward else model.__call__).parameters.values())
    except (TypeError, ValueError):
        return []


def _takes_it_whole(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model takes one dict, such as ``samples``, and not what is in it."""
    taken = _takes(model)
    named = [each.name for each in taken if each.kind not in _MANY]
    return len(named) == len(taken) and bool(named) and not any(name in batch for name in named)


def _takes_names_alone(model: nn.Module) -> bool:
    """Whether the model can be called with keyword arguments and no others."""
    taken = _takes(model)
    return bool(taken) and all(each.kind in _BY_NAME for each in taken)


def _reads_apart(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the input ids and their mask belong to an encoder, and not to the positions of the logits."""
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(encoder) or any(name.startswith("decoder_") for name in kwargs)


def forward(model: nn.Module, canary: Canary, last_call: ModelCall | None) -> Answer | None:
    """What a canary's batch gives on `model`; None for a replay before any edit.

    Runs in evaluation mode without gradients; RNG and module modes are as before. Waits for nothing that the model
    itself does not wait for. Raises ValueError when the model's output holds no logits.
    """
    kwargs: Mapping[str, Any] = {}
    if canary.is_replay:
        if last_call is None:
            return None
        last_call.check()
        kwargs = last_call.kwargs
        output = run_silently(model, lambda: last_call.again(model))
    else:
        kwargs = canary.batch if isinstance(canary.batch, Mapping) else {}
        kwargs = {"input_ids": canary.batch} if isinstance(canary.batch, Tensor) else kwargs
        try:
            output = _output(model, canary.batch)
        except Exception:
            answer = _row_by_row(model, canary)
            if answer is None:
                raise
            return answer
    chosen = callable(canary.batch) and isinstance(output, Tensor)
    logits = logits_of(output, _itself if chosen and canary.logits is None else canary.logits)
    if logits is None:
        raise ValueError(_no_logits(output, canary.logits))
    labels = _tensor(kwargs.get("labels"))
    if _reads_apart(model, kwargs):
        mask = _tensor(kwargs.get("decoder_attention_mask"))
        return Answer(logits.detach(), mask, _tensor(kwargs.get("decoder_input_ids")), labels)
    return Answer(logits.detach(), mask_of(kwargs, output), _tensor(kwargs.get("input_ids")), labels)


def _row_by_row(model: nn.Module, canary: Canary) -> Answer | None:
    """The same, one row after the other: what an editor put into a layer may take no batch (GRACE, where it replaces
    the prompt). None where there are no rows, or one.
    """
    rows = _rows(canary.batch)
    found = [forward(model, replace(canary, batch=row), None) for row in rows]
    if not found:
        return None
    logits, mask, tokens, labels = (
        torch.cat(parts) if all(isinstance(part, Tensor) for part in parts) else None
        for parts in ([getattr(each, name) for each in found] for name in ("logits", "mask", "tokens", "labels"))
    )
    return None if logits is None else Answer(logits, mask, tokens, labels)


def _rows(batch: Batch) -> list[Batch]:
    """A batch of several rows, row by row; empty for anything else."""
    if isinstance(batch, Tensor):
        return [batch[at : at + 1] for at in range(len(batch))] if batch.dim() and len(batch) > 1 else []
    if not isinstance(batch, Mapping):
        return []
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    sizes = {len(value) for value in tensors.values()}
    if len(sizes) != 1 or sizes == {1}:
        return []
    return [{**batch, **{name: value[at : at + 1] for name, value in tensors.items()}} for at in range(sizes.pop())]


def _callable_in(model: nn.Module) -> nn.Module:
    """The model, or the ``model`` in a wrapper that can't be called itself (MELO)."""
    own = "forward" in vars(model) or type(model).forward is not nn.Module.forward
    inner = getattr(model, "model", None)
    can = own or type(model).__call__ is not nn.Module.__call__
    return inner if not can and isinstance(inner, nn.Module) else model


def _output(model: nn.Module, batch: Batch) -> Any:
    if not callable(batch):
        model = _callable_in(model)
    if isinstance(batch, Mapping):
        return run_silently(model, lambda: model(batch) if _takes_it_whole(model, batch) else model(**batch))
    if isinstance(batch, Tensor):
        return run_silently(model, lambda: model(input_ids=batch) if _takes_names_alone(model) else model(batch))
    assert callable(batch)  # a replay has no batch
    return run_silently(model, lambda: batch(model))


def _no_logits(output: Any, select: Selector | None) -> str:
    """One line that says what else there is."""
    held = (
        output.items() if isinstance(output, Mapping) else vars(output).items() if hasattr(output, "__dict__") else ()
    )
    named = [f"'{name}' {list(value.shape)}" for name, value in held if _holds_numbers(value)][:_NAMED]
    where = "" if select is None else f" in {select!r}"
    has = f", but {', '.join(named)}" if named else ""
    return (
        f"the canary's output ({type(output).__name__}) holds no logits{where}{has}; expected them to be named, as by"
        " sl.Canary(batch, logits='NAME'), or by a function of the output"
    )


def targets_of(model: nn.Module, canary: Canary, answer: Answer) -> Tensor | None:
    """What the logits are to predict: int64 [batch, positions], `IGNORED` where nothing; None where there is no text.

    Each token's successor, if what the model says at a token can't have seen it. Otherwise, as for a masked language
    model, and for a decoder that is fed from the labels, those in their own places. Forwards the canary once more where
    that has to be tried.
    """
    tokens, labels = answer.tokens, answer.labels
    batch, *positions = answer.logits.shape[:-1]
    if len(positions) != 1:
        return None
    if _fits(tokens, batch, positions[0]) and not _reads_ahead(model, canary, answer):
        assert tokens is not None
        return next_tokens(tokens, answer.mask, positions[0])
    if not _fits(labels, batch, positions[0]):
        return None
    assert labels is not None
    found = labels.new_full((batch, positions[0]), IGNORED)
    found[:, positions[0] - labels.shape[1] :] = labels
    return found


def _fits(tokens: Tensor | None, batch: int, positions: int) -> bool:
    if tokens is None or tokens.dim() != 2 or tokens.is_floating_point():
        return False
    return tokens.shape[0] == batch and 1 < tokens.shape[1] <= positions


def _reads_ahead(model: nn.Module, canary: Canary, answer: Answer) -> bool:
    """Whether what the model says at a token depends on those after it: tried, by another last token."""
    tokens = answer.tokens
    if canary.is_replay or tokens is None:
        return False
    batch, positions = answer.logits.shape[:2]
    length = tokens.shape[1]
    real = real_tokens(batch, positions, answer.mask, tokens.device)[:, positions - length :]
    last = real & (real.cumsum(dim=1) == real.sum(dim=1, keepdim=True))
    other = torch.where(last, torch.where(tokens > 0, tokens - 1, tokens + 1), tokens)
    asked = other if isinstance(canary.batch, Tensor) else {**_mapping(canary.batch), _name(model, canary.batch): other}
    try:
        again = forward(model, Canary(asked, logits=canary.logits), None)
    except Exception:  # such as where the other token stands for an image
        return False
    assert again is not None
    rows, places = (real & ~last).nonzero(as_tuple=True)
    rows, places = rows[-MOST:], places[-MOST:] + positions - length
    was, now = (each.logits[rows, places].double() for each in (answer, again))
    numbers = was.isfinite() & now.isfinite()
    moved, size = (now - was)[numbers].abs().sum(), was[numbers].abs().sum()
    return bool(moved > _ROUNDING * torch.finfo(answer.logits.dtype).eps * size)


def _mapping(batch: Batch) -> Mapping[str, Any]:
    assert isinstance(batch, Mapping)
    return batch


def _name(model: nn.Module, batch: Batch) -> str:
    """The argument that holds the tokens of the logits."""
    return "decoder_input_ids" if _reads_apart(model, _mapping(batch)) else "input_ids"
