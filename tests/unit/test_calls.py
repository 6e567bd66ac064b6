"""Watching calls changes nothing, sees each way to make them, and leaves nothing entered."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stabilitylab.watching.calls import AttentionCall, CallWatch, watch_attention, watch_solves
from stabilitylab.watching.one_hook import sweep
from tests.loops import hooks_on


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Grouped-query attention, fused or eager."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.eager:
            y = functional.dropout(functional.softmax(q @ k.mT / 2, dim=-1), 0.1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        z: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return z


class Model(nn.Module):
    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = Attention(eager), Attention(eager)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(torch.relu(self.first(x)))
        return z


class Heard:
    """What was handed on: shapes and sums, so that ops run where the callbacks run."""

    def __init__(self) -> None:
        self.fused: dict[str, AttentionCall] = {}
        self.logits: dict[str, Tensor] = {}
        self.sums: list[Tensor] = []

    def on_attention(self, site: str, call: AttentionCall) -> None:
        self.fused[site] = call
        self.sums.append(torch.stack([(call.query.double() @ call.key.double().mT).sum(), call.key.sum().double()]))

    def on_logits(self, site: str, logits: Tensor) -> None:
        self.logits[site] = logits
        self.sums.append(logits.double().softmax(-1).amax())

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Any:
        with contextlib.ExitStack() as stack:
            assert watch_attention(stack, model, self.on_attention, self.on_logits) is None
            yield self


def _backward(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    y.pow(2).sum().backward()
    return [y, *(parameter.grad for parameter in model.parameters())]


def _autograd_grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y.pow(2).sum(), list(model.parameters()), create_graph=True)]


def _no_grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def _inference(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [model(x)]


def _functional_call(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: (p * 2).detach().requires_grad_() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, weights, (x,))
    y.sum().backward()
    return [y, *(weight.grad for weight in weights.values())]


def _func_grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).pow(2).sum())(weights)
    return list(found.values())


def _vmap(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [torch.func.vmap(model, randomness="different")(x[:, None])]


def _checkpoint(reentrant: bool) -> Callable[[nn.Module, Tensor], list[Tensor]]:
    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters())]

    return run


def _selective_checkpoint(model: nn.Module, x: Tensor) -> list[Tensor]:
    saved = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    choices = checkpoints.CheckpointPolicy

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return choices.MUST_SAVE if op in saved else choices.PREFER_RECOMPUTE

    x = x.clone().requires_grad_()
    y = checkpoint(
        model, x, use_reentrant=False, context_fn=lambda: checkpoints.create_selective_checkpoint_contexts(policy)
    )
    y.pow(2).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in model.parameters())]


def _autocast(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return [*_backward(model, x)]


def _flops(model: nn.Module, x: Tensor) -> list[Tensor]:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    return [y, torch.tensor(counter.get_total_flops())]


WAYS = {
    "backward": _backward,
    "autograd.grad": _autograd_grad,
    "no_grad": _no_grad,
    "inference_mode": _inference,
    "functional_call": _functional_call,
    "func.grad": _func_grad,
    "vmap": _vmap,
    "checkpoint": _checkpoint(False),
    "reentrant checkpoint": _checkpoint(True),
    "selective checkpoint": _selective_checkpoint,
    "autocast": _autocast,
    "flop counter": _flops,
}
if not hasattr(checkpoints, "CheckpointPolicy"):  # torch 2.4
    del WAYS["selective checkpoint"]
UNHEARD = {"vmap", "selective checkpoint", "flop counter"}


@pytest.mark.parametrize("eager", [False, True], ids=["fused", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_results_gradients_and_random_state_are_the_same_bits(way: str, eager: bool) -> None:
    x = torch.randn(3, 5, 8)
    model = Model(eager)
    torch.manual_seed(1)
    plain = WAYS[way](model, x)
    state = torch.get_rng_state()
    model = Model(eager)
    torch.manual_seed(1)
    with Heard().watch(model) as heard:
        watched = WAYS[way](model, x)
    assert len(plain) == len(watched)
    assert all(torch.equal(left, right) for left, right in zip(plain, watched, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(heard.logits if eager else heard.fused) == ([] if way in UNHEARD else ["first", "second"])
    # What was made in a callback is plain, outside of any transform.
    for made in heard.sums:
        assert made.detach().numpy().dtype == "float64"
    assert hooks_on(model) == 0
    assert _get_current_function_mode_stack() == []


def test_each_way_to_call_fused_attention() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    call = functional.scaled_dot_product_attention
    ways: list[tuple[Callable[[], Any], tuple[bool, bool, float | None]]] = [
        (lambda: call(q, q, q), (False, False, None)),
        (lambda: call(query=q, key=q, value=q), (False, False, None)),
        (lambda: call(q, q, q, mask), (True, False, None)),
        (lambda: call(q, q, value=q, attn_mask=mask, scale=0.5), (True, False, 0.5)),
        (lambda: call(q, q, q, None, 0.0, True), (False, True, None)),
    ]
    if "enable_gqa" in (call.__doc__ or ""):  # from torch 2.5 on
        ways.append((lambda: call(q, k, k, is_causal=True, enable_gqa=True), (False, True, None)))
    for way, (masked, causal, scale) in ways:
        seen: list[tuple[str, AttentionCall]] = []
        with CallWatch(lambda site, found, seen=seen: seen.append((site, found))):
            way()
        ((site, found),) = seen
        assert site == "model"
        assert torch.equal(found.query, q)
        assert found.key.shape in (q.shape, k.shape)
        assert (found.mask is mask or (found.mask is not None and torch.equal(found.mask, mask))) == masked
        assert (found.is_causal, found.scale) == (causal, scale)


def test_each_softmax_of_eager_attention_and_no_other() -> None:
    logits = torch.randn(2, 3, 4, 5)
    ways: list[tuple[Callable[[Tensor], Any], bool]] = [
        (lambda x: functional.softmax(x, dim=-1), True),
        (lambda x: functional.softmax(x, -1, dtype=torch.float32), True),
        (lambda x: torch.softmax(x, 3), True),
        (lambda x: torch.softmax(input=x, dim=-1), True),
        (lambda x: x.softmax(-1), True),
        (lambda x: x.softmax(dim=-1), True),
        (nn.Softmax(dim=-1), True),
        (lambda x: x.softmax(1), False),
        (lambda x: x[0].softmax(-1), False),
    ]
    for way, heard in ways:
        seen: list[tuple[str, Tensor]] = []
        watch = CallWatch(on_logits=lambda site, found, seen=seen: seen.append((site, found)))
        with watch:
            way(logits)  # outside of an attention
            watch.module_entered("layer.attn")
            way(logits)
            watch.module_left("layer.attn")
            way(logits)
        assert [site for site, _ in seen] == (["layer.attn"] if heard else [])
        assert all(torch.equal(found, logits) for _, found in seen)


def test_the_first_call_at_a_site_is_the_one() -> None:
    model = Model()
    x, y = torch.randn(1, 5, 8), torch.randn(2, 5, 8)
    with Heard().watch(model) as heard:
        model(x)
        model(y)
    assert [call.query.shape[0] for call in heard.fused.values()] == [1, 1]


def test_a_site_is_the_innermost_attention_module_that_runs() -> None:
    class SelfAttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            functional.scaled_dot_product_attention(x, x, x)
            y: Tensor = self.inner(x)
            return y

    model = nn.Sequential(SelfAttentionBlock(), nn.Linear(8, 8))
    x = torch.randn(1, 5, 8)
    with Heard().watch(model) as heard:
        functional.scaled_dot_product_attention(x, x, x)
        model(x)
    assert list(heard.fused) == ["model", "0", "0.inner"]
    with Heard().watch(model[0]) as heard:
        model(x)
    assert list(heard.fused) == ["model", "inner"]


def test_after_a_forward_that_raised_the_next_site_is_right() -> None:
    model = Model()
    with Heard().watch(model) as heard:
        with pytest.raises(RuntimeError):
            model.first(torch.randn(1, 5, 9))
        model.second(torch.randn(1, 5, 8))
    assert list(heard.fused) == ["second"]


def test_the_users_exception_passes_and_nothing_stays_entered() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), Heard().watch(model):
        assert hooks_on(model) == 4
        assert len(_get_current_function_mode_stack()) == 1
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="size"), Heard().watch(model):
        functional.scaled_dot_product_attention(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    assert hooks_on(model) == 0
    assert _get_current_function_mode_stack() == []


def test_a_failure_of_ours_is_not_the_users(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def broken(site: str, call: AttentionCall) -> None:
        calls.append(site)
        raise ArithmeticError("bug of ours")

    x = torch.randn(1, 2, 3, 4)
    with CallWatch(broken):
        assert torch.equal(functional.scaled_dot_product_attention(x, x, x), _no_watch(x))
        functional.scaled_dot_product_attention(x, x, x)
    assert calls == ["model"]
    assert "bug of ours" in caplog.text


def _no_watch(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return functional.scaled_dot_product_attention(x, x, x)


def test_other_threads_are_not_watched() -> None:
    model = Model()
    with Heard().watch(model) as heard:
        other = threading.Thread(target=lambda: model(torch.randn(1, 5, 8)))
        other.start()
        other.join()
        assert heard.fused == {}
        model(torch.randn(1, 5, 8))
    assert list(heard.fused) == ["first", "second"]


def test_left_from_another_thread_it_falls_silent() -> None:
    seen: list[str] = []
    watch = CallWatch(lambda site, call: seen.append(site))
    watch.__enter__()
    try:
        other = threading.Thread(target=watch.__exit__)
        other.start()
        other.join()
        x = torch.randn(1, 2, 3, 4)
        functional.scaled_dot_product_attention(x, x, x)
        assert seen == []
    finally:
        watch.__exit__()
    assert _get_current_function_mode_stack() == []


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(getattr(func, "__name__", repr(func)))
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_users_sees_nothing_of_ours_and_stays_entered() -> None:
    model, x = Model(), torch.randn(1, 5, 8)
    with Counting() as plain:
        model(x)
    with Counting() as outside, Heard().watch(model) as heard:
        model(x)
    assert outside.calls == plain.calls
    assert len(heard.sums) == 2
    inside = Counting()
    with Heard().watch(model) as heard:
        inside.__enter__()
        model(x)
    assert len(heard.sums) == 2
    assert _get_current_function_mode_stack() == [inside]
    model(x)
    assert inside.calls == plain.calls * 2
    inside.__exit__(None, None, None)


def test_a_default_device_that_is_set_inside_stays_set() -> None:
    with Heard().watch(Model()):
        torch.set_default_device("meta")
    try:
        assert torch.ones(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert _get_current_function_mode_stack() == []


def test_a_copy_made_inside_is_silent_afterwards_and_swept_clean() -> None:
    model, x = Model(), torch.randn(1, 5, 8)
    with Heard().watch(model) as heard:
        clone = copy.deepcopy(model)
        clone(x)
        saved = io.BytesIO()
        torch.save(model, saved)
    assert list(heard.fused) == ["first", "second"]
    clone(x)
    sweep(clone)
    assert hooks_on(clone) == 0


def test_modules_that_would_compute_something_else_are_left_alone() -> None:
    x = torch.randn(2, 5, 8)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    heard = Heard()
    with torch.no_grad():
        plain = model(x)
        with contextlib.ExitStack() as stack:
            reason = watch_attention(stack, model, heard.on_attention, heard.on_logits)
            assert reason is not None
            assert "0 is a TransformerEncoderLayer" in reason
            assert watch_solves(stack, model, lambda *_: None) == reason
            assert torch.equal(model(x), plain)
    assert heard.fused == {}


def test_compiled_code_is_left_alone() -> None:
    x = torch.randn(2, 5, 8)
    heard = Heard()
    for compiled in (torch.compile(Model(), backend="eager"), Model()):
        compiled.compile(backend="eager")
        with contextlib.ExitStack() as stack:
            reason = watch_attention(stack, nn.Sequential(compiled), heard.on_attention, heard.on_logits)
            assert reason == "0 is compiled"
    model = Model()
    torch.compile(model.first, backend="eager")(x)  # nothing in the model shows it
    with contextlib.ExitStack() as stack:
        reason = watch_attention(stack, model, heard.on_attention, heard.on_logits)
        assert reason == "torch.compile is in use"
    assert hooks_on(model) == 0


def test_a_traced_model_holds_nothing_of_ours() -> None:
    model, x = Model().eval(), torch.randn(1, 5, 8)

    def operations() -> list[str]:
        return [node.kind() for node in torch.jit.trace(model, x, check_trace=False).inlined_graph.nodes()]

    plain = operations()
    with Heard().watch(model):
        assert operations() == plain
    assert "aten::scaled_dot_product_attention" in plain


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_of_a_real_model_is_the_same_bits(attention: str) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=20)
    ids = torch.randint(0, 20, (2, 7))

    def step(watch: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention).train()
        with Heard().watch(model) if watch else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        return [loss, torch.get_rng_state(), *(p.grad for p in model.parameters())]

    assert all(torch.equal(left, right) for left, right in zip(step(False), step(True), strict=True))


# -- solves ---------------------------------------------------------------------------------------------------------


def spd(size: int = 4) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.mT + torch.eye(size)


def solved(act: Callable[[Tensor, Tensor], Any], a: Tensor, b: Tensor) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    with contextlib.ExitStack() as stack:
        assert watch_solves(stack, Model(), lambda *found: seen.append(found)) is None
        act(a, b)
    return seen


SOLVES: dict[str, tuple[str, Callable[[Tensor, Tensor], Any]]] = {
    "solve": ("solve", torch.linalg.solve),
    "solve by name": ("solve", lambda a, b: torch.linalg.solve(A=a, B=b)),
    "solve from the right": ("solve", lambda a, b: torch.linalg.solve(a.mT, b.mT, left=False)),
    "lstsq": ("lstsq", torch.linalg.lstsq),
    "lstsq by name": ("lstsq", lambda a, b: torch.linalg.lstsq(input=a, b=b)),
    "inverse": ("inverse", lambda a, b: torch.inverse(a)),
    "inverse by name": ("inverse", lambda a, b: torch.inverse(input=a)),
    "inv": ("inverse", lambda a, b: torch.linalg.inv(a)),
    "inv by name": ("inverse", lambda a, b: torch.linalg.inv(A=a)),
    "method": ("inverse", lambda a, b: a.inverse()),
    "cholesky": ("cholesky", lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a))),
    "cholesky by name": ("cholesky", lambda a, b: torch.cholesky_solve(input=b, input2=torch.linalg.cholesky(input=a))),
    "cholesky of a temporary": ("cholesky", lambda a, b: b.cholesky_solve(torch.linalg.cholesky(a * 1))),
    "upper": ("cholesky", lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a, upper=True), upper=True)),
    "with a graph": ("solve", lambda a, b: torch.linalg.solve(a.clone().requires_grad_(), b).sum().backward()),
    "torch.func": ("solve", lambda a, b: torch.func.grad(lambda c: torch.linalg.solve(a, c).sum())(b)),
    "torch.func from the right": (
        "solve",
        lambda a, b: torch.func.grad(lambda c: torch.linalg.solve(a.mT, c.mT, left=False).sum())(b),
    ),
}


@pytest.mark.parametrize("name", SOLVES)
def test_each_solve(name: str) -> None:
    kind, act = SOLVES[name]
    a, b = spd(), torch.randn(4, 2, dtype=torch.float64)
    ((found, system, right, solution),) = solved(act, a, b)
    assert found == kind
    assert torch.equal(system, a)
    assert not any(part is not None and part.requires_grad for part in (system, right, solution))
    if kind == "inverse":
        assert right is None
        torch.testing.assert_close(system @ solution, torch.eye(4, dtype=torch.float64))
    else:
        assert torch.equal(right, b)
        torch.testing.assert_close(system @ solution, right)


def test_the_result_of_a_solve_is_the_same_bits() -> None:
    a, b = spd(30), torch.randn(30, 5, dtype=torch.float64)
    results: list[Tensor] = []
    solved(lambda a, b: results.append(torch.linalg.solve(a, b)), a, b)
    assert torch.equal(results[0], torch.linalg.solve(a, b))


def test_what_is_not_a_solve_of_a_known_system_is_left_out() -> None:
    a, b = spd(), torch.randn(4, 2, dtype=torch.float64)
    assert solved(lambda a, b: torch.linalg.solve(a, b, out=b.clone()), a, b) == []
    assert solved(lambda a, b: torch.cholesky_solve(b, a.tril()), a, b) == []  # whose factor it is, nobody saw

    def changed_since(a: Tensor, b: Tensor) -> None:
        a = a.clone()
        factor = torch.linalg.cholesky(a)
        a.mul_(2)
        torch.cholesky_solve(b, factor)

    assert solved(changed_since, a, b) == []
    with pytest.raises(torch.linalg.LinAlgError):
        solved(lambda a, b: torch.linalg.solve(a * 0, b), a, b)


def test_the_largest_four_are_handed_on() -> None:
    def many(a: Tensor, b: Tensor) -> None:
        for size in (3, 5, 5, 5, 5, 3, 5, 9):
            torch.linalg.solve(spd(size), torch.ones(size, 1, dtype=torch.float64))

    assert [len(system) for _, system, _, _ in solved(many, spd(), spd())] == [3, 5, 5, 5, 5, 9]
