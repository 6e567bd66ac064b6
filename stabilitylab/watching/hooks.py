"""Every hook that we put on a model, owned by one ExitStack, and the buffers they fill. Computes no statistic.

Hooks live inside one edit only: `Capture` is entered when the edit begins and finds its modules by name then, since the
last edit may have swapped, wrapped or deep-copied them. Leaving it removes them all, whatever was raised.

A layer's δ is caught by a hook on the autograd node that made its output. A tensor hook on the output itself would
silently never fire where the output is a view that is then changed in place (a biased 3-D Linear before `relu_`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from stabilitylab.watching.answer import loss_of
from stabilitylab.watching.model_call import ModelCall, version_of
from stabilitylab.watching.one_hook import Hook, put
from stabilitylab.watching.walking import NamedModules

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

EDITOR_CALL_LIMIT = 64
"""Calls of one editor module whose inputs are kept within an edit."""


class Watcher(Protocol):
    """What hears of the passes inside an edit, while they happen. Exceptions it raises are its own to catch.

    fired: which module it was, by `id`: an edit may copy a layer, and original and copy must not be mixed.
    """

    def layer_output(self, site: str, fired: int, output: Tensor) -> None:
        """A layer was run. Its output may be overwritten a moment later."""

    def layer_pass(self, site: str, fired: int, x: Tensor, delta: Tensor, product: Tensor | None) -> None:
        """A backward answered a forward of a layer: its input and the gradient δ at its output, of the same tokens.

        product: what the backward made of the two by itself, [in, out], where it did: the loop's, and not to be kept.
        """

    def overwritten(self, site: str) -> None:
        """A backward answered a forward whose input was changed in place since: its gradient can't be told."""

    def adopts(self, site: str, weight: Tensor) -> bool:
        """Whether to tell of what backwards add to the `.grad` of this weight, from now to the edit's end."""

    def accumulated(self, site: str, weight: Tensor) -> None:
        """A backward has added to it."""

    def backward_ended(self) -> None:
        """A backward that has added to some is over, an all-reduce that belongs to it included."""

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""

    @property
    def awaits_norm(self) -> bool:
        """Whether to tell of the next normalisation."""

    def norm_input(self, entering: Tensor) -> None:
        """A normalisation is about to run on this tensor."""

    def model_called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The whole model is about to run."""

    def model_output(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """The whole model was run."""

    def loss_answered(self, weight: Tensor) -> None:
        """A backward has come to the loss in what the model gave. weight: the derivative with respect to it."""


@dataclass
class EditorBuffer:
    """The positional tensors of each call of one editor module: (u, v) for a MEND transform."""

    calls: list[tuple[Tensor, ...]] = field(default_factory=list)


def plain(tensor: Tensor) -> Tensor | None:
    """The values of `tensor` outside of any ``torch.func`` transform; None inside ``vmap``, where it is many in one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if not torch._C._functorch.is_gradtrackingtensor(tensor):
            return None
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


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


_PRODUCTS = {"MmBackward0": 1, "AddmmBackward0": 2}
"""Autograd nodes of a product of tokens with a weight, and where the weight's gradient is among what they give back."""


def _product_at(node: Any) -> tuple[Any, int | None]:
    """(the node that the layer's δ reaches, where it gives back the product of δ and the input); None where it doesn't.

    It does where the weight, or what it was made from, asks for a gradient.
    """
    if node.name() == "UnsafeViewBackward0":  # of a Linear without bias, from more dimensions than two
        inner = node.next_functions[0][0]
        node = inner if inner is not None and inner.name() in _PRODUCTS else node
    at = _PRODUCTS.get(node.name())
    return node, None if at is None or node.next_functions[at][0] is None else at


_known_ids: list[int] = []
"""Of hooks on all optimizers, those that no open edit has now."""


def _take_known_id(handle: RemovableHandle) -> None:
    """A compiled step is guarded by the ids of these hooks: a new one would have it compiled anew at each edit."""
    table = handle.hooks_dict_ref()
    if _known_ids and table is not None:
        hook = table.pop(handle.id)
        handle.id = _known_ids.pop()
        table[handle.id] = hook


class Capture:
    """The hooks of one edit. A context manager; what it caught stays readable after it is left, until `clear`.

    asked: the sites whose layers hooks were put on. answered: those that were called and gave a value that can be read.
    batched: those that were called inside ``vmap``. heard: whether any hook, or the whole model's, fired.

    Each (forward, backward) pair is a pass of its own: two backwards through one forward, or two forwards before one
    backward, are never added up. A forward's input is held by its own autograd node, and so as long as the graph.
    """

    def __init__(self, watcher: Watcher, compiled: Mapping[int, str] | None = None) -> None:
        """compiled: the modules that run as compiled code, see `inside_compiled`."""
        self.editors: dict[str, EditorBuffer] = {}
        self.model_call: ModelCall | None = None
        self._call: ModelCall | None = None
        self.asked: set[str] = set()
        self.answered: set[str] = set()
        self.batched: set[str] = set()
        self.heard = self.heard_itself = False
        """Whether the model, or a layer of it, was run: it or a copy of it, and itself."""
        self.broken: list[str] = []
        """What hooks raised, which are off then."""
        self.compiled: dict[str, str] = {}
        """Layers that can't be looked into, since they run as compiled code: the name of what was compiled."""
        self._compiled = compiled or {}
        self._tokens: tuple[int, int] | None = None
        self._watcher = watcher
        self._gave: Callable[[Any], None] | None = None
        self._left = False
        self._backward = -1
        self._stack = contextlib.ExitStack()
        self._adopted: set[tuple[str, int]] = set()
        """Whose `.grad` is listened to, by `id`: the watcher holds them to the edit's end."""
        self._handles: list[RemovableHandle] = []
        self._stack.callback(self._remove)

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        self._stack.close()

    @property
    def stack(self) -> contextlib.ExitStack:
        """What ends with the edit: whoever enters something inside it leaves it here."""
        return self._stack

    def own(self, handle: RemovableHandle) -> None:
        """Remove this handle when the edit ends."""
        self._handles.append(handle)

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def hook(self, action: Callable[..., None]) -> Hook:
        """`action` as a hook that falls silent when the edit ends."""
        return Hook(action, self._broke)

    def _broke(self, error: BaseException) -> None:
        self.broken.append(f"{type(error).__name__}: {error}")

    def _put(self, module: nn.Module, hook: Hook, *, before: bool = False, with_kwargs: bool = False) -> None:
        put(self._stack, module, hook, before=before, with_kwargs=with_kwargs)

    def watch_layer(self, site: str, module: nn.Module, factors: bool) -> None:
        """Hook one layer; with `factors`, its input and δ too. Of one that is compiled only what becomes of `.grad`."""

        if id(module) in self._compiled:
            self.compiled[site] = self._compiled[id(module)]
            if factors:
                self._watch_gradient(site, module)
            return
        self.asked.add(site)

        def after_forward(fired: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._hear(fired is module)
            y = _first_tensor(output)
            if y is None or not y.is_floating_point() or y.numel() == 0:
                return
            x, values = _first_tensor(args), plain(y)
            (self.batched if values is None else self.answered).add(site)
            if values is not None:
                self._watcher.layer_output(site, id(fired), self._as_sequence(fired, values.detach()))
            if factors and y.requires_grad:
                self._watch_gradient(site, fired)
                if x is not None:
                    self._await_delta(site, id(fired), x, y)

        self._put(module, self.hook(after_forward))
        if factors:
            self._watch_gradient(site, module)

    def _hear(self, itself: bool) -> None:
        self.heard = True
        self.heard_itself = self.heard_itself or itself

    def before_calls(self, module: nn.Module, action: Callable[[], None]) -> None:
        """Do this before each forward of a layer, unless it is compiled."""
        if id(module) not in self._compiled:
            self._put(module, self.hook(lambda *_: action()), before=True)

    def _watch_gradient(self, site: str, module: nn.Module) -> None:
        """Likewise of a layer's weight, which may become a leaf that asks for a gradient inside the edit."""
        weight = module._parameters.get("weight")
        if weight is not None:
            self.watch_leaf(site, weight)

    def watch_leaf(self, site: str, weight: Tensor) -> None:
        """Hear when a backward adds to a weight's `.grad`."""
        if (site, id(weight)) in self._adopted or not self._watcher.adopts(site, weight):
            return
        self._adopted.add((site, id(weight)))

        def accumulated(leaf: Tensor) -> None:
            self._watcher.accumulated(site, leaf)
            self._await_end()

        register: Callable[..., RemovableHandle] = weight.register_post_accumulate_grad_hook
        self.own(register(self.hook(accumulated)))

    def _await_end(self) -> None:
        """Hear, once, when the backward that is under way is over."""
        backward = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        self._backward = backward
        engine, ended = torch.autograd.Variable._execution_engine, self.hook(self._watcher.backward_ended)
        # Twice: what was queued in between, such as an all-reduce of the gradients, comes first.
        engine.queue_callback(lambda: engine.queue_callback(ended))

    def watch_optimizers(self) -> None:
        """Hear of each optimizer's step."""

        def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._watcher.optimizer_steps(optimizer)

        handle = register_optimizer_step_pre_hook(self.hook(before_step))
        _take_known_id(handle)
        self._stack.callback(_known_ids.append, handle.id)
        self.own(handle)

    def _await_delta(self, site: str, fired: int, x: Tensor, y: Tensor) -> None:
        node, values = _node_of(y), plain(x)
        if node is None or values is None:
            return
        held = values.detach()
        reached, place = _product_at(node)
        answered = functools.partial(self._answered, site, fired, held, version_of(values), place)
        register = reached.register_prehook if place is None else reached.register_hook
        # Not by `hook`, which the stack would hold to the edit's end, and with it the input of every forward.
        self.own(register(self.hook(answered)))

    def _answered(
        self, site: str, fired: int, x: Tensor, version: int | None, place: int | None, *gradients: tuple[Any, ...]
    ) -> None:
        """A backward has come to a layer's output; or past it where that gives the product, as one of the first."""
        reached = gradients[-1]
        delta = plain(reached[0]) if reached and reached[0] is not None else None
        if self._left or delta is None:
            return
        if version is not None and x._version != version:
            self._watcher.overwritten(site)
            return
        given = None if place is None else gradients[0][place]
        self._watcher.layer_pass(site, fired, x, delta.detach(), None if given is None else plain(given))

    def _as_sequence(self, module: nn.Module, y: Tensor) -> Tensor:
        """`y` as [batch, positions, features] where the layer got its tokens in one flat dimension (OPT's fc1).

        [batch, features] where the last dimensions are no positions and features, but a signal or an image.
        """
        if isinstance(module, _CHANNELS_FIRST):
            return y.flatten(1)
        if y.dim() == 2 and self._tokens is not None and y.shape[0] == self._tokens[0] * self._tokens[1]:
            return y.reshape(*self._tokens, -1)
        return y

    def watch_model(self, model: nn.Module) -> None:
        """Hook the whole model: its first call's arguments and output."""

        if id(model) in self._compiled:
            return

        def before_forward(fired: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._hear(fired is model)
            self._tokens = _token_shape(args, kwargs)
            if self.model_call is None:
                self._call = ModelCall.of(args, kwargs)  # before the model may take anything out of a dict
            self._watcher.model_called(args, kwargs)

        self._put(model, self.hook(before_forward), before=True, with_kwargs=True)

        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.model_call is None:
                self.model_call = self._call
            if self._gave is not None:
                self._gave(output)
            self._watcher.model_output(kwargs, output)
            self._await_loss(output)

        self._put(model, self.hook(after_forward), with_kwargs=True)

    def _await_loss(self, output: Any) -> None:
        loss = loss_of(output)
        if loss is None or loss.grad_fn is None:
            return
        place = loss.output_nr

        def answered(reached: tuple[Tensor | None, ...]) -> None:
            weight = reached[place]
            if weight is not None and not self._left:
                self._watcher.loss_answered(weight)

        self.own(loss.grad_fn.register_prehook(self.hook(answered)))

    def watch_output(self, gave: Callable[[Any], None]) -> None:
        """Tell what the whole model returns, as it is, by the hook that it has: one more would be compiled anew."""
        self._gave = gave

    def watch_norms(self, named: NamedModules) -> None:
        """Hook each normalisation among a model's modules, known by its class's name: what enters it, as long as anyone
        waits for that. When each layer that was asked has answered, the hooks go: an edit may pass the model 25 times.
        """
        until_answered = self._stack.enter_context(contextlib.ExitStack())

        def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._watcher.awaits_norm:
                if self.asked <= self.answered | self.batched:
                    until_answered.close()
                return
            entering = _first_tensor(args)
            values = None if entering is None else plain(entering)
            if values is not None and values.is_floating_point() and values.numel():
                self._watcher.norm_input(values.detach())

        hook = self.hook(before_forward)
        for _, module in named:
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and id(module) not in self._compiled:
                put(until_answered, module, hook, before=True)

    def watch_editor(self, name: str, module: nn.Module) -> None:
        """Hook one module of the editor: the tensors it is called with."""
        buffer = self.editors[name] = EditorBuffer()

        def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
            if len(buffer.calls) < EDITOR_CALL_LIMIT:
                buffer.calls.append(tuple(value.detach() for value in args if isinstance(value, Tensor)))

        self._put(module, self.hook(before_forward), before=True)

    def clear(self) -> None:
        """Let go of everything captured."""
        self.editors.clear()
        self.model_call = self._call = None
