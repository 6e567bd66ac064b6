"""Limits around editors: projections and scalings against their definition."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Editor, Prepared, Progress, Prompts, quiet
from stabilitylab.editors.grace import Grace
from stabilitylab.editors.mend import Mend
from stabilitylab.editors.regularized import LIMITS, regularized
from stabilitylab.editors.transform import EPSILON, GradientTransform
from stabilitylab.errors import UsageError
from stabilitylab.watching.editor_parts import find_normalisers

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Adds:
    """Adds what it is told to the weight; may return a copy of the model, or wrap it."""

    sites = ("layer",)

    def __init__(self, returns: str = "same") -> None:
        self.returns = returns

    def edit(self, model: nn.Module, request: Tensor) -> nn.Module:
        inner = model.inner if isinstance(model, Wrapper) else model
        with torch.no_grad():
            inner.get_submodule("layer").weight.add_(request.to(inner.get_submodule("layer").weight.dtype))
        if self.returns == "copy":
            return copy.deepcopy(model)
        if self.returns == "wrapper" and not isinstance(model, Wrapper):
            return Wrapper(model)
        return model


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Learnt(Adds):
    """A prepared editor with a hypernetwork, whose inputs are what it is told."""

    file = "learnt.safetensors"

    def __init__(self) -> None:
        super().__init__()
        self.net = GradientTransform(6, 4, rank=2, layers=1)
        self.seen: list[Tensor] = []

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        if isinstance(request, Exception):
            raise request
        self.seen.extend(self.net(*request, 0))
        return model

    @property
    def learned_with(self) -> dict[str, Any]:
        return {}

    def prepare(self, model: nn.Module, prompts: Prompts, *, seed: int, progress: Progress = quiet) -> None:
        self.prepared = seed

    def save(self, folder: str | Path) -> Path:
        return Path(folder) / self.file

    def restore(self, folder: str | Path) -> None:
        self.restored = folder


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.ModuleDict({"layer": nn.Linear(6, 4)}).to(dtype)


def weight_of(edited: nn.Module) -> Tensor:
    inner = edited.inner if isinstance(edited, Wrapper) else edited
    return inner.get_submodule("layer").weight.detach()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("returns", ["same", "copy", "wrapper"])
def test_the_ball_holds_after_every_edit_and_leaves_what_is_inside_to_the_bit(dtype: torch.dtype, returns: str) -> None:
    limited = model(dtype)
    editor = regularized(Adds(returns), ball=0.5)
    origin = weight_of(limited).clone()
    outside = 0
    for _ in range(12):
        update = torch.randn(4, 6) * 0.1
        bare = weight_of(limited) + update.to(dtype)
        limited = editor.edit(limited, update)
        away = bare.double() - origin.double()
        share = float(away.norm() / origin.double().norm())
        found = weight_of(limited)
        assert found.dtype == dtype
        if share <= 0.5:
            assert torch.equal(found, bare)
        else:
            outside += 1
            expected = origin.double() + away * (0.5 / share)
            torch.testing.assert_close(found.double(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
        after = float((found.double() - origin.double()).norm() / origin.double().norm())
        assert after <= 0.5 * (1 + 4 * ROUNDING[dtype])
    assert 0 < outside < 12


@pytest.mark.parametrize("factor", [0.5, 20.0])
def test_the_clip_scales_an_update_to_a_share_of_the_first_norm(factor: float) -> None:
    limited, editor = model(), regularized(Adds(), clip=0.1)
    first = weight_of(limited).double().norm()
    for edits in range(1, 4):
        before = weight_of(limited).clone()
        direction = torch.randn(4, 6)
        update = direction / direction.norm() * 0.1 * first * factor
        editor.edit(limited, update)
        moved = weight_of(limited).double() - before.double()
        assert float(moved.norm() / first) == pytest.approx(0.1 * min(factor, 1.0), rel=1e-5), edits
        torch.testing.assert_close(moved / moved.norm(), (direction / direction.norm()).double(), atol=1e-5, rtol=1e-4)


def test_what_is_not_finite_is_left_as_it_is() -> None:
    for bad in (float("nan"), float("inf")):
        limited, update = model(), torch.randn(4, 6)
        update[1, 2] = bad
        bare = weight_of(limited) + update
        regularized(Adds(), ball=0.1, clip=0.1).edit(limited, update)
        torch.testing.assert_close(weight_of(limited), bare, equal_nan=True, rtol=0, atol=0)


def test_the_clamp_is_that_of_the_normalised_inputs_and_comes_off() -> None:
    inner = Learnt()
    inner.net.observe(torch.randn(50, 6), torch.randn(50, 4) * 1e-3)
    u, v = torch.randn(5, 6) * 4, torch.randn(5, 4) * 1e-2
    editor = regularized(inner, clamp=2.0)
    limited = model()
    with torch.no_grad():
        editor.edit(limited, (u, v))
        free = inner.net(u, v, 0)
    assert inner.net.clamp is None
    for seen, unclamped, raw, mean, std in (
        (inner.seen[0], free[0], u, inner.net.u_mean, inner.net.u_std),
        (inner.seen[1], free[1], v, inner.net.v_mean, inner.net.v_std),
    ):
        normalised = (raw.double() - mean) / (std + EPSILON)  # untrained, the hypernetwork is the identity
        expected = torch.minimum(torch.maximum(normalised, torch.tensor(-2.0)), torch.tensor(2.0)).float()
        assert float(normalised.abs().max()) > 2
        torch.testing.assert_close(seen, expected)
        torch.testing.assert_close(unclamped, normalised.float())
    with pytest.raises(KeyError, match="mine"):
        editor.edit(limited, KeyError("mine"))
    assert inner.net.clamp is None


def test_it_is_prepared_exactly_if_the_inner_editor_is() -> None:
    plain, inner = regularized(Adds(), ball=1.0), Learnt()
    assert isinstance(plain, Editor)
    assert not isinstance(plain, Prepared)
    wrapped = regularized(inner, ball=1.0)
    assert isinstance(wrapped, Prepared)
    assert wrapped.file == "learnt.safetensors"
    assert wrapped.save("a") == Path("a/learnt.safetensors")
    wrapped.restore("b")
    wrapped.prepare(model(), None, seed=7)  # type: ignore[arg-type]
    assert (inner.restored, inner.prepared) == ("b", 7)
    assert copy.deepcopy(wrapped).file == wrapped.file


def test_probes_find_the_inner_editors_modules() -> None:
    mend = Mend({"layer": (4, 6)}, batch_of=dict)
    found = find_normalisers(regularized(mend, clamp=3.0))
    assert [normaliser.module for normaliser in found.values()] == [mend.transforms["4x6"]]


def test_what_can_not_be_limited_is_said() -> None:
    grace = Grace("layer", batch_of=dict)
    with pytest.raises(UsageError, match="expected at least one of ball, clip, clamp"):
        regularized(Adds())
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="above 0"):
            regularized(Adds(), ball=value)
    for limit in ("ball", "clip"):
        with pytest.raises(UsageError, match="GRACE moves no weight"):
            regularized(grace, **{limit: LIMITS[limit]})
    for editor in (Adds(), grace):
        with pytest.raises(UsageError, match="expected MEND or MALMEN"):
            regularized(editor, clamp=3.0)
