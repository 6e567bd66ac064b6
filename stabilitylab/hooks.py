"""Every hook that we put on a model, owned by one ExitStack, and the buffers they fill. Computes no statistic.

Hooks live inside one edit only: `Capture` is entered when the edit begins and finds its modules by name then, since the
last edit may have swapped, wrapped or deep-copied them. Leaving it removes them all, whatever was raised.

A layer's δ is caught by a pre-hook on the autograd node that made its output. A tensor hook on the output itself would
silently never fire where the output is a view that is then changed in place (a biased 3-D Linear before `relu_`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("stabilitylab")

PENDING_LIMIT = 8
"""Forwards of one layer that may wait for their backward; further ones are counted, not kept."""

EDITOR_CALL_LIMIT = 64
"""Calls of one editor module whose inputs are kept within an edit."""


@dataclass
class Forward:
    """One forward through a layer: its input, held by reference, and the δ that came back, if any did."""

    x: Tensor
    version: int | None
    delta: Tensor | None = None

    @property
    def overwritten(self) -> bool:
        """Whether the input was changed in place since the forward."""
        return self.version is not None and self.x._version != self.version


@dataclass
class LayerBuffer:
    """What one layer showed inside the edit: the first forward that a backward answered, and how many there were."""

    forwards: int = 0
    backwards: int = 0
    pending: list[Forward] = field(default_factory=list)
    complete: Forward | None = None


@dataclass
class ModelCall:
    """The first call of the whole model inside the edit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class EditorBuffer:
    """The positional tensors of each call of one editor module: (u, v) for a MEND transform."""

    calls: list[tuple[Tensor, ...]] = field(default_factory=list)


class Hook:
    """What we put on a module: acts while its edit is open, and is nothing afterwards, wherever it was copied to.

    A layer that is deep-copied inside an edit takes its hooks along, and no handle owns the copies. They share this
    object, so they fall silent with the edit, and `sweep` finds them by their type.
    """

    def __init__(self, action: Callable[..., None]) -> None:
        self._action: Callable[..., None] | None = action

    @property
    def alive(self) -> bool:
        """Whether its edit is still open."""
        return self._action is not None

    def __call__(self, *args: Any) -> None:
        """Act, unless silent. A failure of ours ends this hook, never the user's forward."""
        if self._action is not None:
            try:
                self._action(*args)
            except Exception as error:
                self.fall_silent()
                logger.warning("stabilitylab: a hook failed and is off for this edit: %r", error)

    def fall_silent(self) -> None:
        """Do nothing from now on."""
        self._action = None

    def __deepcopy__(self, memo: object) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (Hook, (_nothing,))  # a model that is saved inside an edit holds no capture buffer


def _nothing(*_: Any) -> None:
    """The action of a hook that was saved with a model."""


def sweep(model: nn.Module) -> None:
    """Take the silent hooks of ours off every module of `model`."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and not hook.alive]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)


OnOutput = Callable[[str, Tensor], None]
OnModelOutput = Callable[[Mapping[str, Any], Any], None]


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _first_tensor(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    if isinstance(values, tuple | list) and values and isinstance(values[0], Tensor):
        return values[0]
    return None


def _token_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(batch, positions) of a call of the whole model, from its mask or its token ids."""
    for found in (kwargs.get("attention_mask"), kwargs.get("input_ids"), _first_tensor(args)):
        if isinstance(found, Tensor) and found.dim() == 2 and not found.is_floating_point():
            return found.shape[0], found.shape[1]
    return None


def _node_of(output: Tensor) -> Any:
    """The autograd node that made `output`, or its base's where the output is only another shape of it."""
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.grad_fn is not None
    return base.grad_fn if base is not None and whole else output.grad_fn


class Capture:
    """The hooks of one edit. A context manager; the buffers stay readable after it is left, until `clear`.

    on_output(site, output) and on_model_output(kwargs, output) are called inside the forward, for the first pass only:
    an output may be changed in place a moment later. Exceptions they raise are theirs to catch.
    """

    def __init__(self, on_output: OnOutput, on_model_output: OnModelOutput) -> None:
        self._watched: dict[str, dict[int, LayerBuffer]] = {}
        self.editors: dict[str, EditorBuffer] = {}
        self.model_call: ModelCall | None = None
        self._tokens: tuple[int, int] | None = None
        self._on_output = on_output
        self._on_model_output = on_model_output
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _own(self, handle: RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _hook(self, action: Callable[..., None]) -> Hook:
        hook = Hook(action)
        self._stack.callback(hook.fall_silent)
        return hook

    def watch_layer(self, site: str, module: nn.Module, factors: bool) -> None:
        """Hook one layer; with `factors`, its input and δ too."""
        self._watched[site] = {}

        def after_forward(fired: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            y = _first_tensor(output)
            if y is None or not y.is_floating_point() or y.numel() == 0:
                return
            # One buffer per module: an edit may copy the layer, and original and copy must not be mixed.
            buffers = self._watched[site]
            if not buffers:
                self._on_output(site, self._as_sequence(y))
            buffer = buffers.setdefault(id(fired), LayerBuffer())
            buffer.forwards += 1
            x = _first_tensor(args)
            if factors and x is not None and y.requires_grad:
                self._await_delta(buffer, x, y)

        self._own(module.register_forward_hook(self._hook(after_forward)))

    @property
    def layers(self) -> dict[str, LayerBuffer]:
        """By site, what the layer showed; of several copies of it, the first that a backward went through."""
        found = {}
        for site, buffers in self._watched.items():
            complete = [buffer for buffer in buffers.values() if buffer.complete is not None]
            found[site] = next(iter([*complete, *buffers.values()]), LayerBuffer())
        return found

    def _await_delta(self, buffer: LayerBuffer, x: Tensor, y: Tensor) -> None:
        node = _node_of(y)
        if node is None or buffer.complete is not None or len(buffer.pending) >= PENDING_LIMIT:
            return
        forward = Forward(x.detach(), _version_of(x))
        buffer.pending.append(forward)

        def before_backward(gradients: tuple[Tensor | None, ...]) -> None:
            buffer.backwards += 1
            # The first forward that a backward answers is the one that is kept; a second backward of it must not be
            # added to the first one's δ.
            if buffer.complete is None and gradients and gradients[0] is not None:
                forward.delta = gradients[0].detach()
                buffer.complete = forward
                buffer.pending.clear()

        self._own(node.register_prehook(before_backward))

    def _as_sequence(self, y: Tensor) -> Tensor:
        """`y` as [batch, positions, features] where the layer got its tokens in one flat dimension (OPT's fc1)."""
        if y.dim() == 2 and self._tokens is not None and y.shape[0] == self._tokens[0] * self._tokens[1]:
            return y.reshape(*self._tokens, -1)
        return y

    def watch_model(self, model: nn.Module) -> None:
        """Hook the whole model: its first call's arguments and output."""

        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._tokens = _token_shape(args, kwargs)

        self._own(model.register_forward_pre_hook(self._hook(before_forward), with_kwargs=True))

        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.model_call is None:
                self.model_call = ModelCall(args, kwargs)
                self._on_model_output(kwargs, output)

        self._own(model.register_forward_hook(self._hook(after_forward), with_kwargs=True))

    def watch_editor(self, name: str, module: nn.Module) -> None:
        """Hook one module of the editor: the tensors it is called with."""
        buffer = self.editors[name] = EditorBuffer()

        def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
            if len(buffer.calls) < EDITOR_CALL_LIMIT:
                buffer.calls.append(tuple(value.detach() for value in args if isinstance(value, Tensor)))

        self._own(module.register_forward_pre_hook(self._hook(before_forward)))

    def clear(self) -> None:
        """Let go of everything captured."""
        self._watched.clear()
        self.editors.clear()
        self.model_call = None


def run_silently(model: nn.Module, call: Callable[[], Any]) -> Any:
    """`call()` without gradients, in evaluation mode, and with the RNG and every module's mode put back after it."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return call()
    finally:
        for module in training:
            module.training = True
