"""Nothing that runs inside an edit, or between two, waits for an accelerator.

There is none here. A ``meta`` tensor stands in: it is on no CPU, so that the paths for an accelerator are taken, and it
has no values, so that whatever would wait for one (``.item()``, ``bool()``, ``.cpu()``, a shape that depends on values)
raises. What would wait all the same, without a value being asked for, is told by the operator's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stabilitylab.probes import ALL
from stabilitylab.probes.absorption import reduce_absorption
from stabilitylab.probes.attention_pass import reduce_attention, reduce_attention_logits
from stabilitylab.probes.canary_places import CanaryPlaces, next_tokens
from stabilitylab.probes.codebook import query_of, reduce_codebook, reduce_hits
from stabilitylab.probes.gradient_factors import EXACT_RANK, reduce_factors
from stabilitylab.probes.gradient_passes import Factors, PassKeeper, inner_product, product_with_update
from stabilitylab.probes.linear_solve import reduce_extremes, reduce_residual
from stabilitylab.probes.logits_pass import last_token_logits, reduce_canary, reduce_logits, text_nll
from stabilitylab.probes.mask_pass import reduce_mask
from stabilitylab.probes.normaliser_pass import reduce_normaliser
from stabilitylab.probes.null_space import trace_of
from stabilitylab.probes.output_pass import OutputKeeper, largest_magnitude, reduce_output
from stabilitylab.probes.rank_one import reduce_denominator, reduce_target
from stabilitylab.probes.side_memory import reduce_side_memory
from stabilitylab.probes.top_singular import follow, update_direction
from stabilitylab.probes.weight_pass import WeightPass, norm_of, reduce_weight, scan_weight
from stabilitylab.watching.calls import AttentionCall
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.instruments import weights
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.instruments.editor import EditorInstrument
from stabilitylab.watching.instruments.exchange import Exchange
from stabilitylab.watching.instruments.panel import Instruments
from stabilitylab.watching.instruments.weights import WeightInstrument
from stabilitylab.watching.sites import find_sites
from stabilitylab.watching.walking import named_modules_of

WAITING = {
    "aten._linalg_svd.default",  # cuSOLVER's iterations report to the host whether they converged
    "aten._linalg_eigh.default",
    "aten.linalg_eig.default",
    "aten.linalg_lstsq.default",
    "aten._linalg_check_errors.default",  # of `solve`, `inv`, `cholesky`: those named `…_ex` don't look
}


def elsewhere(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type != "cpu"


class Waits(AssertionError):
    pass


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, given, made = str(func), tree_leaves(args), tree_leaves(result)
        if any(map(elsewhere, given)):
            if name in WAITING:
                raise Waits(name)
            indices = args[1] if name.startswith("aten.index") and isinstance(args[1], list | tuple) else ()
            if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
                raise Waits(f"{name} by a mask")
        whole = any(isinstance(part, Tensor) and not elsewhere(part) and part.dim() for part in given)
        if whole and any(map(elsewhere, made)):  # from pageable memory; a scalar travels as an argument
            raise Waits(f"{name}: a copy from the host")
        return result


class _Functions(TorchFunctionMode):
    """``torch.tensor(…, device=…)`` is a copy from the host that no operator shows."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and elsewhere(result) and not elsewhere(args[0]):
            raise Waits(f"torch.{func.__name__}: a copy from the host")
        return result


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    with _Functions(), _Operators():
        yield


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

KNOWN_TO_WAIT: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x.sum()),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "written by a mask": lambda x: x.__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "index by a scalar tensor": lambda x: x[:, x[0].argmax()],
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].long(), 0),
    "svd": torch.linalg.svdvals,
    "eigh": lambda x: torch.linalg.eigvalsh(x @ x.T),
    "solve": lambda x: torch.linalg.solve(x @ x.T, x),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "tensor": lambda x: torch.tensor([3], device=x.device),
}


@pytest.mark.parametrize("what", KNOWN_TO_WAIT)
def test_what_waits_is_told(what: str) -> None:
    with pytest.raises((Waits, RuntimeError, NotImplementedError, TypeError)), nothing_waits():
        KNOWN_TO_WAIT[what](there(4, 6))


# -- gradients --------------------------------------------------------------------------------------------------------

SHAPES = {
    "few tokens": (12, 64, 32),
    "many tokens": (2 * EXACT_RANK, 64, 32),
    "more tokens than the rank": (400, 300, 280),
    "approximate": (2 * EXACT_RANK, 600, 700),
    "one token": (1, 8, 8),
}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: str, dtype: torch.dtype) -> None:
    tokens, inputs, outputs = SHAPES[shape]
    x, delta = there(tokens, inputs, dtype=dtype), there(tokens, outputs, dtype=dtype)
    reduce_factors(x, delta)  # fixed random directions are copied there once per width
    with nothing_waits():
        packed, _ = reduce_factors(x, delta)
    assert (packed.device.type, packed.dtype, packed.dim()) == ("meta", torch.float64, 1)


@each_dtype
def test_later_passes(dtype: torch.dtype) -> None:
    keeper = PassKeeper()
    with nothing_waits():
        for tokens in (12, 12, 12, 7):
            x, delta = there(tokens, 64, dtype=dtype), there(tokens, 32, dtype=dtype)
            if keeper.passes == 0:
                keeper.first(*reduce_factors(x, delta))
            else:
                keeper.later(x, delta)
        assert keeper.reduce() is not None


@each_dtype
def test_alignment(dtype: torch.dtype) -> None:
    factors = Factors(there(12, 64, dtype=dtype), there(12, 32, dtype=dtype))
    weight, previous = there(32, 64, dtype=dtype), there(32, 64, dtype=dtype)
    with nothing_waits():
        inner_product(factors, factors)
        product_with_update(factors, weight, previous, transposed=False)
        product_with_update(factors, weight.T, previous.T, transposed=True)


# -- outputs, logits, masks, attention --------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 1, 8), (6, 8), (3, 2, 5, 8)], ids=str)
def test_outputs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with nothing_waits():
        reduce_output(there(*shape, dtype=dtype))
        largest_magnitude(there(*shape, dtype=dtype))
        keeper = OutputKeeper()
        for _ in range(3):
            keeper.add(there(*shape, dtype=dtype))
        assert keeper.reduce() is not None


@each_dtype
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 40), (2, 40), (1, 6, 1)], ids=str)
def test_logits(shape: tuple[int, ...], masked: bool, dtype: torch.dtype) -> None:
    logits, mask = there(*shape, dtype=dtype), there(shape[0], 4, dtype=torch.int64) if masked else None
    rows = there(shape[0], dtype=torch.int64)
    places = CanaryPlaces(rows, rows, last_token_logits(logits, mask))
    with nothing_waits():
        reduce_logits(logits, mask)
        reduce_canary(logits, mask, places)


@each_dtype
@pytest.mark.parametrize("masked", [True, False])
def test_text(masked: bool, dtype: torch.dtype) -> None:
    tokens = there(2, 4, dtype=torch.int64)
    with nothing_waits():
        targets = next_tokens(tokens, torch.ones_like(tokens) if masked else None, 6)
        assert text_nll(there(2, 6, 40, dtype=dtype), targets) is not None


@pytest.mark.parametrize("mask", [(2, 6), (2, 1, 6, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masks(mask: tuple[int, ...], dtype: torch.dtype) -> None:
    with nothing_waits():
        assert reduce_mask(there(*mask, dtype=dtype)) is not None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float16], ids=str)
def test_attention(mask: torch.dtype | None, causal: bool) -> None:
    given = None if mask is None else there(2, 1, 40, 40, dtype=mask)
    query, key = there(2, 4, 40, 8, dtype=torch.float16), there(2, 2, 40, 8, dtype=torch.float16)
    with nothing_waits():
        reduce_attention(query, key, given, causal)
        reduce_attention_logits(there(2, 4, 40, 40, dtype=torch.float16))


# -- weights ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3000, 2048), (24,), (8, 3, 3, 3)], ids=str)
def test_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, first, previous = (there(*shape, dtype=dtype) for _ in range(3))
    with nothing_waits():
        seen = reduce_weight(weight, first, previous, norm_of(first), want_change=True)
        assert seen.update is None
        scan_weight(weight)
        WeightPass.unmoved(seen.packed)
        reduce_absorption(there(*shape), weight, previous)


@each_dtype
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 5), (8, 3, 3, 3)], ids=str)
def test_the_largest_singular_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, previous = there(*shape, dtype=dtype), there(*shape, dtype=dtype)
    columns = weight[0].numel()
    with nothing_waits():
        update = update_direction((weight - previous).reshape(shape[0], columns))
        value, direction = follow(weight, (there(columns), update), there())
    assert (value.dtype, direction.shape) == (torch.float64, (columns,))


# -- editors ----------------------------------------------------------------------------------------------------------


def test_editor_state() -> None:
    with nothing_waits():
        reduce_normaliser(there(8), there(8), [there(2, 5, 8), there(3, 8)])
        reduce_normaliser(there(8), there(8), [], rows=there(1), learns=True)
        reduce_codebook(there(3, 8), there(3, 6), there(3))
        reduce_hits(query_of(there(2, 5, 8), -1), there(3, 8), there(3))
        reduce_hits(query_of(there(2, 5, 8), there(1, dtype=torch.int64)), there(3, 8), there(3))
        reduce_side_memory([there(6, 8), there(6, 8)], there(6, 8))
        trace_of(there(8, 8), mean=True)
        reduce_denominator(there(8), there(8))
        reduce_target(there(2, 8), there(2, 8))


@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (6, 8), (600, 600)], ids=str)
def test_solves(shape: tuple[int, int]) -> None:
    with nothing_waits():
        reduce_extremes(there(*shape))
        reduce_residual(there(*shape), there(shape[1], 5), there(shape[0], 5))


# -- all of it together, as the monitor calls it ----------------------------------------------------------------------


class Said:
    """What a measurement that broke is noted as: `Bench.safely` must not hide a wait."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def __call__(self, kind: str, says: str) -> None:
        self.notes.append((kind, says))


def every_probe() -> list[Any]:
    return [probe(every=1) for probe in ALL]


@pytest.mark.parametrize("passes", [1, 4])
def test_the_hooks_of_an_edit(passes: int) -> None:
    said = Said()
    instruments = Instruments(every_probe(), None, None, said)
    with nothing_waits():
        for edit in range(3):
            instruments.begin(edit)
            for _ in range(passes):
                mask = there(2, 5, dtype=torch.int64)
                instruments.model_called((there(2, 5),), {"attention_mask": mask})
                instruments.layer_output("layer", 1, there(2, 5, 6))
                instruments.norm_input(there(2, 5, 6))
                instruments.layer_pass("layer", 1, there(2, 5, 8), there(2, 5, 6), there(8, 6))
                output = {"logits": there(2, 5, 40), "loss": there()}
                instruments.model_output({"attention_mask": mask}, output)
                instruments._attention._on_logits("attention", there(2, 2, 5, 5))
                instruments._attention._on_attention(
                    "attention", AttentionCall(there(2, 2, 5, 4), there(2, 2, 5, 4), None, True, None)
                )
            instruments._outputs.after(())
            instruments._logits.after()
    assert said.notes == []


def test_the_weights_after_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the two deep decompositions, which wait, as their docstrings say; and the very first look at σ₁."""
    monkeypatch.setattr(weights, "why_unmeasurable", lambda *_: None, raising=False)
    monkeypatch.setattr("stabilitylab.watching.sites.why_unmeasurable", lambda *_: None)
    deep = {"ConditionNumber", "SubspaceOverlap"}
    said = Said()
    bench = Bench([probe for probe in every_probe() if type(probe).__name__ not in deep], said)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to("meta")
    sites = find_sites(model, "*")
    instrument = WeightInstrument(bench, Exchange(bench))
    start = (there(dtype=torch.float64), there())
    monkeypatch.setattr(weights, "start_direction", lambda w: (start[0], there(w[0].numel())))
    updates = {site.name: torch.empty_like(model.get_parameter(site.parameter)) for site in sites}
    for site in sites:
        instrument.references.adopt(site, model.get_parameter(site.parameter))
    with nothing_waits():
        for edit in range(3):
            bench.begin(edit)
            instrument.compare(model, sites, updates)
            instrument.after(model, sites)
            instrument.look(model, sites)
    assert said.notes == []


def test_the_editor_after_an_edit() -> None:
    class Mend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("u_mean", "u_std", "v_mean", "v_std"):
                self.register_buffer(name, there(8))
            self.edit_lrs = nn.Parameter(there(3))
            self.P, self.cache_c = there(2, 8, 8), there(2, 8, 8)
            self.COV_CACHE = {("model", "layer"): there(8, 8)}

        def forward(self, u: Tensor, v: Tensor) -> Tensor:
            return u + v

    said, mend = Said(), Mend()
    bench = Bench(every_probe(), said)
    instrument, model = EditorInstrument(bench, mend), nn.Sequential(nn.Linear(8, 8)).to("meta")
    with nothing_waits():
        bench.begin(1)
        capture = Capture(Instruments((), None, None, said))
        instrument.watch(capture, model, named_modules_of(model))
        with capture:
            mend(there(5, 8), there(5, 8))
        instrument.after(named_modules_of(model), capture, {})
    assert said.notes == []
