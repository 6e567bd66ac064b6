"""A loop run twice, unwatched and watched, for models of any layers; what a naive reader sees of it in float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.probes import probes_of
from stabilitylab.record.run import Run
from tests.loops import hooks_on

Array = NDArray[np.float64]


def wide(tensor: Tensor) -> Array:
    """A copy in float64."""
    return tensor.detach().double().numpy().copy()


@dataclass
class Step:
    """What one edit did. gradients: [out, in], of the loss by the matrix that a layer applies. outputs: by layer."""

    model: nn.Module
    logits: Tensor
    gradients: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)


Make = Callable[[], nn.Module]
Edit = Callable[[nn.Module], Step]
Read = Mapping[str, Callable[[Any], Tensor]]
"""Site name → its tensor in the model as it is now."""


@dataclass
class Loop:
    """weights: by site, before any edit and after each. starts: at the start of each edit."""

    weights: dict[str, list[Array]]
    starts: dict[str, list[Array]]
    steps: list[Step] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    random: Tensor = field(default_factory=lambda: torch.empty(0))


def play(
    make: Make,
    edit: Edit,
    read: Read,
    edits: int,
    between: Callable[[nn.Module], object],
    attach: Callable[[nn.Module], sl.Monitor] | None = None,
) -> Loop:
    """Run the loop, watched where `attach` is given. Asserts that no hook is left on any model that it had."""
    torch.manual_seed(3)
    model = make()
    loop = Loop({site: [wide(of(model))] for site, of in read.items()}, {site: [] for site in read})
    with contextlib.ExitStack() as stack:
        monitor = None if attach is None else stack.enter_context(attach(model))
        for number in range(edits):
            if number:
                between(model)
            for site, of in read.items():
                loop.starts[site].append(wide(of(model)))
            with contextlib.nullcontext() if monitor is None else monitor.edit() as opened:
                step = edit(model)
                if opened is not None:
                    assert opened.returns(step.model) is step.model
            assert hooks_on(model) == hooks_on(step.model) == 0
            model = step.model
            loop.steps.append(step)
            for site, of in read.items():
                loop.weights[site].append(wide(of(model)))
    loop.state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    loop.random = torch.rand(3)
    return loop


def watch(
    folder: Path,
    make: Make,
    edit: Edit,
    read: Read,
    *,
    edits: int = 3,
    sites: Any = "",
    canary: Any = None,
    between: Callable[[Any], object] = lambda model: None,
) -> tuple[Run, Loop]:
    """The run and the loop, with every probe up to the deep ones at each edit.

    sites: by default those that are read. between: what the user does to the model between two edits. Asserts that
    watching changed no bit and that no probe broke.
    """
    deep = [type(probe)(every=1) for probe in probes_of("deep")]
    patterns = list(read) if isinstance(sites, str) and not sites else sites

    def attach(model: nn.Module) -> sl.Monitor:
        return sl.attach(model, patterns, folder / "run", probes=deep, canary=canary)

    plain, watched = play(make, edit, read, edits, between), play(make, edit, read, edits, between, attach)
    assert all(same(a.logits, b.logits) for a, b in zip(plain.steps, watched.steps, strict=True))
    assert plain.state.keys() == watched.state.keys()
    assert all(same(plain.state[name], watched.state[name]) for name in plain.state)
    assert torch.equal(plain.random, watched.random)
    run = sl.load(folder / "run")
    assert not [note.says for note in run.notes if note.kind == "probe-off"]
    return run, watched


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values in the same dtype."""
    if left.is_meta or left.is_quantized:
        return left.shape == right.shape and left.dtype == right.dtype
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype.itemsize == 1:  # some releases of torch can't compare 8-bit floats
        left, right = left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    return torch.equal(left, right)


@contextlib.contextmanager
def catching(model: nn.Module, *sites: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """(input, output) of each layer in the forward inside, by the loop's own hooks."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(site: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        caught[site] = (args[0], y)

    handles = [model.get_submodule(site).register_forward_hook(functools.partial(catch, site)) for site in sites]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def product(delta: Tensor, x: Tensor) -> Array:
    """The gradient [out, in] of the matrix that a linear layer applies: δᵀX over all tokens."""
    return wide(delta).reshape(-1, delta.shape[-1]).T @ wide(x).reshape(-1, x.shape[-1])


def close(run: Run, metric: str, site: str, expected: Any, *, rtol: float = 1e-5, atol: float = 0.0) -> None:
    """Asserts that a metric was read at each edit with these values; None: absent there."""
    present = [value is not None for value in expected]
    assert run.present(metric, site).tolist() == present, metric
    values = run.series(metric, site)[present]
    kept = np.array([value for value in expected if value is not None])
    np.testing.assert_allclose(values, kept, rtol=rtol, atol=atol, err_msg=f"{metric} at {site}")


def flat(weight: Array) -> Array:
    """As a matrix [rows, columns]."""
    return weight.reshape(weight.shape[0], -1)


def assert_weights_read(run: Run, loop: Loop, site: str) -> None:
    """Norms to 1e-5, σ₁ to 1 %, condition and subspace of matrices; none of these where there is no matrix."""
    weights = loop.weights[site]
    shape = weights[0].shape
    close(run, "weight.norm", site, [np.linalg.norm(w.reshape(-1)) for w in weights])
    close(run, "weight.max_abs", site, [np.abs(w).max() for w in weights])
    close(run, "weight.nonfinite", site, [0.0] * len(weights))
    moves = [np.linalg.norm((b - a).reshape(-1)) for a, b in zip(loop.starts[site], weights[1:], strict=True)]
    close(run, "update.norm", site, [0.0, *moves])
    close(run, "drift.norm", site, [np.linalg.norm((w - weights[0]).reshape(-1)) for w in weights])
    if len(shape) < 2:
        assert not read_at(run, site, "weight.spectral_norm", "weight.stable_rank")
    else:
        tops = [np.linalg.norm(flat(w), 2) for w in weights]
        close(run, "weight.spectral_norm", site, tops, rtol=1e-2)
    if len(shape) != 2:
        assert not read_at(run, site, "weight.condition_number", "weight.subspace_overlap")
    else:
        close(run, "weight.condition_number", site, [np.linalg.cond(w) for w in weights], rtol=1e-3)
        close(run, "weight.subspace_overlap", site, [overlap(weights[0], w) for w in weights], rtol=1e-4)


def overlap(first: Array, now: Array) -> float:
    """Of the 8 leading left singular vectors (of the shorter side), how much is still there."""
    bases = [np.linalg.svd(w if w.shape[0] <= w.shape[1] else w.T, full_matrices=False)[0][:, :8] for w in (first, now)]
    return float(np.linalg.norm(bases[0].T @ bases[1]) ** 2 / bases[0].shape[1])


def assert_gradients_read(run: Run, loop: Loop, site: str, *, transposed: bool = False, rtol: float = 1e-4) -> None:
    """Norm and spectrum of each edit's gradient [out, in], and its cosines. transposed: the weight is [in, out]."""
    gradients = [step.gradients[site] for step in loop.steps]
    close(run, "gradient.norm", site, [None, *map(np.linalg.norm, gradients)], rtol=rtol)
    for values, gradient in zip(run.series("gradient.spectrum", site)[1:], gradients, strict=True):
        exact = np.linalg.svd(gradient, compute_uv=False)[: np.isfinite(values).sum()]
        np.testing.assert_allclose(values[: exact.size], exact, rtol=rtol, atol=1e-6 * exact[0])
        assert exact.size >= np.linalg.matrix_rank(gradient, tol=1e-5 * exact[0])
    assert (run.series("gradient.passes", site)[1:] == 1).all()
    moves = [b - a for a, b in zip(loop.starts[site], loop.weights[site][1:], strict=True)]
    moves = [move.T if transposed else move for move in moves]
    with_update = [cosine(g, move) if move.any() else None for g, move in zip(gradients, moves, strict=True)]
    if any(value is not None for value in with_update):
        close(run, "gradient.cosine_update", site, [None, *with_update], rtol=1e-3, atol=1e-5)
    before = [cosine(a, b) for a, b in pairwise(gradients)]
    close(run, "gradient.cosine_previous", site, [None, None, *before], rtol=1e-3, atol=1e-5)


def cosine(a: Array, b: Array) -> float:
    """Of two tensors of one shape."""
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def assert_outputs_read(run: Run, loop: Loop, site: str, *, sequence: bool) -> None:
    """Size of each edit's output; beyond the first position only where there are positions."""
    outputs = [step.outputs[site] for step in loop.steps]
    close(run, "activation.rms", site, [None, *(np.sqrt(np.mean(y**2)) for y in outputs)])
    close(run, "activation.max_abs", site, [None, *(np.abs(y).max() for y in outputs)])
    if sequence:
        beyond = [y[..., 1:, :] for y in outputs]
        close(run, "activation.rms_beyond_first", site, [None, *(np.sqrt(np.mean(y**2)) for y in beyond)])
        close(run, "activation.max_abs_beyond_first", site, [None, *(np.abs(y).max() for y in beyond)])
    else:
        assert not read_at(run, site, "activation.rms_beyond_first", "activation.max_abs_beyond_first")


def read_at(run: Run, site: str, *starts: str) -> list[str]:
    """The metrics with one of these names, or name parts such as ``gradient.``, that were read at a site."""
    found = {metric for edit in run.edits for metric, at in edit.row.readings if at == site}
    return sorted(metric for metric in found if metric.startswith(starts))


def skipped(run: Run) -> dict[str, str]:
    """Site → why it was skipped."""
    return dict(note.says.split(": ", 1) for note in run.notes if note.kind == "skipped-site")
