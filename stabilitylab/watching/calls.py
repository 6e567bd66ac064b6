"""Calls of torch functions inside one edit, seen in passing: attention, and the solves of closed-form editors.

Fused attention shows its logits to no hook, and a solve is no module. A `CallWatch` sees such calls as they are made,
in the thread that entered it, and passes every one through untouched. Each torch call costs a little more while it is
entered, so it is entered only inside an edit in which a probe that is due needs it.

What it can't see: functions that C++, TorchScript or a compiled graph calls, flex and flash-attn attention, NumPy.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching.compiled import frames_compiled, is_compiled
from stabilitylab.watching.hooks import plain
from stabilitylab.watching.one_hook import Hook, logger, put
from stabilitylab.watching.own_work import is_under_a_mode_of_the_users, leave_function_stack, own_work
from stabilitylab.watching.walking import named_modules_of

SOLVE_LIMIT = 4
"""Solves per edit that are handed on: the first ones, and later ones that are larger than one of the largest so far."""

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_LOGITS_DIMENSIONS = 4


@dataclass(frozen=True)
class AttentionCall:
    """What one call of ``torch.nn.functional.scaled_dot_product_attention`` was given; its tensors detached.

    query: [..., heads, queries, width]. key: [..., key heads, keys, width]; fewer heads than the query's in
    grouped-query attention. mask: boolean or additive, broadcast to [..., heads, queries, keys]. scale: None for
    width^-½.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None


OnAttention = Callable[[str, AttentionCall], None]
"""(site, call)."""
OnLogits = Callable[[str, Tensor], None]
"""(site, logits [batch, heads, queries, keys] as they went into a softmax: scaled, the mask added)."""
OnSolve = Callable[[str, Tensor, Tensor | None, Tensor], None]
"""(``solve``, ``lstsq``, ``inverse`` or ``cholesky``; A; B, None for an inverse; X) of A X = B."""


def _usable(found: Any) -> Tensor | None:
    """A plain dense tensor with values, detached and out of any ``torch.func`` transform; None for anything else.

    Of a subclass (a sharded or quantised tensor) each operation of ours might be a collective, or not exist; one that
    is captured into a CUDA graph has no values yet.
    """
    if type(found) not in (Tensor, nn.Parameter) or found.is_nested or found.layout != torch.strided:
        return None
    if found.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    values = plain(found) if found.numel() and found.device.type != "meta" and found.is_floating_point() else None
    return None if values is None else values.detach()


def _would_show() -> bool:
    """Whether operations of ours would end up in what is being recorded here: a compiled or traced graph, or a dispatch
    mode, of which selective checkpointing would hand our results to the user's recomputation.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing() or is_under_a_mode_of_the_users()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


class CallWatch(TorchFunctionMode):
    """Sees calls of attention and of linear solves in this thread while it is entered; changes nothing.

    Of attention only the first call at each site is handed on: the innermost running module that `watch_attention`
    hooked, or ``model`` outside of them. A failure of ours ends the watching, never the user's call.
    """

    def __init__(
        self,
        on_attention: OnAttention | None = None,
        on_logits: OnLogits | None = None,
        on_solve: OnSolve | None = None,
    ) -> None:
        super().__init__()
        self._on_attention = on_attention
        self._on_logits = on_logits
        self._on_solve = on_solve
        self._thread: int | None = None
        self._running: list[str] = []
        self._seen: set[str] = set()
        self._sizes: list[int] = []
        self._factored = WeakTensorKeyDictionary()
        self._actions: dict[Any, Callable[..., None]] = {}
        if on_attention is not None:
            self._actions[nn.functional.scaled_dot_product_attention] = self._attention
        if on_logits is not None:
            softmaxes = (nn.functional.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)
            self._actions.update(dict.fromkeys(softmaxes, self._logits))
        if on_solve is not None:
            inverses = (torch.inverse, torch.linalg.inv, Tensor.inverse)
            self._actions.update(dict.fromkeys(inverses, self._inverse))
            self._actions[torch.linalg.solve] = self._solve
            self._actions[torch.linalg.lstsq] = self._lstsq
            self._actions[torch.linalg.cholesky] = self._cholesky
            self._actions.update(dict.fromkeys((torch.cholesky_solve, Tensor.cholesky_solve), self._cholesky_solve))

    def __enter__(self) -> CallWatch:
        self._thread = threading.get_ident()
        torch._C._push_on_torch_function_stack(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave, wherever in the stack it is by now: a mode that the user entered meanwhile stays entered. Left from
        another thread, it can only fall silent.
        """
        self._actions = {}
        self._factored.clear()
        if self._thread == threading.get_ident():
            leave_function_stack(self)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func` itself, then a look at what it was given."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler traces this very line, so the graph stays the user's
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not self._actions:
            return result
        try:
            action = self._actions.get(func)
            # What came out through `out` may have been written over what went in.
            if action is not None and kwargs.get("out") is None and not _would_show():
                # Nor may a mode of the user's see operations of ours, or a transform wrap their results.
                with (
                    own_work(),
                    torch._C.DisableTorchFunction(),
                    torch.no_grad(),
                    temporarily_clear_interpreter_stack(),
                ):
                    action(result, args, kwargs)
        except (Exception, SystemExit) as error:
            self._actions = {}
            logger.warning("stabilitylab: watching calls failed and is off for this edit: %r", error)
        return result

    # -- attention ------------------------------------------------------------------------------------------------

    def module_entered(self, name: str, *_: object) -> None:
        """A module that makes attention begins to run; for a hook before its forward."""
        # One that isn't inside of the last one follows a forward that ended in an exception.
        while self._running and not name.startswith(f"{self._running[-1]}."):
            self._running.pop()
        self._running.append(name)

    def module_left(self, name: str, *_: object) -> None:
        """It has run; for a hook after its forward."""
        if name in self._running:
            del self._running[self._running.index(name) :]

    def _attention(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _named(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, kwargs)
        query, key, mask = _usable(given["query"]), _usable(given["key"]), given.get("attn_mask")
        site = self._running[-1] if self._running else MODEL_SITE
        if query is None or key is None or site in self._seen or self._on_attention is None:
            return
        if mask is not None:
            mask = plain(mask) if type(mask) in (Tensor, nn.Parameter) else None
            if mask is None:
                return
            mask = mask.detach()
        self._seen.add(site)
        self._on_attention(site, AttentionCall(query, key, mask, bool(given.get("is_causal")), given.get("scale")))

    def _logits(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _named(("input", "dim"), args, kwargs)
        found = given["input"]
        if not self._running or self._running[-1] in self._seen or self._on_logits is None:
            return
        if found.dim() != _LOGITS_DIMENSIONS or given.get("dim") not in (-1, _LOGITS_DIMENSIONS - 1):
            return
        logits = _usable(found)
        if logits is not None:
            self._seen.add(self._running[-1])
            self._on_logits(self._running[-1], logits)

    # -- solves ---------------------------------------------------------------------------------------------------

    def _solve(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _named(("A", "B"), args, kwargs)
        self._hand_on("solve", given["A"], given["B"], x, given.get("left", True))

    def _lstsq(self, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _named(("input", "b"), args, kwargs)
        self._hand_on("lstsq", given["input"], given["b"], result[0])

    def _inverse(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        a = args[0] if args else kwargs["A"] if "A" in kwargs else kwargs["input"]
        self._hand_on("inverse", a, None, x)

    def _cholesky(self, factor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        a = _usable(args[0] if args else kwargs["input"])
        if a is not None and type(factor) is Tensor:
            self._factored[factor] = (a, _version(a))  # A lives as long as its factor does, or the edit

    def _cholesky_solve(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _named(("input", "input2"), args, kwargs)
        if given["input2"] in self._factored:
            a, version = self._factored[given["input2"]]
            if _version(a) == version:  # else A is no longer what was factored
                self._hand_on("cholesky", a, given["input"], x)

    def _hand_on(self, kind: str, a: Any, b: Any, x: Any, left: bool = True) -> None:
        system, right, solution = _usable(a), None if b is None else _usable(b), _usable(x)
        if system is None or solution is None or (right is None and b is not None) or self._on_solve is None:
            return
        if not left and right is not None:  # X A = B
            system, right, solution = system.mT, right.mT, solution.mT
        size = system.numel()
        if len(self._sizes) == SOLVE_LIMIT:
            least = min(self._sizes)
            if size <= least:
                return
            self._sizes.remove(least)
        self._sizes.append(size)
        self._on_solve(kind, system, right, solution)


def why_unwatchable(model: nn.Module) -> str | None:
    """Why calls can't be watched without changing what is computed; None where they can.

    ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` choose a slower kernel, which rounds differently, as soon as
    any torch function mode is entered or a hook is on them. What ``torch.compile`` made is compiled anew under a mode,
    without the calls being seen, and has failed so: once anything was compiled in this process, nothing is watched.
    """
    if frames_compiled() > 0:
        return "torch.compile is in use"
    fast = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
    for name, module in named_modules_of(model):
        if isinstance(module, fast):
            return f"{name or 'the model'} is a {type(module).__name__}, which rounds differently while it is watched"
        if is_compiled(module):
            return f"{name or 'the model'} is compiled"
    return None


def watch_attention(
    stack: contextlib.ExitStack, model: nn.Module, on_attention: OnAttention, on_logits: OnLogits
) -> str | None:
    """Until `stack` is closed, hand on the first attention call at each place of `model` in this thread.

    on_attention hears of fused calls, on_logits of the softmax of eager attention: over the last dimension of a 4-D
    tensor, inside a module whose class name holds ``attention`` or ``attn``. Returns None, or the reason why nothing is
    watched, see `why_unwatchable`.
    """
    reason = why_unwatchable(model)
    if reason is None:
        watch = stack.enter_context(CallWatch(on_attention, on_logits))
        for name, module in named_modules_of(model):
            if _ATTENTION.search(type(module).__name__):
                before = Hook(functools.partial(watch.module_entered, name or MODEL_SITE))
                after = Hook(functools.partial(watch.module_left, name or MODEL_SITE))
                put(stack, module, before, before=True)
                put(stack, module, after)
    return reason


def watch_solves(stack: contextlib.ExitStack, model: nn.Module, on_solve: OnSolve) -> str | None:
    """Until `stack` is closed, hand on the linear solves of this thread: the largest four, as `SOLVE_LIMIT` says.

    Those of ``torch.linalg.solve``, ``lstsq``, ``inv`` (``torch.inverse``) and of ``torch.linalg.cholesky`` followed by
    ``torch.cholesky_solve``. Returns None, or the reason why nothing is watched: what `model` computes would change.
    """
    reason = why_unwatchable(model)
    if reason is None:
        stack.enter_context(CallWatch(on_solve=on_solve))
    return reason
