"""Tracing changes nothing: the same bits, the same random numbers, the same modes entered, the same graphs compiled."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

import stabilitylab as sl
from stabilitylab.acting.tracer import Tracer
from stabilitylab.acting.tracing import Tracing, why_untraceable
from tests.loops import hooks_on

Trace = bool | None
"""None for no monitor at all."""
EDITS = 2


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        y = functional.dropout(functional.softmax(q @ k.mT / 2 + mask, dim=-1), 0.1, self.training) @ v
        z: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return z


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.relu(self.second(self.first(x))))
        return z


def modes() -> tuple[list[Any], list[Any], bool]:
    """What is entered in this thread."""
    functions = [torch._C._get_function_stack_at(at) for at in range(torch._C._len_torch_function_stack())]
    dispatch = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
    return functions, dispatch, is_in_torch_dispatch_mode()


class Left(NamedTuple):
    """What a loop left. said: why it was not traced."""

    tensors: list[Tensor]
    said: list[str]
    traced: float


Way = Callable[[nn.Module, Tensor], Sequence[Tensor | None]]


def loop(way: Way, trace: Trace, folder: Path, make: Callable[[], nn.Module] = Model, sites: str = "head") -> Left:
    """A loop of a few edits, and everything that it computed, the random state included."""
    torch._dynamo.reset()
    torch.manual_seed(7)
    model = make()
    before = modes()
    seen: list[Tensor] = []
    monitor = None
    if trace is not None:
        folder = folder / f"{trace}"
        monitor = sl.attach(model, sites, folder, trace=trace, announce=False, probes="light")
    for _ in range(EDITS):
        x = torch.randn(3, 5, 8)
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            seen += [each.detach().clone() for each in way(model, x) if each is not None]
        assert modes() == before
        seen += [each.detach().clone() for each in (*model.parameters(), *model.buffers())]
        seen += [each.grad.clone() for each in model.parameters() if each.grad is not None]
    seen.append(torch.get_rng_state())
    assert hooks_on(model) == 0
    if monitor is None:
        return Left(seen, [], 0.0)
    monitor.close()
    run = sl.load(folder)
    return Left(seen, [note.says for note in run.notes if note.kind == "trace-off"], run.trace_time_share or 0.0)


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def compare(way: Way, folder: Path, make: Callable[[], nn.Module] = Model, sites: str = "head") -> Left:
    """The loop traced, after it was seen to give what it gives untraced and without any monitor."""
    plain, untraced, traced = (loop(way, trace, folder, make, sites) for trace in (None, False, True))
    assert_same(plain.tensors, untraced.tensors)
    assert_same(plain.tensors, traced.tensors)
    assert untraced.traced == 0.0
    return traced


# -- ways to edit -----------------------------------------------------------------------------------------------------


def step(model: nn.Module, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter -= 0.05 * gradient


def _adam(foreach: bool) -> Way:
    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x).flatten(0, 1), torch.arange(15) % 5)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return [loss, *(value for state in optimizer.state.values() for value in state.values())]

    return run


def _autocast(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = y.float().pow(2).mean()
    loss.backward()
    step(model, model(x).pow(2).mean())
    return [y]


def _half(model: nn.Module, x: Tensor) -> list[Tensor]:
    twin = copy.deepcopy(model).to(torch.bfloat16)
    y = twin(x.to(torch.bfloat16))
    y.sum().backward()
    return [y, *(each.grad for each in twin.parameters() if each.grad is not None)]


def _checkpoint(reentrant: bool) -> Way:
    def run(model: nn.Module, x: Tensor) -> list[Tensor | None]:
        x = x.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.pow(2).sum().backward()
        return [y, x.grad]

    return run


def _selective_checkpoint(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    saved = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    choices = checkpoints.CheckpointPolicy

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return choices.MUST_SAVE if op in saved else choices.PREFER_RECOMPUTE

    x = x.clone().requires_grad_()
    contexts = lambda: checkpoints.create_selective_checkpoint_contexts(policy)  # noqa: E731
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    y.pow(2).sum().backward()
    return [y, x.grad]


def _functional_call(model: nn.Module, x: Tensor) -> list[Tensor | None]:
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


def _per_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], each: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (each[None],)).pow(2).sum()

    model.eval()
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    return list(found.values())


def _hessian(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    return [
        torch.func.hessian(lambda bias: torch.func.functional_call(model, {"head.bias": bias}, (x,)).pow(3).sum())(
            torch.zeros(5)
        ),
        torch.func.jvp(lambda z: functional.linear(z, model.head.weight.detach()).sin(), (x,), (x,))[1],
    ]


def _inner_loop(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As `higher` does: a clone whose weights are computed from the original's, differentiated through."""
    rate = torch.full((), 0.1, requires_grad=True)
    weights = dict(model.named_parameters())
    for _ in range(2):
        loss = torch.func.functional_call(model, weights, (x,)).pow(2).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        weights = {
            name: weight if gradient is None else weight - rate * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    outer = torch.func.functional_call(model, weights, (x,)).pow(2).mean()
    outer.backward()
    assert rate.grad is not None
    return [outer, rate.grad]


class LowRank(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def _lora(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    layer = model.get_submodule("head")
    low = LowRank(layer.weight)  # type: ignore[arg-type]
    parametrize.register_parametrization(layer, "weight", low)
    optimizer = torch.optim.SGD(low.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    parametrize.remove_parametrizations(layer, "weight")
    return [low.up, low.up.grad, low.down.grad]


def _inference(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [model(x).clone()]


def _no_grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
        model.get_parameter("head.weight").add_(0.1)
    return [y]


def _closed_form(model: nn.Module, x: Tensor) -> list[Tensor]:
    keys = x.reshape(-1, 8).double()
    covariance = keys.T @ keys + torch.eye(8)
    update = torch.linalg.solve(covariance, keys.T @ keys.sin())
    values = [torch.linalg.svdvals(update), torch.linalg.eigvalsh(covariance), torch.linalg.norm(update, 2)]
    values += [
        torch.linalg.norm(update, "nuc"),
        torch.linalg.cond(covariance),
        torch.linalg.pinv(update),
        update.norm(),
    ]
    with torch.no_grad():
        model.get_parameter("first.out.weight").add_(update.float())
    return [*values, torch.linalg.cholesky(covariance), torch.linalg.matrix_rank(update), update.norm(p="nuc")]


def _tensor_hooks(model: nn.Module, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    x = x.clone().requires_grad_()
    x.register_hook(lambda gradient: seen.append(gradient.clone()))
    y = model(x)
    y.register_hook(lambda gradient: gradient * 2)
    y.grad_fn.register_prehook(lambda gradients: tuple(g.clamp(-1, 1) for g in gradients))
    handle = model.get_parameter("head.weight").register_post_accumulate_grad_hook(
        lambda p: seen.append(p.grad.clone())
    )
    y.pow(2).sum().backward()
    handle.remove()
    return seen


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.exp()


def _custom_function(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = Doubled.apply(model(x)).sum()
    step(model, y)
    return [y]


def _saved_tensors(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half().float(), lambda t: t * 1):
        model(x).sum().backward()
    return [x.grad]


def _uncommon(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Tensors that are no dense floats."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.randn(2), (2, 2), check_invariants=True)
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    meta = torch.ones(3, device="meta") * 2
    small = torch.randn(4).to(torch.float8_e4m3fn)
    whole = torch.fft.fft(x).abs()
    assert meta.is_meta
    return [
        (sparse @ torch.randn(2, 2)) * 2,
        (nested * 2).values(),
        small.float(),
        whole,
        torch.view_as_complex(torch.randn(3, 2)).conj().imag * 2,
        torch.randn(0, 3).sum(0),
        torch.randint(0, 9, (5,)),
        torch.multinomial(torch.ones(5), 2),
    ]


def _autograd_grad_with_zeros(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients that are none are tensors without any memory below autograd."""
    x = x.clone().requires_grad_()
    left, right = torch.linalg.eigh(x.mT @ x)
    dual = torch.autograd.forward_ad
    with dual.dual_level():
        made = dual.unpack_dual(model(dual.make_dual(x.detach(), torch.ones_like(x))))
    return [*torch.autograd.grad(left.sum(), x), right, made.tangent]


WAYS: dict[str, Way] = {
    "adam": _adam(foreach=False),
    "foreach": _adam(foreach=True),
    "autocast": _autocast,
    "bfloat16": _half,
    "checkpoint": _checkpoint(False),
    "reentrant checkpoint": _checkpoint(True),
    "selective checkpoint": _selective_checkpoint,
    "functional_call": _functional_call,
    "func.grad": _func_grad,
    "vmap": _vmap,
    "gradients of samples": _per_sample,
    "hessian": _hessian,
    "inner loop": _inner_loop,
    "lora": _lora,
    "inference_mode": _inference,
    "no_grad": _no_grad,
    "closed form": _closed_form,
    "hooks of tensors": _tensor_hooks,
    "autograd.Function": _custom_function,
    "saved tensors": _saved_tensors,
    "uncommon tensors": _uncommon,
    "forward mode": _autograd_grad_with_zeros,
}
if not hasattr(checkpoints, "CheckpointPolicy"):  # torch 2.4
    del WAYS["selective checkpoint"]


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_leaves_the_same_bits(way: str, tmp_path: Path) -> None:
    traced = compare(WAYS[way], tmp_path)
    assert traced.said == []
    assert traced.traced > 0.0


LEAVES: dict[str, Way] = {
    "masked_fill": lambda model, x: _descend(
        model, model(x).masked_fill(x[..., :5] > 0, model.get_parameter("head.bias")[0] * 1)
    ),
    "prod": lambda model, x: _descend(model, model(x).prod(-1)),
}


def _descend(model: nn.Module, y: Tensor) -> list[Tensor]:
    step(model, y.pow(2).mean())
    return [y]


@pytest.mark.parametrize("name", LEAVES)
def test_where_a_backward_would_be_computed_in_another_way_the_rest_of_the_edit_is_not_traced(
    name: str, tmp_path: Path
) -> None:
    traced = compare(LEAVES[name], tmp_path)
    assert any(name in says for says in traced.said)


# -- modes of the user's ----------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def make_a_nan(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Where something is found, more is looked at."""
    y = model(x)
    bad = (y - y) / (y - y)
    step(model, y.pow(2).mean() + torch.linalg.norm(y[0], 2))
    return [y, bad.nansum()]


@pytest.mark.parametrize("kind", [Operators, Functions])
def test_a_mode_inside_of_the_edit_sees_nothing_of_ours(kind: Callable[[], Any], tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        with kind() as mode:
            left = make_a_nan(model, x)
        seen.append(mode.seen)
        return left

    compare(way, tmp_path)
    _, untraced, traced = (seen[at : at + EDITS] for at in range(0, 3 * EDITS, EDITS))
    assert untraced == traced  # the hooks are seen by a mode without us too
    assert len(untraced[0]) > 20


@pytest.mark.parametrize("kind", [Operators, Functions])
def test_a_mode_around_the_edit_sees_nothing_of_ours(kind: Callable[[], Any]) -> None:
    def edit(traced: bool) -> list[str]:
        torch.manual_seed(0)
        model, x = Model(), torch.randn(3, 5, 8)
        with kind() as mode, Tracing.entered(Tracer(1)) if traced else contextlib.nullcontext():
            make_a_nan(model, x)
        return list(mode.seen)

    assert edit(True) == edit(False)


def test_a_mode_that_is_left_after_the_edit_stays_entered_and_nothing_of_ours_does(tmp_path: Path) -> None:
    before, dispatch, functions = modes(), Operators(), Functions()
    monitor = sl.attach(Model(), "head", tmp_path / "run", trace=True, announce=False)
    with contextlib.ExitStack() as outlives:
        with monitor.edit():
            outlives.enter_context(dispatch)
            outlives.enter_context(functions)
            monitor._rounds.model(torch.randn(1, 2, 8))
        assert modes() == ([functions], [dispatch], True)
        seen = len(dispatch.seen)
        torch.ones(2) + 1
        assert len(dispatch.seen) > seen
    assert modes() == before


def test_a_mode_that_is_entered_before_and_left_inside_of_the_edit(tmp_path: Path) -> None:
    """A loop whose own stack unwinds in another order."""
    before, dispatch = modes(), Operators()
    monitor = sl.attach(Model(), "head", tmp_path / "run", trace=True, announce=False)
    dispatch.__enter__()
    edit = monitor.edit()
    edit.__enter__()
    monitor._rounds.model(torch.randn(1, 2, 8))
    edit.__exit__(None, None, None)
    dispatch.__exit__(None, None, None)
    assert modes() == before


@torch.library.custom_op("stabilitylab_tests::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    """An operator in Python, which calls functions that the tracer steps aside for while it is running itself."""
    return x / torch.linalg.svdvals(x)[0] * torch.linalg.norm(x, 2) * x.masked_fill(x > 0, 1.0).prod()


def test_an_operator_in_python(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [scaled(model(x)[0])]

    assert compare(way, tmp_path).said == []


# -- how an edit ends -------------------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing_entered(tmp_path: Path) -> None:
    before, model = modes(), Model()
    with sl.attach(model, "head", tmp_path / "run", trace=True, announce=False) as monitor:
        with pytest.raises(RuntimeError), monitor.edit():
            model(torch.randn(1, 2, 9))
        assert modes() == before
        with pytest.raises(ValueError, match="mine"), monitor.edit():
            model(torch.randn(1, 2, 8))
            raise ValueError("mine")
        assert modes() == before
        with pytest.raises(ValueError, match="hook"), monitor.edit():
            y = model(torch.randn(1, 2, 8))
            y.register_hook(_raise)
            y.sum().backward()
        assert modes() == before
    assert [note.kind for note in sl.load(tmp_path / "run").notes if note.kind == "trace-off"] == []


def _raise(_: Tensor) -> Tensor:
    raise ValueError("hook")


def test_an_edit_that_is_abandoned_in_a_generator(tmp_path: Path) -> None:
    before, model = modes(), Model()

    def edits(monitor: sl.Monitor) -> Generator[Tensor]:
        while True:
            with monitor.edit():
                yield model(torch.randn(1, 2, 8))

    with sl.attach(model, "head", tmp_path / "run", trace=True, announce=False) as monitor:
        loop = edits(monitor)
        next(loop)
        next(loop)
        assert modes() != before
        loop.close()
        assert modes() == before


def test_two_monitors_nested(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        inner = sl.attach(
            model, "first.out", tmp_path / f"inner{next(count)}", trace=True, announce=False, probes="light"
        )
        with inner, inner.edit():
            return [*make_a_nan(model, x), *_closed_form(model, x)]

    count = iter(range(99))
    assert compare(way, tmp_path).said == []


def test_an_edit_that_is_left_in_another_thread(tmp_path: Path) -> None:
    model = Model()
    monitor = sl.attach(model, "head", tmp_path / "run", trace=True, announce=False)

    def enter_here(edit: Any, entered: threading.Event, left: threading.Event, seen: list[Any]) -> None:
        before = modes()
        with contextlib.suppress(BaseException):
            edit.__enter__()
        entered.set()
        left.wait()
        torch.ones(2) + 1
        seen += [before[1], modes()[1], torch.ones(2) + 1]

    edit, entered, left, seen = monitor.edit(), threading.Event(), threading.Event(), []
    thread = threading.Thread(target=enter_here, args=(edit, entered, left, seen))
    thread.start()
    entered.wait()
    here = modes()
    edit.__exit__(None, None, None)
    assert modes() == here
    left.set()
    thread.join()
    assert seen[0] == seen[1] == []
    with monitor.edit():
        model(torch.randn(1, 2, 8))
    assert modes() == here
    monitor.close()
    (says,) = [note.says for note in sl.load(tmp_path / "run").notes if note.kind == "trace-off"]
    assert "another thread" in says


def test_an_edit_in_a_thread_of_its_own(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        """The edit goes on in another thread, which is not traced."""
        left: list[Tensor | None] = []
        thread = threading.Thread(target=lambda: left.extend(_checkpoint(False)(model, x)))
        thread.start()
        thread.join()
        return [each for each in left if each is not None]

    compare(way, tmp_path)


# -- code that is compiled --------------------------------------------------------------------------------------------


class Graphs:
    """A compiler that counts."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(str(module.graph))
        return module.forward


def compiled_loop(
    way: Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor], trace: Trace, folder: Path
) -> Any:
    """(what was computed; how many graphs there were after each edit; the graphs; what the run said)."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    counted, model = Graphs(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    @torch.compile(backend=counted)
    def loss(y: Tensor) -> Tensor:
        z = torch.linalg.norm(y.softmax(-1).masked_fill(y > 1, 0.5))
        if z > 1e6:  # breaks the graph
            z = z + 1
        return z * y.sin().sum()

    monitor = None if trace is None else sl.attach(model, "0", folder / f"{trace}", trace=trace, announce=False)
    seen, graphs = [], []
    for _ in range(3):
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            seen.append(way(model, loss, torch.randn(3, 8)))
        graphs.append(len(counted.graphs))
        seen.append(loss(torch.randn(3, 4)).detach().clone())
        graphs.append(len(counted.graphs))
    said = []
    if monitor is not None:
        monitor.close()
        said = [note.says for note in sl.load(folder / f"{trace}").notes if note.kind == "trace-off"]
    return [*seen, *model.parameters()], graphs, counted.graphs, said


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_what_is_compiled_first_inside_of_an_edit_is_compiled_as_without_us(tmp_path: Path) -> None:
    def way(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = model(x)
        found = loss(y)
        step(model, found)
        return found.detach().clone()

    (plain, *graphs, _), (untraced, *others, _), (traced, *own, said) = (
        compiled_loop(way, trace, tmp_path) for trace in (None, False, True)
    )
    assert_same(plain, untraced)
    assert_same(plain, traced)
    assert graphs == others == own
    assert graphs[0][1] == graphs[0][-1] > 0  # and is not compiled again
    assert said == [
        "from there on operations are not traced in an edit: torch.compile is in use",
        "operations are not traced: torch.compile is in use",
    ]


def _scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4))


def _fast() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))


def _compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 4))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "why"), [(_scripted, "TorchScript"), (_fast, "TransformerEncoder"), (_compiled, "compiled")]
)
def test_models_that_are_left_alone(make: Callable[[], nn.Module], why: str, tmp_path: Path) -> None:
    traced = compare(lambda model, x: _descend(model, model(x)), tmp_path, make, "1")
    assert traced.traced == 0.0
    assert any(why in says for says in traced.said)


def test_an_edit_inside_of_a_transform_is_left_alone() -> None:
    said: list[str | None] = []
    torch.func.grad(lambda x: (said.append(why_untraceable(nn.Linear(2, 2))), x.sum())[1])(torch.ones(2))
    assert said == ["the edit is inside a transform of torch.func"]
    assert why_untraceable(nn.Linear(2, 2)) is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_functions_in_torchscript_and_what_is_traced_there(tmp_path: Path) -> None:
    def plain(x: Tensor) -> Tensor:
        return torch.relu(x * 2).sum() / x.norm()

    kinds: list[list[str]] = []

    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        script, traced = torch.jit.script(plain), torch.jit.trace(plain, x)
        kinds.append([node.kind() for node in traced.graph.nodes()])
        made = torch.fx.experimental.proxy_tensor.make_fx(plain)(x)
        kinds.append([str(node.target) for node in made.graph.nodes])
        for _ in range(3):
            step(model, script(model(x)))
        return [traced(x), made(x), *model.parameters()]

    compare(way, tmp_path)
    assert kinds[:2] * 6 == kinds


def test_higher_order_operators(tmp_path: Path) -> None:
    def way(model: nn.Module, x: Tensor) -> list[Tensor]:
        y = model(x)
        return [torch.cond(x.sum() > 0, lambda z: z.sin(), lambda z: z.cos(), (y.detach(),))]

    compare(way, tmp_path)


# -- an accelerator ---------------------------------------------------------------------------------------------------


class Reads(Operators):
    """Operators by which Python waits for a value."""

    def waits(self) -> list[str]:
        return [name for name in self.seen if "_local_scalar_dense" in name or "is_nonzero" in name or "equal" in name]


def test_nothing_is_read_before_the_edit_is_over() -> None:
    """`_DisableTorchDispatch` hides what is read from any mode, so the bindings themselves are watched."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 5, 8)
    tracer = Tracer(1, deferred=True)
    read: list[str] = []

    def forbid(name: str) -> Callable[..., Any]:
        def said(*_: Any, **__: Any) -> Any:
            read.append(name)
            raise AssertionError(name)

        return said

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "isfinite")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, forbid(name))
        with Tracing.entered(tracer):
            y = model(x)
            bad = (y - y) / (y - y)
            (y.pow(2).mean() + bad.sum()).backward()
        assert (read, tracer.failure) == ([], "")
    tracer.seal([model])
    operation = tracer.finish()
    assert operation is not None
    assert operation.operator == "aten.div.Tensor"
    assert tracer.failure == ""
